"""Layer and RMS normalization that is right from constant rows to the largest float.

Both are torch's kernels behind exact changes of the input that the result does not depend on: a
power of two for large rows, and the subtraction of a mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, repeat

import torch
from torch import Tensor

from stabletx import _checks
from stabletx._precision import compute_dtype
from stabletx.functional._magnitude import extremes, surely_within
from stabletx.functional._sight import values_may_be_read

# Rows are brought down to about this. Squares and cubes, and sums of them over 2**20 features, stay
# far from the limits of the dtype; and eps, which is at most 1, is nothing beside such squares, so
# it need not be scaled with the row.
_EXPONENT = {torch.float32: 30, torch.float64: 200}
# The derivative holds eps ** -1.5, which float32 must represent.
_SMALLEST_EPS = 1e-24
# Up to so many rows numbers are looked at in Python, without the six operations on tensors that
# cost a single token, as in decoding, more than its norm.
_FEW_ROWS = 16
# Of a row, below which ``rms_norm`` needs no scaling in any dtype.
LARGEST_LENGTH = 2.0**30


def layer_norm(
    x: Tensor,  # (..., m)
    weight: Tensor | None = None,  # (m,)
    bias: Tensor | None = None,  # (m,)
    *,
    eps: float = 1e-5,
) -> Tensor:  # (..., m)
    """Shift and scale each row to mean 0 and variance 1, then apply a weight and a bias.

    ``(x - mean) / sqrt(variance + eps) * weight + bias`` over the last axis.

    Args:
        x: activations.
        weight: factor per feature; None for 1.
        bias: summand per feature; None for 0.
        eps: variance that is added, in [1e-24, 1].

    Returns:
        Normalized rows in the dtype of ``x``.

    Raises:
        TypeError: if a tensor is not floating point, or ``eps`` not a number.
        ValueError: if ``weight`` or ``bias`` does not have one entry per feature, ``x`` has no
            feature, or ``eps`` is out of range.

    Numerics: statistics and affine in float32 (float64 for float64), rounded once, whatever the
    dtype of ``weight`` and ``bias``. Rows up to the largest float are scaled by a power of two
    first; where the mean of a row is large beside its deviation it is subtracted twice. A constant
    row gives ``bias``, and gradients are finite wherever they can be represented, also for
    ``eps=1e-12`` in float16. A row that holds NaN or inf is NaN.
    Source: Ba, Kiros & Hinton (2016), arXiv 1607.06450, section 3; the second subtraction is the
    corrected two-pass algorithm of Chan, Golub & LeVeque (1983), Am. Stat. 37(3).

    >>> layer_norm(torch.tensor([1.0, 2.0, 3.0]) * 1e38)
    tensor([-1.2247,  0.0000,  1.2247])
    """
    _check(x, eps, weight=weight, bias=bias)
    work = compute_dtype(x.dtype)
    weight = x.new_ones(x.shape[-1], dtype=work) if weight is None else weight.to(work)
    bias = x.new_zeros(x.shape[-1], dtype=work) if bias is None else bias.to(work)
    if not values_may_be_read(x):
        return _guarded_layer_norm(x.to(work), weight, bias, eps).to(x.dtype)
    # In 16 bits the kernel computes in float32, but its backward adds up the gradients of weight
    # and bias in 16 bits: off by 146 units in the last place after 4096 rows.
    z = x.to(work) if torch.is_grad_enabled() else x
    # The kernel's own statistics say which rows it may have got wrong. For ordinary rows that
    # costs 5 to 20 % of the kernel's time; centring them all beforehand costs 100 % and more.
    out, mean, rstd = torch.native_layer_norm(z, z.shape[-1:], weight, bias, eps)
    # It loses about half a unit in the last place per unit of mean over deviation. So a row is
    # easy where mean**2 + eps <= 3 * variance, written with 1 / rstd**2 = variance + eps; and where
    # the mean is 0, which keeps rows of zeros, as padding often is, on the fast way.
    if _are_easy(mean, rstd, eps):
        return out.to(x.dtype)
    near = ((mean.square() + 4 * eps) * rstd.square() <= 3) | (mean == 0)
    easy = near & (rstd >= 2.0 ** -_EXPONENT[work])
    if not bool(easy.all()):
        # Row by row, so that no row's bits depend on another row.
        out, _, _ = torch.native_layer_norm(
            torch.where(easy, z, 0.0), z.shape[-1:], weight, bias, eps
        )
        out = torch.where(easy, out, _guarded_layer_norm(x.to(work), weight, bias, eps))
    return out.to(x.dtype)


def _lists(*vectors: Tensor) -> Iterator[list[float]]:
    return (vector.flatten().tolist() for vector in vectors)


def _are_easy(mean: Tensor, rstd: Tensor, eps: float) -> bool:
    """Tell whether every row is known to be easy; most often true, and cheaply found."""
    if mean.numel() <= _FEW_ROWS:
        return all(map(_is_easy, *_lists(mean, rstd), repeat(eps)))
    low, high = extremes(mean)
    smallest, largest = extremes(rstd)
    mean_size = max(-low, high)
    return _is_easy(mean_size, largest, eps) and _is_easy(mean_size, smallest, eps)


def _is_easy(mean: float, rstd: float, eps: float) -> bool:
    """Tell of one row, with room to spare, what ``layer_norm`` asks of all; false for NaN."""
    return (mean * mean + 4 * eps) * rstd * rstd <= 2.99 and rstd >= 2.0**-29


def are_ordinary(moments: Tensor, eps: float) -> bool:  # (2 n, rows, 1)
    """Tell of the means and ``rstd``, in turns, of ``n`` layer norms whether torch's were right.

    ``eps`` is the largest of them. Reads values.
    """
    flat = moments.flatten(1).tolist()
    pairs = zip(chain(*flat[::2]), chain(*flat[1::2]), strict=True)
    return all(_is_easy(mean, rstd, eps) for mean, rstd in pairs)


def _guarded_layer_norm(z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalize any rows, asking nothing of their values."""
    down = _exponent_to_ordinary(z).clamp(max=0.0)
    z = z * torch.exp2(down).to(z.dtype)
    # What is subtracted from a row does not change the result, so no gradient passes through it.
    z = z - z.detach().mean(-1, keepdim=True)
    # A large row may have small deviations, beside which eps counts: they go back to their size.
    up = torch.minimum(-down, _exponent_to_ordinary(z))
    z = z * torch.exp2(up).to(z.dtype)
    return torch.nn.functional.layer_norm(z, z.shape[-1:], weight, bias, eps)


def rms_norm(
    x: Tensor,  # (..., m)
    weight: Tensor | None = None,  # (m,)
    *,
    eps: float = 1e-6,
) -> Tensor:  # (..., m)
    """Scale each row to root mean square 1, then apply a weight.

    ``x / sqrt(mean(x**2) + eps) * weight`` over the last axis.

    Args:
        x: activations.
        weight: factor per feature; None for 1.
        eps: mean square that is added, in [1e-24, 1].

    Returns:
        Normalized rows in the dtype of ``x``.

    Raises:
        TypeError: if a tensor is not floating point, or ``eps`` not a number.
        ValueError: if ``weight`` does not have one entry per feature, ``x`` has no feature, or
            ``eps`` is out of range.

    Numerics: computed in float32 (float64 for float64), rounded once, whatever the dtype of
    ``weight``; ``eps`` does not depend on the dtype. Rows up to the largest float are scaled by a
    power of two first. A row that holds NaN or inf is NaN.
    Source: Zhang & Sennrich (2019), arXiv 1910.07467, section 4.

    >>> rms_norm(torch.tensor([3.0, 4.0]) * 1e37)
    tensor([0.8485, 1.1314])
    """
    _check(x, eps, weight=weight)
    z = x.to(compute_dtype(x.dtype))
    weight = None if weight is None else weight.to(z.dtype)
    if not surely_within(x, 2.0 ** _EXPONENT[z.dtype]):
        z = z * torch.exp2(_exponent_to_ordinary(z).clamp(max=0.0)).to(z.dtype)
    return torch.nn.functional.rms_norm(z, z.shape[-1:], weight, eps).to(x.dtype)


def _check(x: Tensor, eps: float, **vectors: Tensor | None) -> None:
    _checks.check_float("x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(_checks.must("x", "have a last axis of features", tuple(x.shape)))
    for name, vector in vectors.items():
        _checks.check_vector(name, vector, x.shape[-1], x)
    _checks.check_between("eps", eps, _SMALLEST_EPS, 1.0)


def _exponent_to_ordinary(z: Tensor) -> Tensor:  # (..., m) -> (..., 1), float64, whole numbers
    """Give the power of two that brings each row's largest magnitude to an ordinary one.

    Taken in float64, whose ``exp2`` of a whole number is exact once it is rounded to float32.
    """
    top = z.detach().abs().amax(-1, keepdim=True).double()
    return _EXPONENT[z.dtype] - torch.floor(torch.log2(top))
