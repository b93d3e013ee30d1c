"""Limits that hold for every kernel, whatever it does to the scores."""

from __future__ import annotations

import torch
from torch import Tensor

from stabletx.testing.cases import AttentionCase
from stabletx.testing.reference import Reference
from stabletx.testing.rounding import Profile, gamma, smallest_subnormal, unit_roundoff


def row_sum_error(case: AttentionCase, profile: Profile | None) -> float:
    """Bound by how much the weights of a row, as used in a product, may miss the sum 1.

    The exponentials stand in the numerator and in the denominator alike, so their own errors
    cancel: what is left are the roundings of two sums and of the rescaling of a running maximum.
    """
    stated = profile or Profile()
    u = unit_roundoff(stated.accumulate or stated.compute_dtype(case.q.dtype))
    blocks = -(-max(1, case.shape.s) // stated.block)
    error = gamma(2 * case.shape.s + 4 * blocks + 8, u)
    if stated.weights is not None:
        error += 2 * unit_roundoff(stated.weights)
    if stated.recompute_from_lse:
        largest = case.reference().max_score
        error += u * (2 * float(largest[largest.isfinite()].abs().amax()) + 40.0)
    return error


def ones_limit(case: AttentionCase, profile: Profile | None) -> Tensor:
    """Bound the distance of the output from 1 where every value is 1."""
    dtype = case.q.dtype
    return torch.tensor(row_sum_error(case, profile) + 2 * unit_roundoff(dtype)).double()


def value_gradient_limit(
    case: AttentionCase, dv: Tensor, live: Tensor, profile: Profile | None
) -> Tensor:  # (b, g, e)
    """Bound the distance of the sum of dv over the keys from the sum of the upstream gradients.

    Args:
        case: with ``grad_out``.
        dv: as computed; each element was rounded once.
        live: (b, h, t, e) upstream gradients of the rows that have a key, float64.
        profile: what the kernel states about itself.
    """
    z = case.shape
    stated = profile or Profile()
    u = unit_roundoff(stated.accumulate or stated.compute_dtype(case.q.dtype))
    size = live.abs().reshape(z.b, z.g, z.h // z.g, z.t, z.e).sum((2, 3))
    added = gamma(z.t * (z.h // z.g) + 2, u)
    stored = unit_roundoff(dv.dtype) * dv.double().abs().sum(2)
    grain = (z.s + 2) * (smallest_subnormal(dv.dtype) + smallest_subnormal(torch.float32))
    return size * (row_sum_error(case, profile) + added) * (1 + added) + stored + grain


def lse_limit(
    case: AttentionCase, exact: Reference, lse: Tensor, profile: Profile | None
) -> Tensor:  # (b, h, t)
    """Bound the error of a logsumexp: the largest error of a score, the sum, one rounding."""
    z = case.shape
    stated = profile or Profile()
    compute = stated.compute_dtype(case.q.dtype)
    u = unit_roundoff(compute)
    scale = case.scale if case.scale is not None else float(max(z.d, 1)) ** -0.5
    k = case.k.double().cpu().repeat_interleave(z.h // z.g, 1)
    sizes = abs(scale) * torch.einsum("bhtd,bhsd->bhts", case.q.double().cpu().abs(), k.abs())
    largest = sizes.amax(-1) if z.s else torch.zeros(z.b, z.h, z.t).double()
    score = gamma(z.d + 3, u) * largest + 3 * u * exact.max_score.abs()
    if stated.scores is not None:
        score = score + unit_roundoff(stated.scores) * exact.max_score.abs()
    total = gamma(z.s + 3 + 2 * stated.exp_ulps, u) + 2 * unit_roundoff(lse.dtype)
    return (2 * score + total * (1 + exact.lse.abs())).nan_to_num(posinf=torch.inf)
