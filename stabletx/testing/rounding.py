"""Units of rounding: what one operation may cost, what a sum may cost, and what a kernel states."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Mode = Literal["deterministic", "probable"]

# The judge itself computes in float64, so its own rounding joins every bound.
REFERENCE_UNIT = 2.0**-53
# Standard deviations that "probable" leaves room for (Higham & Mary 2019, lambda = 4).
_DEVIATIONS = 4.0


@dataclass(frozen=True)
class Profile:
    """What a kernel states about itself; the bound allows for that and no more.

    Attributes:
        compute: dtype of scores, exponentials and sums; None = float32 at least, float64 for
            float64 inputs.
        scores: dtype in which scores are stored between the steps; None = the compute dtype.
        weights: dtype in which weights (and the gradient of the scores) are stored.
        accumulate: dtype of the running sums; None = the compute dtype.
        exp_ulps: relative error of the exponential, in unit roundoffs of the compute dtype.
        recompute_from_lse: the backward pass rebuilds weights as ``exp(score - lse)`` from one
            rounded logsumexp.
        delta_from_output: the backward pass takes ``sum(grad_out * out)`` from the output as
            stored, rounded to the output's dtype.
        block: keys between two updates of a running maximum.
        base_two: scores are multiplied by log2(e) before the row's maximum is taken off, so each is
            rounded at its own size: under a common offset that costs what the offset costs.
    """

    compute: torch.dtype | None = None
    scores: torch.dtype | None = None
    weights: torch.dtype | None = None
    accumulate: torch.dtype | None = None
    exp_ulps: float = 4.0
    recompute_from_lse: bool = False
    delta_from_output: bool = False
    block: int = 64
    base_two: bool = False

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that inputs of ``dtype`` are computed in."""
        return self.compute or torch.promote_types(dtype, torch.float32)


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the largest relative error of one rounding to nearest.

    >>> unit_roundoff(torch.float32) == 2.0 ** -24
    True
    """
    return torch.finfo(dtype).eps / 2


def smallest_subnormal(dtype: torch.dtype) -> float:
    """Return the spacing of floats around zero."""
    info = torch.finfo(dtype)
    return info.tiny * info.eps


def gamma(n: float, u: float, mode: Mode = "deterministic") -> float:
    """Bound the relative error of ``n`` roundings in a row, each of at most ``u``.

    Args:
        n: number of roundings that one term meets.
        u: unit roundoff.
        mode: "deterministic" holds always, ``n u / (1 - n u)``; "probable" grows as the root of n
            and holds with overwhelming probability where roundings are independent.

    Returns:
        The bound; infinite where n roundings can lose everything.

    Source: Higham (2002), lemma 3.1; Higham & Mary (2019), theorem 2.4.

    >>> gamma(2, 0.25)
    1.0
    """
    if n <= 0:
        return 0.0
    if mode == "probable":
        exponent = _DEVIATIONS * math.sqrt(n) * u + n * u * u / max(1.0 - u, u)
        return math.expm1(exponent) if exponent < 700 else math.inf
    return n * u / (1.0 - n * u) if n * u < 1 else math.inf


def spacing(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance between neighbouring floats of ``dtype`` at the size of ``x``."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(x.double().abs().clamp(min=info.tiny)).exponent - 1
    return torch.exp2(exponent.double()) * info.eps


def condition_ulps(actual: Tensor, expected: Tensor, condition_scale: Tensor) -> Tensor:
    """Measure an error in ulps at the condition scale (cULP).

    Args:
        actual: any result; its dtype gives the ulp.
        expected: the exact result, float64.
        condition_scale: the sum that gave ``expected`` with each term replaced by its absolute
            value, as :func:`condition_scales` computes it.

    Returns:
        Float64, elementwise. 0.5 is a correct rounding; cancellation that is in the data is not
        held against ``actual``.

    >>> one = torch.ones(1)
    >>> condition_ulps(one + 2.0**-23, one.double(), one.double())
    tensor([1.], dtype=torch.float64)
    """
    error = (actual.detach().cpu().double() - expected.cpu().double()).abs()
    return error / spacing(condition_scale.cpu(), actual.dtype)
