"""Softmax, its logarithm and its normalizer, where scores may not count and rows may be empty.

All three start from the same first step, :func:`_filled`: scores that are out become -inf, whatever
they hold, and a row with nothing in it becomes a row of zeros until the very end, so that no NaN
arises on the way and nothing flows back into it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stabletx import _checks
from stabletx._precision import compute_dtype
from stabletx.functional._magnitude import surely_within


def softmax(
    x: Tensor,  # (..., s, ...), s along dim
    dim: int = -1,
    *,
    allowed: Tensor | None = None,  # bool, broadcastable to x; True = may attend
) -> Tensor:  # the shape of x
    """Turn scores into weights that sum to 1 along an axis.

    Args:
        x: scores, unit-free. -inf blocks, as False in ``allowed`` does.
        dim: the axis to normalize over.
        allowed: where False, the score does not count, whatever it holds, NaN included.

    Returns:
        Non-negative weights in the dtype of ``x``; exactly 0 where blocked, and everywhere in a row
        that is wholly blocked.

    Raises:
        TypeError: if ``x`` is not floating point or ``allowed`` is not boolean.
        ValueError: if ``x`` has no axis ``dim``, or ``allowed`` does not fit ``x``.

    Numerics: computed in float32 (float64 for float64), rounded once. Blocked scores and empty rows
    get gradient exactly 0. NaN or +inf that counts makes its row NaN.
    Source: Blanchard, Higham & Higham (2021), IMA J. Numer. Anal. 41(4), the shifted form.

    >>> softmax(torch.zeros(3), allowed=torch.tensor([True, True, False]))
    tensor([0.5000, 0.5000, 0.0000])
    """
    scores, counts = _filled(x, dim, allowed)
    weights = torch.softmax(scores, dim)
    return (weights if counts is None else torch.where(counts, weights, 0.0)).to(x.dtype)


def log_softmax(
    x: Tensor,  # (..., s, ...), s along dim
    dim: int = -1,
    *,
    allowed: Tensor | None = None,  # bool, broadcastable to x; True = may attend
) -> Tensor:  # the shape of x
    """Compute the logarithm of :func:`softmax` without going through its small weights.

    Args:
        x: scores, unit-free. -inf blocks, as False in ``allowed`` does.
        dim: the axis to normalize over.
        allowed: where False, the score does not count, whatever it holds, NaN included.

    Returns:
        Log-weights, nats, in the dtype of ``x``; -inf where blocked, and everywhere in a row that
        is wholly blocked.

    Raises:
        TypeError: if ``x`` is not floating point or ``allowed`` is not boolean.
        ValueError: if ``x`` has no axis ``dim``, or ``allowed`` does not fit ``x``.

    Numerics: computed in float32 (float64 for float64), rounded once. Blocked scores and empty rows
    get gradient exactly 0. NaN or +inf that counts makes its row NaN, where it is not blocked.
    Source: Blanchard, Higham & Higham (2021), IMA J. Numer. Anal. 41(4), the shifted form.

    >>> log_softmax(torch.tensor([0.0, 0.0, -torch.inf]))
    tensor([-0.6931, -0.6931,    -inf])
    """
    scores, counts = _filled(x, dim, allowed)
    log_p = torch.log_softmax(scores, dim)
    return (log_p if counts is None else torch.where(counts, log_p, -torch.inf)).to(x.dtype)


def logsumexp(
    x: Tensor,  # (..., s, ...), s along dim
    dim: int = -1,
    *,
    allowed: Tensor | None = None,  # bool, broadcastable to x; True = may attend
) -> Tensor:  # the shape of x without dim
    """Compute the logarithm of the sum of exponentials along an axis.

    Args:
        x: scores, unit-free. -inf blocks, as False in ``allowed`` does.
        dim: the axis to sum over.
        allowed: where False, the score does not count, whatever it holds, NaN included.

    Returns:
        One value a row, nats, in the dtype of ``x``; -inf for a row that is wholly blocked.

    Raises:
        TypeError: if ``x`` is not floating point or ``allowed`` is not boolean.
        ValueError: if ``x`` has no axis ``dim``, or ``allowed`` does not fit ``x``.

    Numerics: computed in float32 (float64 for float64), rounded once. The gradient is the softmax
    itself, not ``exp(x - lse)``: a common offset of the scores costs it nothing. Blocked scores and
    empty rows get gradient exactly 0. NaN or +inf that counts makes its row NaN.
    Source: Blanchard, Higham & Higham (2021), IMA J. Numer. Anal. 41(4), the shifted form.

    >>> logsumexp(torch.tensor([[1000.0, 1000.0], [-torch.inf, -torch.inf]]))
    tensor([1000.6932,      -inf])
    """
    scores, counts = _filled(x, dim, allowed)
    if x.shape[dim] == 0:  # there is no largest of nothing
        return scores.sum(dim).fill_(-torch.inf).to(x.dtype)
    top = scores.detach().amax(dim, keepdim=True)
    lse = torch.log(torch.exp(scores - top).sum(dim)) + top.squeeze(dim)
    return (lse if counts is None else torch.where(counts.any(dim), lse, -torch.inf)).to(x.dtype)


def _filled(x: Tensor, dim: int, allowed: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Give the scores with -inf where they do not count, and where they do; None: everywhere.

    A row where none counts is all zeros. NaN counts: only -inf and the mask take a score out.
    """
    _checks.check_float("x", x)
    _checks.check_dim(dim, x)
    scores = x.to(compute_dtype(x.dtype))
    if allowed is None:
        if surely_within(x, torch.finfo(x.dtype).max):
            return scores, None
        counts = x != -torch.inf
    else:
        _checks.check_bool("allowed", allowed)
        _checks.check_broadcasts("allowed", allowed, "x", x.shape)
        _checks.check_same("device", "allowed", allowed.device, "x", x.device)
        counts = (x != -torch.inf) & allowed
    fill = torch.where(counts.any(dim, keepdim=True), -torch.inf, 0.0)
    return torch.where(counts, scores, fill), counts
