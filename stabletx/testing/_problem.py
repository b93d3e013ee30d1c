"""An attention problem made ready for float64: garbage out, heads repeated, magnitudes tamed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Above this power of two a tensor is scaled down, so that products of four stay inside float64.
_TAME = 240
# Stands for infinity where infinities would be subtracted from each other.
HUGE = 1e300


@dataclass(frozen=True)
class Problem:
    """Float64 inputs, each times a power of two; finite, with 0 where nothing may look.

    Attributes:
        q: (b, h, t, d), times ``2 ** -powers["q"]``.
        k: (b, h, s, d), one head for each query head.
        v: (b, h, s, e).
        grad_out: (b, h, t, e) or None; 0 in empty rows.
        allowed: (b, h, t, s), True = may attend.
        has_key: (b, h, t), rows that may attend at least one key.
        used: (b, h, s), keys that some query of the head may attend.
        bias: (b, h, t, s), 0 where blocked, or None.
        bias_shape: the shape in which the bias was given.
        sinks: (h,) or None.
        scale: factor on the products.
        softcap: or None.
        n_kv_heads: heads of k and v as given.
        powers: exponent that was taken out of q, k, v and g (grad_out).
        nan_rows: (b, h, t), rows that attend a query, key, bias or sink that is not finite.
        nan_v: (b, h, s, e), values that are not finite and that some query attends.
        nan_g: (b, h, t, e), upstream gradients that are not finite, in rows that have a key.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor | None
    allowed: Tensor
    has_key: Tensor
    used: Tensor
    bias: Tensor | None
    bias_shape: tuple[int, ...]
    sinks: Tensor | None
    scale: float
    softcap: float | None
    n_kv_heads: int
    powers: dict[str, int]
    nan_rows: Tensor
    nan_v: Tensor
    nan_g: Tensor


def times_power(x: Tensor, power: int) -> Tensor:
    """Multiply by ``2 ** power`` in steps that float64 can hold."""
    while power:
        step = max(-1000, min(1000, power))
        x, power = x * 2.0**step, power - step
    return x


def products_of(problem: Problem, q: Tensor, k: Tensor, factor: float) -> Tensor:
    """Compute ``factor * q k^T``, (b, h, t, s), of the problem's size; inf past float64's range.

    A huge query elsewhere must not push the products of ordinary ones below float64's range, so
    each is taken from the inputs as they were given where these allow it.
    """
    eq, ek = problem.powers["q"], problem.powers["k"]
    if not eq + ek:
        return factor * (q @ k.mT)
    plain = factor * (times_power(q, eq) @ times_power(k, ek).mT)
    return torch.where(plain.isfinite(), plain, times_power(factor * (q @ k.mT), eq + ek))


def repeat_heads(x: Tensor, n_heads: int) -> Tensor:
    """Give each query head its key/value head: head ``i`` reads ``i * g // h``."""
    return x if x.shape[1] == n_heads else x.repeat_interleave(n_heads // x.shape[1], 1)


def sum_over_groups(x: Tensor, n_kv_heads: int) -> Tensor:
    """Add up the query heads that read the same key/value head."""
    b, h, *rest = x.shape
    if h == n_kv_heads:
        return x
    return x.reshape(b, n_kv_heads, h // n_kv_heads, *rest).sum(2)


def prepare(
    q: Tensor,  # (b, h, t, d)
    k: Tensor,  # (b, g, s, d)
    v: Tensor,  # (b, g, s, e)
    grad_out: Tensor | None,  # (b, h, t, e)
    *,
    mask: Tensor | None,  # bool, (b, h, t, s), each axis full or 1
    bias: Tensor | None,  # (b, h, t, s), each axis full or 1
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,  # (h,)
) -> Problem:
    """Check the shapes, then remove what no query may see and note what is not finite."""
    _check_shapes(q, k, v, mask)
    h, d = q.shape[1], q.shape[3]
    allowed, full_bias, bad_bias = _pairs(q, k, mask, bias)
    has_key, used = allowed.any(-1), allowed.any(-2)
    q64, bad_q = _clean(_float64(q), has_key)
    k64, bad_k = _clean(repeat_heads(_float64(k), h), used)
    v64, bad_v = _clean(repeat_heads(_float64(v), h), used)
    nan_rows = bad_q.any(-1) | (allowed & (bad_k.any(-1).unsqueeze(-2) | bad_bias)).any(-1)
    own_scale = scale if scale is not None else (d**-0.5 if d else 1.0)
    if not math.isfinite(own_scale):
        nan_rows, own_scale = has_key, 1.0
    own_sinks = None if sinks is None else _float64(sinks)
    if own_sinks is not None:
        bad_sinks = own_sinks.isnan() | own_sinks.isposinf()
        nan_rows = nan_rows | (bad_sinks[None, :, None] & has_key)
        own_sinks = own_sinks.masked_fill(bad_sinks, 0.0)
    nan_g = torch.zeros(*has_key.shape, v.shape[3], dtype=torch.bool)
    g64 = None
    if grad_out is not None:
        g64, nan_g = _clean(_float64(grad_out), has_key)
    powers = {name: _excess(x) for name, x in (("q", q64), ("k", k64), ("v", v64), ("g", g64))}
    return Problem(
        q=times_power(q64, -powers["q"]),
        k=times_power(k64, -powers["k"]),
        v=times_power(v64, -powers["v"]),
        grad_out=None if g64 is None else times_power(g64, -powers["g"]),
        allowed=allowed,
        has_key=has_key,
        used=used,
        bias=full_bias,
        bias_shape=() if bias is None else tuple(bias.shape),
        sinks=own_sinks,
        scale=own_scale,
        softcap=softcap,
        n_kv_heads=k.shape[1],
        powers=powers,
        nan_rows=nan_rows,
        nan_v=bad_v,
        nan_g=nan_g,
    )


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(
                f"{name} must have 4 axes (batch, head, position, width), "
                f"got {name}=a tensor of shape {tuple(x.shape)}."
            )
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "q, k and v must have shapes (b, h, t, d), (b, g, s, d) and (b, g, s, e), "
            f"got q={tuple(q.shape)}, k={tuple(k.shape)} and v={tuple(v.shape)}."
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k.shape[1] must divide q.shape[1], got k.shape[1]={k.shape[1]} "
            f"and q.shape[1]={q.shape[1]}."
        )
    if mask is not None and (mask.dtype != torch.bool or mask.ndim != 4):
        raise TypeError(
            "mask must be a bool tensor of 4 axes (True = may attend), "
            f"got mask={mask.dtype} of shape {tuple(mask.shape)}. A float mask is a bias: bias=."
        )


def _float64(x: Tensor) -> Tensor:
    return x.detach().cpu().double()


def _pairs(
    q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the allowed pairs, the bias with 0 where blocked, and where the bias is NaN or inf."""
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    allowed = torch.ones(shape, dtype=torch.bool)
    if mask is not None:
        allowed = mask.detach().cpu().expand(shape)
    if bias is None:
        return allowed, None, torch.zeros((), dtype=torch.bool)
    full = _float64(bias).expand(shape)
    allowed = allowed & ~full.isneginf()
    return allowed, torch.where(allowed & full.isfinite(), full, 0.0), ~full.isfinite()


def _clean(x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Put 0 where nothing looks and where x is not finite; say where the latter was seen."""
    finite, seen = x.isfinite(), seen.unsqueeze(-1)
    return torch.where(seen & finite, x, 0.0), seen & ~finite


def _excess(x: Tensor | None) -> int:
    """Return the power of two to take out, 0 for ordinary magnitudes."""
    largest = float(x.abs().max()) if x is not None and x.numel() else 0.0
    return max(0, math.frexp(largest)[1] - _TAME)
