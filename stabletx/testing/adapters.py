"""Small functions that give an attention of another style the signature that the laws call.

The laws call ``fn(q, k, v, *, mask=None, scale=None)`` with q (b, h, t, d), k (b, g, s, d),
v (b, g, s, e) and a bool mask (b or 1, h or 1, t, s), True = may attend. Where none of these
adapters fits, write your own: a function of three lines will do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Adapted:
    """An attention with the signature of the laws.

    Attributes:
        call: the adapted function.
        name: shown in reports.
        supports: what it offers beside mask and scale.
        lacks: what it does not offer.
        known_as: the ready name that gives it again, or "".
    """

    call: Callable[..., object]
    name: str = "attention"
    supports: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    known_as: str = ""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> object:
        """Attend."""
        return self.call(q, k, v, **options)


def sdpa_style(fn: Callable[..., Any], name: str = "") -> Adapted:
    """Adapt a function with the signature of ``F.scaled_dot_product_attention``.

    Args:
        fn: called as ``fn(q, k, v, attn_mask=..., scale=..., enable_gqa=...)``; a bool mask has
            True = may attend, a float mask is added to the scores.
        name: shown in reports.

    Returns:
        An attention that the laws can ask, with a bias as the float mask.

    >>> import torch.nn.functional as F
    >>> sdpa_style(F.scaled_dot_product_attention).name
    'scaled_dot_product_attention'
    """

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        scale: float | None = None,
    ) -> Any:
        options: dict[str, Any] = {"attn_mask": joined_mask(mask, bias)}
        if scale is not None:
            options["scale"] = scale
        if q.shape[1] != k.shape[1]:
            options["enable_gqa"] = True
        return fn(q, k, v, **options)

    return Adapted(call, name or getattr(fn, "__name__", "attention"), ("bias",))


def joined_mask(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Put mask and bias into the one argument that SDPA has for both."""
    if bias is None:
        return mask
    return bias if mask is None else bias.masked_fill(~mask, -torch.inf)


def mha(
    module: Callable[..., nn.MultiheadAttention] = nn.MultiheadAttention,
    *,
    need_weights: bool = True,
    name: str = "",
) -> Adapted:
    """Adapt ``nn.MultiheadAttention``, or a class like it, with its projections made identities.

    Args:
        module: called as ``module(width, heads, bias=False, batch_first=True)``.
        need_weights: which of the module's two paths to ask.
        name: shown in reports.

    Returns:
        An attention that the laws can ask. The module's mask says True = may *not* attend; the
        adapter turns it round. It has no scale and no grouped heads.
    """

    def call(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
        b, h, t, d = q.shape
        s = k.shape[2]
        layer = module(h * d, h, bias=False, batch_first=True).to(q.device, q.dtype)
        eye = torch.eye(h * d, dtype=q.dtype, device=q.device)
        with torch.no_grad():
            layer.in_proj_weight.copy_(torch.cat([eye, eye, eye]))
            layer.out_proj.weight.copy_(eye)
        layer.requires_grad_(False)
        merged = (x.transpose(1, 2).reshape(b, x.shape[2], h * d) for x in (q, k, v))
        blocked = None
        if mask is not None:
            blocked = ~mask.expand(b, h, t, s).reshape(b * h, t, s)
        out: Tensor = layer(*merged, attn_mask=blocked, need_weights=need_weights)[0]
        return out.reshape(b, t, h, d).transpose(1, 2)

    return Adapted(call, name or "MultiheadAttention", (), ("scale", "grouped", "value-dim"))


class _Config:
    """The little of a configuration that Hugging Face's functions look at."""

    _attn_implementation = "eager"


class _Holder(nn.Module):
    """The little of a module that Hugging Face's functions look at."""

    def __init__(self, groups: int, scale: float) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.scaling = scale
        self.is_causal = False
        self.config = _Config()


def huggingface(fn: Callable[..., Any], *, additive: bool = False, name: str = "") -> Adapted:
    """Adapt an attention function of transformers.

    Args:
        fn: called as ``fn(module, query, key, value, attention_mask, scaling=..., dropout=0.0)``;
            returns ``(out, weights)`` with out (b, t, h, e).
        additive: hand over a float mask with the dtype's lowest value, as eager attention wants,
            in place of a bool mask.
        name: shown in reports.

    Returns:
        An attention that the laws can ask.
    """

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        own = scale if scale is not None else q.shape[3] ** -0.5
        holder = _Holder(q.shape[1] // k.shape[1], own)
        given = mask
        if mask is not None:
            given = mask.expand(q.shape[0], -1, -1, -1)
            if additive:
                zeros = torch.zeros(given.shape, dtype=q.dtype, device=q.device)
                given = zeros.masked_fill(~given, torch.finfo(q.dtype).min)
        out: Tensor = fn(holder, q, k, v, given, scaling=own, dropout=0.0)[0]
        return out.transpose(1, 2)

    return Adapted(call, name or getattr(fn, "__name__", "attention"))


def arrays(
    fn: Callable[..., Any], *, to: Callable[[Any], Any] | None = None, name: str = ""
) -> Adapted:
    """Adapt a function on arrays of NumPy's kind: ``fn(q, k, v, mask, scale) -> array``.

    Args:
        fn: gets arrays, a bool array or None, and the scale as a number.
        to: makes an array of a NumPy array, such as ``jax.numpy.asarray``; None leaves it.
        name: shown in reports.

    Returns:
        An attention without a gradient; bfloat16, which NumPy does not have, is refused.
    """
    import numpy as np

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        if q.dtype == torch.bfloat16:
            raise NotImplementedError("NumPy has no bfloat16")
        own = scale if scale is not None else max(1, q.shape[3]) ** -0.5
        inputs = [x.detach().cpu().numpy() for x in (q, k, v)]
        allowed = None if mask is None else mask.cpu().numpy()
        if to is not None:
            inputs = [to(x) for x in inputs]
            allowed = None if allowed is None else to(allowed)
        out = np.array(fn(*inputs, allowed, own))
        return torch.from_numpy(out).to(q.device)

    return Adapted(call, name or getattr(fn, "__name__", "attention"), (), ("gradient",))


READY: dict[str, Callable[..., Adapted]] = {
    "sdpa": sdpa_style,
    "mha": mha,
    "huggingface": huggingface,
    "arrays": arrays,
}


def adapt(
    fn: Callable[..., Any], adapter: str | Callable[[Any], Callable[..., object]]
) -> Callable[..., object]:
    """Apply an adapter, given itself or by its ready name.

    Raises:
        ValueError: an unknown name.
    """
    if callable(adapter):
        return adapter(fn)
    if adapter not in READY:
        listed = ", ".join(repr(name) for name in READY)
        raise ValueError(f"adapter must be a function or one of {listed}, got adapter={adapter!r}.")
    return READY[adapter](fn)
