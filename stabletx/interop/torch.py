"""torch's own attention, layer and encoder by this library: change one import.

Signatures, parameter names and the meaning of every argument are torch's, the signs of the masks
included. What differs: a query that may see nothing gives 0 where torch gives NaN, padding may
hold anything, and no argument switches to a fast path that computes something else.
"""

from __future__ import annotations

from typing import Any, final

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from stabletx._checks import check_same, check_tensor, must
from stabletx.functional.attention import attention, attention_details
from stabletx.masks import Mask

__all__ = [
    "MultiheadAttention",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "scaled_dot_product_attention",
]


# More than eight arguments: they are torch's.
def scaled_dot_product_attention(
    query: Tensor,  # (..., h, t, d)
    key: Tensor,  # (..., g, s, d)
    value: Tensor,  # (..., g, s, e)
    attn_mask: Tensor | None = None,  # bool or float, broadcastable to (..., h, t, s)
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:  # (..., h, t, e)
    """Attend as ``torch.nn.functional.scaled_dot_product_attention`` means it.

    Args:
        query: two axes at least.
        key: its leading axes broadcast with those of ``query``.
        value: as ``key``.
        attn_mask: bool, True = may attend; or float, added to the scores, where -inf blocks.
        dropout_p: probability in [0, 1) that a weight is dropped, whenever it is above 0.
        is_causal: query ``i`` sees keys up to ``i``, counted from the first; excludes a mask.
        scale: factor on the products; None takes ``d ** -0.5``.
        enable_gqa: let several query heads share a key/value head.

    Returns:
        The output in the dtype of ``query``.

    Raises:
        TypeError: for wrong kinds and dtypes.
        ValueError: for wrong shapes, and for a mask beside ``is_causal``.

    Numerics: as :func:`stabletx.attention`. A row that sees no key gives 0.

    >>> q = torch.zeros(2, 3, 4)
    >>> scaled_dot_product_attention(q, q, q, is_causal=True).shape
    torch.Size([2, 3, 4])
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, x)
        if x.ndim < 2:
            raise ValueError(must(name, "have two axes at least", f"shape {tuple(x.shape)}"))
    if is_causal and attn_mask is not None:
        instead = "Join the causal rule into the mask."
        raise ValueError(must("attn_mask", "be None beside is_causal", "a tensor", instead))
    n_axes = max(4, query.ndim, key.ndim, value.ndim)
    n_added = n_axes - max(query.ndim, key.ndim, value.ndim)
    q, k, v = (_with_axes(x, n_axes) for x in (query, key, value))
    n_heads, n_kv_heads = q.shape[-3], max(k.shape[-3], v.shape[-3])
    if not enable_gqa and 1 not in (n_heads, n_kv_heads):
        check_same("number of heads", "query", n_heads, "key", n_kv_heads)
    leading = torch.broadcast_shapes(*(x.shape[:-3] for x in (q, k, v)))  # type: ignore[no-untyped-call]
    q = _spread(q, leading, max(n_heads, n_kv_heads))
    k, v = (_spread(x, leading, n_kv_heads) for x in (k, v))
    mask, bias = Mask.causal(offset=0) if is_causal else None, None
    if attn_mask is not None:
        check_tensor("attn_mask", attn_mask)
        pairs = _with_axes(attn_mask, n_axes)
        if n_axes > 4:
            pairs = _spread(pairs, leading, pairs.shape[-3])
        mask, bias = (None, pairs) if pairs.is_floating_point() else (Mask.dense(pairs), None)
    out = attention(
        q, k, v, mask=mask, bias=bias, scale=scale,
        dropout_p=dropout_p, training=True if dropout_p else None,
    )  # fmt: skip
    return out.reshape(*leading, *out.shape[1:])[(0,) * n_added]


def _spread(x: Tensor, leading: torch.Size, n_heads: int) -> Tensor:
    """Give a tensor all leading axes, as one, and repeat its head where it has one."""
    heads = n_heads if x.shape[-3] == 1 else -1
    return x.expand(*leading, heads, -1, -1).flatten(0, len(leading) - 1)


def _with_axes(x: Tensor, n_axes: int) -> Tensor:
    return x[(None,) * max(0, n_axes - x.ndim)]


@final
class MultiheadAttention(nn.MultiheadAttention):
    """Attend with torch's parameters and torch's arguments; a ``state_dict`` of torch's loads.

    The constructor is that of ``torch.nn.MultiheadAttention``.

    Numerics: as :func:`stabletx.attention`.

    >>> x = torch.zeros(2, 3, 8)
    >>> ours = MultiheadAttention(8, 2, batch_first=True)
    >>> ours(x, x, x, key_padding_mask=torch.ones(2, 3, dtype=torch.bool))[0].isfinite().all()
    tensor(True)
    """

    # More than eight arguments: they are torch's.
    def forward(
        self,
        query: Tensor,  # (t, b, m), (b, t, m) with batch_first, or (t, m)
        key: Tensor,  # likewise, with s tokens
        value: Tensor,
        key_padding_mask: Tensor | None = None,  # (b, s) or (s,)
        need_weights: bool = True,
        attn_mask: Tensor | None = None,  # (t, s) or (b * h, t, s)
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query: tokens that ask.
            key: tokens that are asked.
            value: what they answer.
            key_padding_mask: bool, True = ignore the key; or float, added to its scores.
            need_weights: return the weights too, which costs time and memory.
            attn_mask: bool, True = may **not** attend; or float, added to the scores.
            average_attn_weights: return their mean over the heads.
            is_causal: says that ``attn_mask`` is causal. The mask itself is what counts.

        Returns:
            The output, shaped as ``query``, and the weights (b, t, s), (b, h, t, s) or None; those
            before dropout.

        Raises:
            ValueError: for wrong shapes, nested tensors, or ``is_causal`` without a mask.
        """
        named = (("query", query), ("key", key), ("value", value))
        widths = self.embed_dim, self.kdim, self.vdim
        for (name, x), width in zip(named, widths, strict=True):
            check_tensor(name, x)
            if x.is_nested or x.ndim != query.ndim or x.ndim not in (2, 3):
                rule = "be a padded tensor of two or three axes, as many as query"
                raise ValueError(must(name, rule, f"shape {tuple(x.shape)}, nested={x.is_nested}"))
            if x.shape[-1] != width:
                raise ValueError(must(name, f"have {width} channels", f"shape {tuple(x.shape)}"))
        if is_causal and attn_mask is None:
            instead = "Pass nn.Transformer.generate_square_subsequent_mask(n_tokens)."
            raise ValueError(must("attn_mask", "be given beside is_causal", None, instead))
        q, k, v = self._projected(query, key, value)
        mask, bias = self._pairs(attn_mask, key_padding_mask)
        arguments: dict[str, Any] = {
            "mask": mask, "bias": bias, "dropout_p": self.dropout, "training": self.training
        }  # fmt: skip
        weights = None
        if need_weights:
            details = attention_details(q, k, v, weights=True, **arguments)
            out, weights = details.out, details.weights
        else:
            out = attention(q, k, v, **arguments)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        out = self.out_proj(rearrange(out, "b h t d -> b t (h d)"))
        if query.ndim == 2:
            return out[0], None if weights is None else weights[0]
        return out if self.batch_first else out.transpose(0, 1), weights

    def _projected(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:  # each (b, h, ., d)
        if self._qkv_same_embed_dim:
            maps = self.in_proj_weight.chunk(3)
        else:
            maps = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        shifts = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if query is key and key is value and self._qkv_same_embed_dim:
            q, k, v = functional.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            given = zip((query, key, value), maps, shifts, strict=True)
            q, k, v = (functional.linear(x, w, b) for x, w, b in given)
        if query.ndim == 2:
            q, k, v = q[None], k[None], v[None]
        elif not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        if self.bias_k is not None and self.bias_v is not None:
            extra = (x.expand(len(k), -1, -1) for x in (self.bias_k, self.bias_v))
            k, v = (torch.cat(pair, 1) for pair in zip((k, v), extra, strict=True))
        if self.add_zero_attn:
            k, v = (functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
        q, k, v = (rearrange(x, "b t (h d) -> b h t d", h=self.num_heads) for x in (q, k, v))
        return q, k, v

    def _pairs(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None
    ) -> tuple[Mask | None, Tensor | None]:
        """Join torch's two masks, True = may not attend, into a mask and a bias of ours."""
        n_extra = (self.bias_k is not None) + self.add_zero_attn  # keys that nothing blocks
        masks: list[Mask] = []
        biases: list[Tensor] = []
        for name, blocked in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
            if blocked is None:
                continue
            check_tensor(name, blocked)
            if blocked.dtype != torch.bool and not blocked.is_floating_point():
                rule = "be bool (True = may not attend) or float (added)"
                raise TypeError(must(name, rule, blocked.dtype))
            blocked = functional.pad(blocked, (0, n_extra))
            if name == "attn_mask" and blocked.ndim == 3:
                if blocked.shape[0] % self.num_heads:
                    rule = f"have a multiple of {self.num_heads} heads on its first axis"
                    raise ValueError(must(name, rule, f"shape {tuple(blocked.shape)}"))
                pairs = rearrange(blocked, "(b h) t s -> b h t s", h=self.num_heads)
            elif name == "attn_mask":
                pairs = blocked[None, None]
            else:
                pairs = (blocked if blocked.ndim == 2 else blocked[None])[:, None, None]
            if pairs.is_floating_point():
                biases.append(pairs)
            elif name == "attn_mask":
                masks.append(Mask.dense(~pairs))
            else:
                masks.append(Mask.padding(~pairs[:, 0, 0]))
        mask = masks[0] & masks[1] if len(masks) == 2 else masks[0] if masks else None
        bias = biases[0] + biases[1] if len(biases) == 2 else biases[0] if biases else None
        return mask, bias


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """Encode with torch's parameters and torch's arguments; a ``state_dict`` of torch's loads.

    The constructor is that of ``torch.nn.TransformerEncoderLayer``.

    Numerics: attention as :func:`stabletx.attention`; everything else is torch's.

    >>> layer = TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    >>> layer(torch.zeros(2, 3, 8)).shape
    torch.Size([2, 3, 8])
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        _attend_by_ours(self)

    def forward(
        self,
        src: Tensor,  # (t, b, m), (b, t, m) with batch_first, or (t, m)
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Encode; the arguments are those of :meth:`MultiheadAttention.forward`."""
        masks = src_mask, src_key_padding_mask, is_causal
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), *masks)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, *masks))
        out: Tensor = self.norm2(x + self._ff_block(x))
        return out


class TransformerEncoder(nn.TransformerEncoder):
    """Run a stack of layers, as ``torch.nn.TransformerEncoder`` outside its fast path.

    The constructor is torch's, and takes a layer of torch as well as one of ours. Rows of padding
    are computed like any other, where torch's fast path returns 0 for them, in ``eval`` alone.

    Args:
        encoder_layer: copied for every layer.
        num_layers: how many.
        norm: run last.
        enable_nested_tensor: of no effect.
        mask_check: of no effect.

    >>> layer = TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> padding = torch.tensor([[False, False, True], [True, True, True]])
    >>> model = TransformerEncoder(layer, num_layers=2)
    >>> model(torch.zeros(2, 3, 8), src_key_padding_mask=padding).isfinite().all()
    tensor(True)
    """

    def __init__(
        self,
        encoder_layer: nn.TransformerEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__(encoder_layer, num_layers, norm, False, mask_check)
        for layer in self.layers:
            if type(layer) is nn.TransformerEncoderLayer:
                layer.__class__ = TransformerEncoderLayer
                _attend_by_ours(layer)

    def forward(
        self,
        src: Tensor,  # (t, b, m), (b, t, m) with batch_first, or (t, m)
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Encode; the arguments are those of :meth:`MultiheadAttention.forward`."""
        x = src
        for layer in self.layers:
            x = layer(
                x,
                src_mask=mask,
                src_key_padding_mask=src_key_padding_mask,
                is_causal=bool(is_causal),
            )
        return x if self.norm is None else self.norm(x)


def _attend_by_ours(layer: nn.TransformerEncoderLayer) -> None:
    """Let a layer's own attention compute as ours does, with the parameters that it has."""
    # Another class on the same object: the parameters, and the draws that made them, are torch's.
    layer.self_attn.__class__ = MultiheadAttention
