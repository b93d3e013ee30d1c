"""The rounding units of one call, drawn from the dtype of its inputs and a profile."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stabletx.testing.rounding import (
    REFERENCE_UNIT,
    Mode,
    Profile,
    gamma,
    smallest_subnormal,
    unit_roundoff,
)

# Stands for "everything is lost" and still multiplies a 0 without becoming NaN.
LOST = 1e6


@dataclass(frozen=True)
class Units:
    """What each kind of operation may cost in this call.

    Attributes:
        u: one operation in the compute dtype, the reference's own rounding included.
        u_sum: one addition of a running sum.
        scores: storing a score, 0 where it stays in the compute dtype.
        weights: storing a weight or the gradient of a score, likewise.
        out: storing a result.
        out_dtype: dtype of the results.
        exp: relative error of the exponential.
        tiny: below this the compute dtype may flush to 0.
        grain: spacing of the compute dtype around 0.
        mode: how sums grow.
        profile: what the kernel states.
    """

    u: float
    u_sum: float
    scores: float
    weights: float
    out: float
    out_dtype: torch.dtype
    exp: float
    tiny: float
    grain: float
    mode: Mode
    profile: Profile

    @classmethod
    def of(cls, dtype: torch.dtype, profile: Profile, mode: Mode) -> Units:
        """Read the units off the dtype of the inputs and the profile."""
        compute = profile.compute_dtype(dtype)
        u = unit_roundoff(compute) + REFERENCE_UNIT
        u_sum = u if profile.accumulate is None else unit_roundoff(profile.accumulate)
        return cls(
            u=u,
            u_sum=max(u, u_sum),
            scores=_storage(profile.scores, compute),
            weights=_storage(profile.weights, compute),
            out=unit_roundoff(dtype),
            out_dtype=dtype,
            exp=profile.exp_ulps * u,
            tiny=torch.finfo(compute).tiny,
            grain=smallest_subnormal(compute),
            mode=mode,
            profile=profile,
        )

    def dot(self, n: float) -> float:
        """Bound the relative error of a sum of ``n`` products."""
        return min(gamma(n, self.u_sum, self.mode), LOST)

    def steps(self, n: float) -> float:
        """Bound the relative error of ``n`` operations in a row."""
        return min(gamma(n, self.u), LOST)


def _storage(dtype: torch.dtype | None, compute: torch.dtype) -> float:
    """Return the cost of storing in ``dtype`` what was computed in ``compute``."""
    if dtype is None or unit_roundoff(dtype) <= unit_roundoff(compute):
        return 0.0
    return unit_roundoff(dtype)
