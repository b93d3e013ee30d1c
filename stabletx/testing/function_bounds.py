"""How far rounding can move softmax, norms, rotary, cross-entropy and matrix products.

Each bound assumes what a careful implementation does: compute in float32 at least, subtract the
maximum, centre twice, round once at the end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stabletx.testing._units import Units
from stabletx.testing.rounding import Mode, Profile, smallest_subnormal

_LARGE = 60.0
_NOTHING = 1e-30


class _Row(NamedTuple):
    """A softmax row along the last axis, with the errors of its parts."""

    shifted: Tensor  # (..., n), x - max, -inf where blocked
    p: Tensor  # (..., n)
    t: Tensor  # (..., n), relative error of each exponential
    row_max: Tensor  # (..., 1)
    log_sum: Tensor  # (..., 1)
    log_error: Tensor  # (..., 1), of the logarithm of the sum
    lost: Tensor  # (..., 1), relative error of the sum


def softmax_error_bound(
    x: Tensor,
    dim: int = -1,
    *,
    allowed: Tensor | None = None,
    profile: Profile | None = None,
    mode: Mode = "deterministic",
) -> Tensor:
    """Bound the rounding error of a softmax along ``dim``.

    Args:
        x: scores.
        dim: axis to normalise over.
        allowed: bool, broadcastable to x; blocked entries are exactly 0 and have bound 0.
        profile: what the implementation states; None = computes in float32 at least.
        mode: how sums grow.

    Returns:
        Absolute bounds, float64, shaped as x.

    Source: Blanchard, Higham & Higham (2021), theorem 4.2, with the shift kept.

    >>> bool(softmax_error_bound(torch.zeros(2)).max() < 1e-6)
    True
    """
    units = Units.of(x.dtype, profile or Profile(), mode)
    row = _row(x, dim, allowed, units)
    gain = (1 + row.lost) * (1 + 2 * units.u)
    error = (row.p * ((1 + row.t) * gain - 1)).clamp(max=1.0)
    low = (row.shifted.exp() < 4 * units.tiny) & ~row.shifted.isneginf()
    error = error + torch.where(low, row.p.clamp(max=4 * units.tiny) + 2 * units.grain, 0.0)
    bound = torch.where(row.shifted.isneginf(), 0.0, _stored(error, row.p, units))
    return bound.movedim(-1, dim)


def log_softmax_error_bound(
    x: Tensor,
    dim: int = -1,
    *,
    allowed: Tensor | None = None,
    profile: Profile | None = None,
    mode: Mode = "deterministic",
) -> Tensor:
    """Bound the rounding error of a log-softmax; arguments as in :func:`softmax_error_bound`.

    >>> bool(log_softmax_error_bound(torch.zeros(2)).max() < 1e-6)
    True
    """
    units = Units.of(x.dtype, profile or Profile(), mode)
    row = _row(x, dim, allowed, units)
    shifted = torch.where(row.shifted.isneginf(), 0.0, row.shifted)
    exact = shifted - row.log_sum
    error = units.u * shifted.abs() + row.log_error + 2 * units.u * exact.abs()
    bound = torch.where(row.shifted.isneginf(), 0.0, _stored(error, exact, units))
    return bound.movedim(-1, dim)


def logsumexp_error_bound(
    x: Tensor,
    dim: int = -1,
    *,
    allowed: Tensor | None = None,
    profile: Profile | None = None,
    mode: Mode = "deterministic",
) -> Tensor:
    """Bound the rounding error of a logsumexp; arguments as in :func:`softmax_error_bound`.

    Returns:
        Absolute bounds without the axis; 0 where nothing is allowed.

    >>> bool(logsumexp_error_bound(torch.zeros(2)) < 1e-6)
    True
    """
    units = Units.of(x.dtype, profile or Profile(), mode)
    row = _row(x, dim, allowed, units)
    exact = row.row_max + row.log_sum.nan_to_num(neginf=0.0)
    bound = _stored(row.log_error + 2 * units.u * exact.abs(), exact, units)
    return torch.where(row.log_sum.isneginf(), 0.0, bound).squeeze(-1)


def layer_norm_error_bound(
    x: Tensor,  # (..., m)
    weight: Tensor | None = None,  # (m,)
    bias: Tensor | None = None,  # (m,)
    *,
    eps: float = 1e-5,
    centred_twice: bool = True,
    profile: Profile | None = None,
    mode: Mode = "deterministic",
) -> Tensor:
    """Bound the rounding error of a layer norm over the last axis.

    Args:
        x: input.
        weight: factor, or None.
        bias: summand, or None.
        eps: added to the variance.
        centred_twice: the mean is subtracted a second time, which takes out what the first left.
            Without it an offset of the input costs its whole size in ulps.
        profile: what the implementation states.
        mode: how sums grow.

    Returns:
        Absolute bounds, float64, shaped as x.

    Source: Higham (2002), section 1.9, on two-pass variances.

    >>> bool(layer_norm_error_bound(torch.tensor([1.0, -1.0])).max() < 1e-5)
    True
    """
    units = Units.of(x.dtype, profile or Profile(), mode)
    wide, n = _f64(x), max(1, x.shape[-1])
    mean = wide.mean(-1, keepdim=True)
    centred = wide - mean
    off = (units.dot(n) + units.u) * wide.abs().mean(-1, keepdim=True)
    size = centred.abs()
    error = units.u * (size + off) + off
    if centred_twice:
        left = (size + off).mean(-1, keepdim=True)
        error = 3 * units.u * (size + off) + (units.dot(n) + units.u) * left
    variance = centred.square().mean(-1, keepdim=True)
    moved = (2 * size * error + error.square()).mean(-1, keepdim=True)
    relative = moved / (variance + eps) + units.dot(n) + units.steps(5)
    rstd = (variance + eps).rsqrt()
    lost = (1 - relative).clamp(min=_NOTHING).rsqrt() * (1 + 3 * units.u) - 1
    # However wrong the variance, a normalised entry is at most sqrt(n).
    out = (rstd * (error * (1 + lost) + size * lost)).clamp(max=2 * n**0.5)
    return _affine(out, centred * rstd, weight, bias, units)


def rms_norm_error_bound(
    x: Tensor,  # (..., m)
    weight: Tensor | None = None,  # (m,)
    *,
    eps: float = 1e-6,
    profile: Profile | None = None,
    mode: Mode = "deterministic",
) -> Tensor:
    """Bound the rounding error of an RMS norm over the last axis.

    Args:
        x: input.
        weight: factor, or None.
        eps: added to the mean square.
        profile: what the implementation states.
        mode: how sums grow.

    Returns:
        Absolute bounds, float64, shaped as x.

    Source: Zhang & Sennrich (2019); Higham (2002), section 3.1.

    >>> bool(rms_norm_error_bound(torch.tensor([1.0, -1.0])).max() < 1e-5)
    True
    """
    units = Units.of(x.dtype, profile or Profile(), mode)
    wide, n = _f64(x), max(1, x.shape[-1])
    largest = wide.abs().amax(-1, keepdim=True).clamp(min=1.0) if x.shape[-1] else wide
    small = wide / largest
    exact = small * (small.square().mean(-1, keepdim=True) + eps / largest.square()).rsqrt()
    relative = units.dot(n) + units.steps(5)
    lost = (1 - min(relative, 1 - _NOTHING)) ** -0.5 * (1 + 3 * units.u) - 1
    return _affine(exact.abs() * lost, exact, weight, None, units)


def rotate_error_bound(
    x: Tensor,  # (..., d)
    cos: Tensor,  # (..., r / 2)
    sin: Tensor,  # (..., r / 2)
    *,
    interleaved: bool = False,
    profile: Profile | None = None,
) -> Tensor:
    """Bound the rounding error of a rotary embedding whose tables are taken as they are.

    Args:
        x: input; entries past the width of the tables pass unchanged, with bound 0.
        cos: cosines, broadcastable to x but for the last axis.
        sin: sines.
        interleaved: pairs are neighbours; otherwise halves.
        profile: what the implementation states.

    Returns:
        Absolute bounds, float64, shaped as x.

    Source: Su et al. (2021), equation 34; two products and a sum an entry.

    >>> bool(rotate_error_bound(torch.ones(2), torch.ones(1), torch.zeros(1)).max() < 1e-6)
    True
    """
    units = Units.of(x.dtype, profile or Profile(), "deterministic")
    half = cos.shape[-1]
    turned, rest = _f64(x)[..., : 2 * half], _f64(x)[..., 2 * half :]
    first, second = turned[..., :half], turned[..., half:]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    c, s = _f64(cos), _f64(sin)
    exact = (first * c - second * s, second * c + first * s)
    sizes = (
        first.abs() * c.abs() + second.abs() * s.abs(),
        second.abs() * c.abs() + first.abs() * s.abs(),
    )
    bounds = [
        _stored(units.steps(3) * size + 3 * units.grain, y, units)
        for size, y in zip(sizes, exact, strict=True)
    ]
    joined = torch.stack(bounds, -1).flatten(-2) if interleaved else torch.cat(bounds, -1)
    return torch.cat([joined, torch.zeros_like(rest)], -1)


def cross_entropy_error_bound(
    logits: Tensor,  # (..., c)
    labels: Tensor,  # (...)
    *,
    ignore_label: int = -100,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,  # (c,)
    z_loss: float = 0.0,
    reduction: str = "mean",
    profile: Profile | None = None,
) -> Tensor:
    """Bound the rounding error of a cross-entropy.

    Args:
        logits: unnormalised scores.
        labels: classes; rows with ``ignore_label`` have bound 0.
        ignore_label: marks rows that do not count.
        label_smoothing: share of the target that is spread over all classes.
        class_weights: factor of each class, or None.
        z_loss: factor of the squared logsumexp.
        reduction: "mean" (over the weights of the rows that count), "sum" or "none".
        profile: what the implementation states.

    Returns:
        Absolute bounds, float64: a number, or shaped as labels.

    Source: Higham (2002), section 3.1, on the sums; Blanchard, Higham & Higham (2021).

    >>> bool(cross_entropy_error_bound(torch.zeros(1, 2), torch.tensor([0])) < 1e-5)
    True
    """
    units = Units.of(logits.dtype, profile or Profile(), "deterministic")
    counts = labels != ignore_label
    label = torch.where(counts, labels, 0).cpu()
    row = _row(logits, -1, None, units)
    shifted = row.shifted.clamp(min=-1e300)
    log_p = shifted - row.log_sum
    error_p = units.u * shifted.abs() + row.log_error + 2 * units.u * log_p.abs()
    weights = torch.ones(logits.shape[-1]).double()
    if class_weights is not None:
        weights = _f64(class_weights).abs()
    hard, n = 1.0 - label_smoothing, logits.shape[-1]
    own = weights[label]

    def at_label(x: Tensor) -> Tensor:
        return x.gather(-1, label.unsqueeze(-1)).squeeze(-1)

    size, error = hard * own * at_label(log_p.abs()), hard * own * at_label(error_p)
    if label_smoothing:
        soft = label_smoothing / n
        size = size + soft * (weights * log_p.abs()).sum(-1)
        error = error + soft * (weights * error_p).sum(-1)
    error = error + units.dot(n if label_smoothing else 1) * (size + error) + units.steps(4) * size
    lse, lse_error = (row.row_max + row.log_sum).squeeze(-1), row.log_error.squeeze(-1)
    lse_error = lse_error + 2 * units.u * lse.abs()
    size = size + z_loss * lse.square()
    error = error + z_loss * (2 * lse.abs() * lse_error + lse_error.square())
    error = error + units.steps(4) * size
    counts = counts.cpu()
    size, error = torch.where(counts, size, 0.0), torch.where(counts, error, 0.0)
    if reduction == "none":
        return torch.where(counts, _stored(error, size, units), 0.0)
    total = error.sum() + units.dot(max(1, size.numel())) * (size.sum() + error.sum())
    divisor = torch.ones(()).double()
    if reduction == "mean":
        divisor = torch.where(counts, own, 0.0).sum()
        total = total + (units.dot(max(1, size.numel())) + 2 * units.u) * size.sum()
    safe = torch.where(divisor == 0, 1.0, divisor)
    return torch.where(counts.any(), _stored(total / safe, size.sum() / safe, units), 0.0)


def matmul_error_bound(
    a: Tensor,  # (..., n, k)
    b: Tensor,  # (..., k, m)
    bias: Tensor | None = None,
    *,
    profile: Profile | None = None,
    mode: Mode = "deterministic",
) -> Tensor:
    """Bound the rounding error of ``a @ b + bias``; a linear layer is ``x @ weight.mT + bias``.

    Args:
        a: left factor.
        b: right factor.
        bias: summand, broadcastable to the product.
        profile: what the implementation states.
        mode: how sums grow.

    Returns:
        Absolute bounds, float64.

    Source: Higham (2002), equation 3.13.

    >>> bool(matmul_error_bound(torch.ones(1, 2), torch.ones(2, 1)) < 1e-6)
    True
    """
    units = Units.of(a.dtype, profile or Profile(), mode)
    n = a.shape[-1]
    left, right = _f64(a), _f64(b)
    size, exact = left.abs() @ right.abs(), left @ right
    if bias is not None:
        size, exact = size + _f64(bias).abs(), exact + _f64(bias)
    return _stored(units.dot(n + 1) * size + n * units.grain, exact, units)


def _f64(x: Tensor) -> Tensor:
    return x.detach().cpu().double()


def _stored(error: Tensor, exact: Tensor, units: Units) -> Tensor:
    """Add the rounding to the output's dtype; past its range anything may happen."""
    grain = smallest_subnormal(units.out_dtype)
    bound = error + units.out * (exact.abs() + error) + grain
    return torch.where(exact.abs() > torch.finfo(units.out_dtype).max, torch.inf, bound)


def _affine(
    error: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, units: Units
) -> Tensor:
    """Take an error through ``y * weight + bias`` and the final rounding."""
    if weight is not None:
        factor = _f64(weight)
        y = y * factor
        error = error * factor.abs() + units.u * (y.abs() + error * factor.abs())
    if bias is not None:
        y = y + _f64(bias)
        error = error + units.u * (y.abs() + error)
    return _stored(error, y, units)


def _row(x: Tensor, dim: int, allowed: Tensor | None, units: Units) -> _Row:
    wide = _f64(x).movedim(dim, -1)
    if allowed is not None:
        mask = allowed.detach().cpu().expand(x.shape).movedim(dim, -1)
        wide = wide.masked_fill(~mask, -torch.inf)
    n = wide.shape[-1]
    row_max = torch.zeros(*wide.shape[:-1], 1).double()
    if n:
        row_max = wide.amax(-1, keepdim=True)
    row_max = torch.where(row_max.isneginf(), 0.0, row_max)
    shifted = wide - row_max
    exps = shifted.exp()
    total = exps.sum(-1, keepdim=True)
    p = exps / torch.where(total == 0, 1.0, total)
    eta = torch.where(shifted.isneginf(), 0.0, units.u * shifted.abs()).clamp(max=_LARGE)
    t = eta.expm1() + units.exp * eta.exp()
    room = (1 - (p * t).sum(-1, keepdim=True) - units.dot(n + 1)).clamp(min=_NOTHING)
    lost = 1 / room - 1
    log_sum = total.log()
    log_error = lost + units.exp * log_sum.nan_to_num(neginf=0.0).abs()
    return _Row(shifted, p, t, row_max, log_sum, log_error, lost)
