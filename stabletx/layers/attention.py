"""Attention with its projections."""

from __future__ import annotations

from typing import final

import torch
from einops import rearrange
from torch import Tensor, nn

from stabletx import _checks
from stabletx.functional._one_query import attend_one_query
from stabletx.functional.attention import Method, attention
from stabletx.functional.packed import packed_attention
from stabletx.functional.positions import rotate
from stabletx.layers import _layer_checks
from stabletx.layers._as_made import is_as_made
from stabletx.layers._from_torch import fill, read_attention
from stabletx.layers._init import init_linear
from stabletx.layers.cache import KeyValueCache
from stabletx.layers.linear import Linear
from stabletx.layers.normalization import RMSNorm
from stabletx.masks import Mask
from stabletx.packing import Plan

Rotation = tuple[Tensor, Tensor]  # (cos, sin) of the positions, from RotaryEmbedding


@final
class MultiHeadAttention(nn.Module):
    """Attend with several heads, to itself or to a context.

    Args:
        d_model: size of a token; a multiple of ``n_heads`` unless ``d_head`` is given.
        n_heads: query heads.
        n_kv_heads: key/value heads, a divisor of ``n_heads``; None takes ``n_heads``.
        d_head: size of a head; None takes ``d_model / n_heads``.
        is_causal: a token sees no later token of its own sequence.
        qk_norm: give queries and keys a root mean square of 1 per head, with a learned gain, which
            bounds the scores by ``sqrt(head_dim)`` times the gains. Off to load older weights.
        use_bias: whether the projections have one.
        scale: factor on the products of queries and keys; None takes ``d_head ** -0.5``.
        dropout_p: probability in [0, 1) that an attention weight is dropped while training.
        method: as in :func:`stabletx.attention`.

    Raises:
        ValueError: if the heads do not divide up ``d_model`` or each other.

    Numerics: as :func:`stabletx.attention`.
    Source: Vaswani et al. (2017); Ainslie et al. (2023) for grouped heads; Henry et al. (2020) for
        the norm of queries and keys.

    >>> x = torch.zeros(2, 5, 16)
    >>> MultiHeadAttention(16, 4, n_kv_heads=2, is_causal=True)(x).shape
    torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        n_kv_heads: int | None = None,
        d_head: int | None = None,
        is_causal: bool = False,
        qk_norm: bool = True,
        use_bias: bool = True,
        scale: float | None = None,
        dropout_p: float = 0.0,
        method: Method = "auto",
    ) -> None:
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        _checks.check_positive("d_model", d_model)
        if d_head is None:
            _checks.check_divides("n_heads", n_heads, "d_model", d_model)
            d_head = d_model // n_heads
        _checks.check_positive("d_head", d_head)
        _checks.check_divides("n_kv_heads", n_kv_heads, "n_heads", n_heads)
        _checks.check_probability("dropout_p", dropout_p)
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        self.head_dim, self.scale = d_head, scale
        self.is_causal, self.dropout_p, self.method = is_causal, dropout_p, method
        widths = self._widths()
        self.qkv = Linear(d_model, sum(widths), use_bias)
        self.out = Linear(widths[0], d_model, use_bias)
        self.q_norm = RMSNorm(self.head_dim) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim) if qk_norm else None
        self.reset_parameters()

    @classmethod
    def from_torch(
        cls, module: nn.MultiheadAttention, *, is_causal: bool = False
    ) -> MultiHeadAttention:
        """Convert torch's attention; ours takes ``(b, t, m)``, whatever its ``batch_first``.

        Args:
            module: keeps its weights, of which the layer gets copies.
            is_causal: as in the constructor.

        Raises:
            TypeError: for another kind of module.
            ValueError: where it has widths of keys or values of their own, or adds keys.

        >>> MultiHeadAttention.from_torch(nn.MultiheadAttention(8, 2))
        MultiHeadAttention(
          n_heads=2, n_kv_heads=2
          (qkv): Linear(in_features=8, out_features=24, bias=True)
          (out): Linear(in_features=8, out_features=8, bias=True)
        )
        """
        settings, weights = read_attention(module)
        return fill(cls(is_causal=is_causal, **settings), weights, module)

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        init_linear(self.qkv, self.qkv.in_features)
        init_linear(self.out, self.qkv.in_features)

    def forward(
        self,
        x: Tensor,  # (b, t, m), or (n_tokens, m) with a plan
        *,
        context: Tensor | None = None,  # (b, s, m)
        mask: Mask | Tensor | None = None,  # a Mask, or bool (b|1, h|1, t|1, s|1)
        bias: Tensor | None = None,  # (b|1, h|1, t|1, s|1)
        rotation: Rotation | None = None,
        cache: KeyValueCache | None = None,
        plan: Plan | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: tokens that ask.
            context: tokens that are asked; None asks ``x`` itself. With a cache, keys and values
                of the context are computed at the first call and read ever after.
            mask: True = may attend; joined with the causal rule where the layer has it. With a
                plan, a rule on places that holds within each sequence, such as ``Mask.window``.
            bias: added to the scores. With a plan (1, h|1, n, n), n the longest sequence; a shorter
                one takes the first rows and columns.
            rotation: (cos, sin) for the positions of ``x``; only for self-attention.
            cache: holds the keys and values of earlier tokens, before ``x``.
            plan: says that ``x`` is a packed batch; excludes context and cache.

        Returns:
            As ``x``.

        Raises:
            ValueError: for a wrong shape, or arguments that exclude each other.
        """
        _checks.check_axes("x", x, "b t m" if plan is None else "n m", "See `plan`.")
        _checks.check_same("size of the last axis", "x", x.shape[-1], "qkv", self.qkv.in_features)
        if plan is not None:
            others = {"context": context, "cache": cache}
            _checks.check_all_none(others, "plan", "A packed batch knows its sequences already.")
            q, k, v = self._rotated(*self._project(x), rotation)
            out = packed_attention(
                q, k, v, plan, is_causal=self.is_causal,
                mask=_layer_checks.rule_on_places(mask), bias=bias, scale=self.scale,
                dropout_p=self.dropout_p, training=self.training, method=self.method,
            )  # fmt: skip
        else:
            if context is None:
                q, k, v = self._rotated(*self._project(x), rotation)
                q, k, v = (a.transpose(1, 2) for a in (q, k, v))  # (b, h, t, d)
                k, v = (k, v) if cache is None else cache.append(k, v)
            else:
                _checks.check_all_none({"rotation": rotation}, "context", "Rotate neither.")
                q, k, v = self._cross(x, context, cache)
            mask = self._joined(mask, q.shape[2], is_self=context is None)
            seen = None
            if cache is not None and bias is None and self._takes_one_query(q):
                longest_key, longest_value = cache.longest()
                seen = attend_one_query(
                    q, k, v, mask=mask, scale=self.scale,
                    longest_key=longest_key, longest_value=longest_value,
                )  # fmt: skip
            if seen is None:
                seen = attention(
                    q, k, v, mask=mask, bias=bias, scale=self.scale,
                    dropout_p=self.dropout_p, training=self.training, method=self.method,
                )  # fmt: skip
            out = seen.transpose(1, 2)
        projected: Tensor = self.out(out.flatten(-2))
        return projected

    def _takes_one_query(self, q: Tensor) -> bool:
        is_inference = not (torch.is_grad_enabled() or self.training)
        return q.shape[2] == 1 and self.method == "auto" and is_inference

    def _widths(self) -> list[int]:
        return [n * self.head_dim for n in (self.n_heads, self.n_kv_heads, self.n_kv_heads)]

    def _heads(self, x: Tensor) -> Tensor:  # (..., n * d) -> (..., n, d)
        return x.view(*x.shape[:-1], x.shape[-1] // self.head_dim, self.head_dim)

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.q_norm is None or self.k_norm is None:
            return q, k
        return self.q_norm(q), self.k_norm(k)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # each (..., n, d)
        q, k, v = (self._heads(part) for part in self.qkv(x).split(self._widths(), dim=-1))
        return *self._normed(q, k), v

    @staticmethod
    def _rotated(
        q: Tensor, k: Tensor, v: Tensor, rotation: Rotation | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if rotation is None:
            return q, k, v
        cos, sin = (x[..., None, :] for x in rotation)  # the same for every head
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def _cross(
        self, x: Tensor, context: Tensor, cache: KeyValueCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:  # each (b, h, t, d)
        """Use the first rows of the fused projection for ``x``, the others for the context."""
        _checks.check_axes("context", context, "b s m")
        n = self._widths()[0]
        q = self._heads(self._part(x, slice(n)))
        if cache is not None and cache.length:
            q = q if self.q_norm is None else self.q_norm(q)
            return rearrange(q, "b t h d -> b h t d"), *cache.read()
        kv = self._part(context, slice(n, None))
        k, v = (self._heads(part) for part in kv.chunk(2, dim=-1))
        q, k = self._normed(q, k)
        q, k, v = (rearrange(a, "b t h d -> b h t d") for a in (q, k, v))
        return (q, k, v) if cache is None else (q, *cache.append(k, v))

    def _part(self, x: Tensor, rows: slice) -> Tensor:
        """Project by some rows of ``qkv``; by all where it is replaced, as by LoRA, or watched."""
        if not is_as_made(self.qkv, Linear):
            whole: Tensor = self.qkv(x)
            return whole[..., rows]
        weight, bias = self.qkv.weight, self.qkv.bias
        return nn.functional.linear(x, weight[rows], None if bias is None else bias[rows])

    def _joined(self, mask: Mask | Tensor | None, n_queries: int, *, is_self: bool) -> Mask | None:
        if isinstance(mask, Tensor):
            mask = Mask.dense(mask)
        # One query is the last token, which sees every earlier one: decoding needs no mask.
        if not (self.is_causal and is_self) or n_queries == 1:
            return mask
        return Mask.causal() if mask is None else Mask.causal() & mask

    def extra_repr(self) -> str:
        """Say the heads."""
        causal = ", causal" if self.is_causal else ""
        return f"n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}{causal}"
