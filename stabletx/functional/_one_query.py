"""Attention of one new token to all before it, as decoding asks for it at every step.

It is :func:`stabletx.attention` with one query a row. There the guards read every key at every
step; here whoever keeps the keys has looked at each of them once, and hands on what it saw.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stabletx import _checks
from stabletx._precision import compute_dtype
from stabletx.functional._guards import LARGEST_ENTRY, LARGEST_SCORE
from stabletx.functional._sight import values_may_be_read
from stabletx.masks import Mask


def attend_one_query(
    q: Tensor,  # (b, h, 1, d)
    k: Tensor,  # (b, g, s, d)
    v: Tensor,  # (b, g, s, d)
    *,
    mask: Mask | None,
    scale: float | None,
    longest_key: float,
    longest_value: float,
) -> Tensor | None:  # (b, h, 1, d)
    """Attend through torch's kernel; None where only :func:`stabletx.attention` keeps the contract.

    Expects shapes that fit and no gradient. ``longest_key`` and ``longest_value`` are the largest
    norm of any key and of any value, blocked or not; inf where one is not finite.
    """
    if q.device.type != "cpu" or not values_may_be_read(q) or 0 in q.shape:
        return None
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if not is_safe(longest_rows(q[None])[0], longest_key, longest_value, scale):
        return None
    added, dtype = None, q.dtype
    work = compute_dtype(dtype)
    if mask is not None:
        b, h, s = q.shape[0], q.shape[1], k.shape[2]
        _checks.check_mask_fits(mask.sizes(), (b, h, 1, s), mask.devices(), q.device)
        band = mask.band(1, s)
        first, last = (0, s) if band is None else band.keys_of(0, 0, s)
        k, v = k[:, :, first:last], v[:, :, first:last]
        if band is None or band.keep is not None:
            cols = torch.arange(first, last, device=q.device)
            seen = mask.tile(cols.new_zeros(1), cols, 1, s)
            if not bool(seen.any(-1).all()):
                return None  # an empty row
            added = torch.zeros(seen.shape, dtype=work, device=q.device).masked_fill_(
                ~seen, -torch.inf
            )
            added = added.expand(b, h, 1, last - first)
        elif first >= last:
            return None
    q, k, v = (x if x.dtype == work else x.to(work) for x in (q, k, v))
    return attend_unguarded(q, k, v, added=added, scale=scale).to(dtype)


def attend_unguarded(
    q: Tensor,  # (b, h, 1, d)
    k: Tensor,  # (b, g, s, d)
    v: Tensor,  # (b, g, s, d)
    *,
    added: Tensor | None,  # (b, h, 1, s), to the scores
    scale: float,
) -> Tensor:  # (b, h, 1, d)
    """Attend through torch's kernel, which is right where :func:`is_safe`."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out: Tensor = kernel(q, k, v, 0.0, False, attn_mask=added, scale=scale)[0]
    return out


def is_safe(longest_query: float, longest_key: float, longest_value: float, scale: float) -> bool:
    """Tell from the largest norms, inf where one is not finite, whether the kernel is right."""
    if not longest_query * longest_key * abs(scale) <= LARGEST_SCORE:
        return False
    return max(longest_query, longest_key, longest_value) <= LARGEST_ENTRY


def longest_rows(x: Tensor) -> list[float]:  # (n, ...) of rows (..., d) -> n
    """Give the largest norm of a row in each part of ``x``; inf where one is not finite."""
    norms = torch.linalg.vector_norm(x, dim=-1, dtype=compute_dtype(x.dtype))
    return [finite_or_inf(x) for x in norms.flatten(1).amax(1).tolist()]


def finite_or_inf(x: float) -> float:
    """Give inf for NaN, which ``max`` would lose."""
    return x if x < torch.inf else torch.inf
