"""Blocks: attention and a feed-forward part, each with a shortcut around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, final

import torch
from torch import Tensor, nn

from stabletx import _checks
from stabletx.functional.attention import Method
from stabletx.layers import _layer_checks
from stabletx.layers._as_made import is_as_made
from stabletx.layers._from_torch import fill, read_block
from stabletx.layers.attention import MultiHeadAttention, Rotation
from stabletx.layers.cache import KeyValueCache
from stabletx.layers.feed_forward import Activation, FeedForward
from stabletx.layers.linear import Linear
from stabletx.layers.normalization import (
    LayerNorm,
    NormKind,
    NormSettings,
    RMSNorm,
    make_norm,
)
from stabletx.masks import Mask
from stabletx.packing import Plan

NormPosition = Literal["pre", "post", "peri"]


@final
class Shortcut(nn.Module):
    """Lead a stream around a branch: ``x + f(x)``, with norms where ``norm_position`` says.

    Args:
        d_model: size of a token.
        norm_position: "pre" ``x + f(N(x))``; "post" ``N(x + f(x))``; "peri" ``x + N(f(N(x)))``.
        norm: "layer" or "rms", or a :class:`NormSettings`.
        dropout_p: probability in [0, 1) that an entry of the branch is dropped while training.

    Source: Xiong et al. (2020) for "pre"; Vaswani et al. (2017) for "post"; Kim et al. (2025) for
        "peri".
    """

    def __init__(
        self,
        d_model: int,
        *,
        norm_position: NormPosition,
        norm: NormKind | NormSettings,
        dropout_p: float,
    ) -> None:
        super().__init__()
        _checks.check_one_of("norm_position", norm_position, ("pre", "post", "peri"))
        _checks.check_probability("dropout_p", dropout_p)
        self.dropout_p = dropout_p
        self.norm_in = None if norm_position == "post" else make_norm(norm, d_model)
        self.norm_branch = make_norm(norm, d_model) if norm_position == "peri" else None
        self.norm_out = make_norm(norm, d_model) if norm_position == "post" else None

    def forward(
        self,
        x: Tensor,
        branch: Callable[[Tensor], Tensor],
        *,
        ends_with: MultiHeadAttention | FeedForward | None = None,
    ) -> Tensor:
        """Add what the branch makes of ``x`` to ``x``; some layers it ends with save memory."""
        out = branch(x if self.norm_in is None else self.norm_in(x))
        if self.norm_branch is not None:
            out = self.norm_branch(out)
        if self.dropout_p > 0 and self.training:
            out = nn.functional.dropout(out, self.dropout_p)
        out = out.add_(x) if self._may_write(x, out, ends_with) else x + out
        return out if self.norm_out is None else self.norm_out(out)

    def _may_write(
        self, x: Tensor, out: Tensor, ends_with: MultiHeadAttention | FeedForward | None
    ) -> bool:
        """Tell whether the branch's output is ours alone: then the sum needs no new memory."""
        if torch.is_grad_enabled() or out.dtype != x.dtype or ends_with is None:
            return False
        if torch.compiler.is_compiling():  # which plans memory itself
            return False
        if self.norm_branch is not None:
            return is_as_made(self.norm_branch, LayerNorm, RMSNorm)
        return is_as_made(ends_with, MultiHeadAttention, FeedForward) and is_as_made(
            ends_with.out, Linear
        )


@final
class EncoderBlock(nn.Module):
    """Let every token see every token, then transform each.

    Args:
        d_model: size of a token.
        n_heads: query heads.
        n_kv_heads: key/value heads; None takes ``n_heads``.
        d_head: size of a head; None takes ``d_model / n_heads``.
        d_ff: size within the feed-forward part; None: see :class:`FeedForward`.
        norm_position: "pre" (default), "post" or "peri"; see :class:`Shortcut`.
        norm: "layer" or "rms", or a :class:`NormSettings`.
        activation: "gelu", "swiglu" or another of :class:`FeedForward`.
        qk_norm: normalize queries and keys; see :class:`MultiHeadAttention`.
        use_bias: whether linear maps have one.
        attention_scale: factor on the products; None takes ``d_head ** -0.5``.
        dropout_p: probability for the two branches.
        attention_dropout_p: probability for attention weights; slower beyond 256 tokens.
        recompute_feed_forward: save memory while training; see :class:`FeedForward`.
        method: as in :func:`stabletx.attention`.

    >>> EncoderBlock(16, 4)(torch.zeros(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    # More than eight arguments: a block is where a model's choices meet.
    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        n_kv_heads: int | None = None,
        d_head: int | None = None,
        d_ff: int | None = None,
        norm_position: NormPosition = "pre",
        norm: NormKind | NormSettings = "layer",
        activation: Activation = "gelu",
        qk_norm: bool = True,
        use_bias: bool = True,
        attention_scale: float | None = None,
        dropout_p: float = 0.0,
        attention_dropout_p: float = 0.0,
        recompute_feed_forward: bool = False,
        method: Method = "auto",
    ) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(
            d_model, n_heads, n_kv_heads=n_kv_heads, d_head=d_head, qk_norm=qk_norm,
            use_bias=use_bias, scale=attention_scale, dropout_p=attention_dropout_p, method=method,
        )  # fmt: skip
        self.feed_forward = FeedForward(
            d_model, d_ff, activation=activation, use_bias=use_bias,
            recompute=recompute_feed_forward,
        )  # fmt: skip
        self.attention_shortcut, self.feed_forward_shortcut = (
            Shortcut(d_model, norm_position=norm_position, norm=norm, dropout_p=dropout_p)
            for _ in range(2)
        )

    @classmethod
    def from_torch(cls, layer: nn.TransformerEncoderLayer) -> EncoderBlock:
        """Convert a layer of torch's encoder; the block gets copies of its weights.

        Its dropout within the feed-forward part has no counterpart here and is left out.

        Raises:
            TypeError: for another kind of layer or norm.
            ValueError: for an activation or an attention that has no counterpart here.

        >>> EncoderBlock.from_torch(nn.TransformerEncoderLayer(8, 2, 16)).feed_forward.activation
        'relu'
        """
        settings, weights = read_block(layer)
        return fill(cls(**settings), weights, layer)

    def forward(
        self,
        x: Tensor,  # (b, t, m), or (n_tokens, m) with a plan
        *,
        mask: Mask | Tensor | None = None,
        bias: Tensor | None = None,
        rotation: Rotation | None = None,
        plan: Plan | None = None,
    ) -> Tensor:
        """Transform ``x``; the arguments are those of :meth:`MultiHeadAttention.forward`."""
        x = self.attention_shortcut(
            x,
            lambda y: self.attention(y, mask=mask, bias=bias, rotation=rotation, plan=plan),
            ends_with=self.attention,
        )
        last = self.feed_forward
        out: Tensor = self.feed_forward_shortcut(x, last, ends_with=last)
        return out


@final
class DecoderBlock(nn.Module):
    """Let every token see itself and the tokens before it, and a context if there is one.

    Args:
        d_model: size of a token.
        n_heads: query heads.
        has_context: whether the block also attends to a context.
        n_kv_heads: as for :class:`EncoderBlock`, like all that follow.
        d_head: size of a head.
        d_ff: size within the feed-forward part.
        norm_position: "pre" (default), "post" or "peri".
        norm: "layer" or "rms", or a :class:`NormSettings`.
        activation: "gelu", "swiglu" or another.
        qk_norm: normalize queries and keys.
        use_bias: whether linear maps have one.
        attention_scale: factor on the products.
        dropout_p: probability for the branches.
        attention_dropout_p: probability for attention weights.
        recompute_feed_forward: save memory while training.
        method: as in :func:`stabletx.attention`.

    >>> DecoderBlock(16, 4)(torch.zeros(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    # More than eight arguments: a block is where a model's choices meet.
    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        has_context: bool = False,
        n_kv_heads: int | None = None,
        d_head: int | None = None,
        d_ff: int | None = None,
        norm_position: NormPosition = "pre",
        norm: NormKind | NormSettings = "layer",
        activation: Activation = "gelu",
        qk_norm: bool = True,
        use_bias: bool = True,
        attention_scale: float | None = None,
        dropout_p: float = 0.0,
        attention_dropout_p: float = 0.0,
        recompute_feed_forward: bool = False,
        method: Method = "auto",
    ) -> None:
        super().__init__()

        def attend(is_causal: bool) -> MultiHeadAttention:
            return MultiHeadAttention(
                d_model, n_heads, n_kv_heads=n_kv_heads, d_head=d_head, is_causal=is_causal,
                qk_norm=qk_norm, use_bias=use_bias, scale=attention_scale,
                dropout_p=attention_dropout_p, method=method,
            )  # fmt: skip

        def shortcut() -> Shortcut:
            return Shortcut(d_model, norm_position=norm_position, norm=norm, dropout_p=dropout_p)

        self.attention = attend(is_causal=True)
        self.attention_shortcut = shortcut()
        self.cross_attention = attend(is_causal=False) if has_context else None
        self.cross_attention_shortcut = shortcut() if has_context else None
        self.feed_forward = FeedForward(
            d_model, d_ff, activation=activation, use_bias=use_bias,
            recompute=recompute_feed_forward,
        )  # fmt: skip
        self.feed_forward_shortcut = shortcut()

    def forward(
        self,
        x: Tensor,  # (b, t, m), or (n_tokens, m) with a plan
        *,
        mask: Mask | Tensor | None = None,
        bias: Tensor | None = None,
        rotation: Rotation | None = None,
        cache: KeyValueCache | None = None,
        plan: Plan | None = None,
        context: Tensor | None = None,  # (b, s, m)
        context_mask: Mask | Tensor | None = None,
        context_cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Transform ``x``; the arguments are those of :meth:`MultiHeadAttention.forward`.

        Raises:
            ValueError: if a context is given to a block made without one, or the reverse.
        """
        _layer_checks.check_context(self.cross_attention is not None, context is not None)
        x = self.attention_shortcut(
            x,
            lambda y: self.attention(
                y, mask=mask, bias=bias, rotation=rotation, cache=cache, plan=plan
            ),
            ends_with=self.attention,
        )
        if self.cross_attention is not None and self.cross_attention_shortcut is not None:
            attend = self.cross_attention
            x = self.cross_attention_shortcut(
                x,
                lambda y: attend(y, context=context, mask=context_mask, cache=context_cache),
                ends_with=attend,
            )
        last = self.feed_forward
        out: Tensor = self.feed_forward_shortcut(x, last, ends_with=last)
        return out
