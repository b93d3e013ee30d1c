"""A first look at magnitudes: is all of a tensor far from the limits of its dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from stabletx.functional._sight import values_may_be_read


def surely_within(x: Tensor, limit: float) -> bool:
    """Tell whether every value is known to be a number of magnitude at most ``limit``.

    False does not say that one is not: it is the answer wherever values may not be read. So it may
    only decide between two ways to the same result.
    """
    if not values_may_be_read(x) or not x.numel():
        return False
    low, high = extremes(x)
    return -limit <= low and high <= limit  # false for NaN


def extremes(x: Tensor) -> tuple[float, float]:
    """Give the smallest and the largest value of a tensor that has any; NaN where there is one."""
    x = x.detach()
    # One look is faster than two, but copies what does not lie in one piece.
    low, high = torch.aminmax(x) if x.is_contiguous() else (x.amin(), x.amax())
    return float(low), float(high)
