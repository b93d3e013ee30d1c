"""Causes that show in the result itself: what is not finite, where it stands, by which factor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stabletx.testing._mistakes import Call, in_groups
from stabletx.testing.assertions import occupancies
from stabletx.testing.reference import reference_attention

Found = tuple[str, str, bool] | None


def symptom(call: Call, of: str, actual: Tensor, exact: Tensor, bound: Tensor) -> Found:
    """Name a cause that the places of the errors give away."""
    beyond = occupancies(bound, actual, exact) > 1
    swallowed = beyond & exact.isnan() & actual.isfinite()
    if bool(swallowed.any()):
        return "nan_swallowed", "a NaN that a query attends is swallowed into a number", True
    lost = beyond & ~actual.isfinite() & exact.isfinite()
    empty = _empty_places(call, of, exact)
    if empty is not None and bool(beyond.any()) and not bool((beyond & ~empty).any()):
        return _in_empty_rows(call, of, actual, beyond, bool(lost.any()))
    if bool(lost.any()):
        return _not_finite(call, of, empty, lost)
    return None


def _empty_places(call: Call, of: str, exact: Tensor) -> Tensor | None:
    """Mark the places whose query has no key or, for dk and dv, whose key has no query."""
    pairs = call.pairs
    if of in ("out", "dq"):
        return ~pairs.any(-1).unsqueeze(-1).expand(exact.shape)
    if of in ("dk", "dv"):
        g = call.k.shape[1]
        seen = in_groups(pairs.any(2), g).any(2)
        return ~seen.unsqueeze(-1).expand(exact.shape)
    return None


def _in_empty_rows(call: Call, of: str, actual: Tensor, beyond: Tensor, not_finite: bool) -> Found:
    if of in ("dk", "dv"):
        return "dead_key_gradient", "a key that no query may attend gets a gradient", True
    if not_finite:
        sentence = "rows without a key are NaN: a softmax over nothing is 0/0; they should be 0"
        return "empty_rows_nan", sentence, True
    if of == "out":
        v = call.v.double()[:, torch.arange(call.q.shape[1]) * call.k.shape[1] // call.q.shape[1]]
        mean = v.mean(2, keepdim=True).expand(actual.shape)
        room = 16 * torch.finfo(actual.dtype).eps * v.abs().amax(2, keepdim=True)
        near = (actual.double() - mean).abs() <= room + 0.01 * mean.abs()
        if bool((near | ~beyond).all()):
            sentence = (
                "rows without a key hold the mean of the values: blocked scores are a large "
                "finite number, not left out; they should be 0"
            )
            return "empty_rows_mean", sentence, True
    return "empty_rows_not_zero", "rows without a key are not 0", True


def _not_finite(call: Call, of: str, empty: Tensor | None, lost: Tensor) -> Found:
    if _holds_garbage(call):
        sentence = "garbage at a key that no query may attend leaks: 0 * NaN is NaN, sanitise it"
        return "garbage_leak", sentence, True
    inputs = (call.q, call.k, call.v, call.grad_out)
    if not all(bool(x.isfinite().all()) for x in inputs if x is not None):
        sentence = "a NaN or inf reaches rows that do not attend it"
        return "nan_spreads", sentence, True
    products = call.q.double().abs().amax((2, 3)).max() * call.k.double().abs().amax((2, 3)).max()
    scores = _largest_score(call)
    largest = torch.finfo(call.q.dtype).max
    if scores > largest:
        sentence = f"scores up to {scores:.3g} leave the range of {call.q.dtype}"
        return "score_overflow", sentence, True
    if float(call.v.double().abs().max()) * call.k.shape[2] > largest:
        sentence = "a sum of values that is not divided yet leaves the range of its dtype"
        return "value_overflow", sentence, True
    if scores > math.log(torch.finfo(torch.promote_types(call.q.dtype, torch.float32)).max):
        sentence = "the exponential overflows: the row's maximum is not subtracted first"
        return "no_max_subtraction", sentence, False
    if empty is not None and bool((lost & empty).any()):
        sentence = "rows without a key are NaN and spread it to others"
        return "empty_rows_nan", sentence, False
    size = float(products)
    return "not_finite", f"a step overflows; the largest product is about {size:.3g}", False


def _holds_garbage(call: Call) -> bool:
    """Tell whether keys or values that no query may attend hold NaN, inf or something huge."""
    g = call.k.shape[1]
    unseen = ~in_groups(call.pairs.any(2), g).any(2)
    stuff = torch.cat([call.k[unseen].flatten(), call.v[unseen].flatten()]).double()
    return bool((~stuff.isfinite() | (stuff.abs() > 1e4)).any())


def _largest_score(call: Call) -> float:
    """Return the largest product of a query and a key, before the scale."""
    h, g = call.q.shape[1], call.k.shape[1]
    k = call.k.double()[:, torch.arange(h) * g // h]
    scores = (call.q.double() @ k.mT).abs()
    return float(torch.where(call.pairs, scores, 0.0).max()) if scores.numel() else 0.0


def factor_between(actual: Tensor, exact: Tensor, bound: Tensor) -> Found:
    """Find one factor between the two that explains every place."""
    finite = actual.isfinite() & exact.isfinite()
    a, e = actual.double()[finite], exact[finite]
    if not e.numel() or float(e.square().sum()) == 0:
        return None
    factor = float((a * e).sum() / e.square().sum())
    room = (1 + abs(factor)) * bound[finite]
    if factor == 0 or bool(((a - factor * e).abs() > room).any()):
        return None
    return "constant_factor", f"the result is {factor:.6g} times what it should be", True


def scale_between(call: Call, of: str, actual: Tensor, bound: Tensor) -> Found:
    """Find another scale that explains every place, by Gauss-Newton steps."""
    own = call.scale if call.scale is not None else max(call.q.shape[3], 1) ** -0.5
    scale, step = own, 1e-6
    for _ in range(6):
        here = call._replace(scale=scale).result(of)
        there = call._replace(scale=scale * (1 + step)).result(of)
        if here is None or there is None:
            return None
        slope = ((there - here) / step).nan_to_num()
        gap = (actual.double() - here).nan_to_num(posinf=0.0, neginf=0.0)
        weight = float(slope.square().sum())
        if weight == 0:
            return None
        scale *= 1 + max(-0.5, min(1.0, float((slope * gap).sum()) / weight))
    found = call._replace(scale=scale).result(of)
    if found is None or not bool((occupancies(2 * bound, actual, found) <= 1).all()):
        return None
    sentence = f"the scale is {scale:.7g}, {scale / own:.6g} times what it should be"
    return "scale_off", sentence, True


def recovered_dropout(call: Call, of: str, actual: Tensor) -> Found:
    """Solve for the weights where the values allow it, and see whether some are dropped."""
    h, s, e = call.q.shape[1], call.k.shape[2], call.v.shape[3]
    if of != "out" or s > e or s < 4 or not bool(actual.isfinite().all()):
        return None
    if not bool(call.v.isfinite().all()):
        return None
    reference = reference_attention(
        call.q, call.k, call.v, mask=call.mask, bias=call.bias, scale=call.scale,
        softcap=call.softcap, sinks=call.sinks,
    )  # fmt: skip
    v = call.v.double()[:, torch.arange(h) * call.k.shape[1] // h]
    weights = actual.double() @ torch.linalg.pinv(v)
    seen = reference.weights > 1e-3
    ratio = (weights / reference.weights.clamp(min=1e-3))[seen]
    kept = ratio[ratio.abs() > 0.5]
    if not kept.numel() or kept.numel() == ratio.numel():
        return None
    factor = float(kept.median())
    regular = ((ratio - factor).abs() < 0.05 * factor) | (ratio.abs() < 0.05)
    if factor <= 1.0 or float(regular.double().mean()) < 0.95:
        return None
    share = 1.0 - 1.0 / factor
    sentence = f"dropout is on: about {share:.0%} of the weights are dropped, the rest scaled up"
    return "dropout", sentence, True
