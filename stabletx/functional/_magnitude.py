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


def side_by_side(
    q: Tensor,  # (b, h, t, d)
    k: Tensor,  # (b, g, t, d)
    v: Tensor,  # (b, g, t, d)
) -> Tensor | None:  # (b t, (h + 2 g) d)
    """Give the joint projection whose columns q, k and v are, for one look at all of them.

    None where they are anything else.
    """
    (b, h, t, d), g = q.shape, k.shape[1]
    width, size = (h + 2 * g) * d, q.element_size()
    strides = (t * width, d, width, 1)
    if any(
        x.stride()[1:] != strides[1:] or (b > 1 and x.stride(0) != t * width) for x in (q, k, v)
    ):
        return None
    if k.shape != v.shape or k.shape[2] != t or q.numel() == 0:
        return None
    steps = (k.data_ptr() - q.data_ptr(), v.data_ptr() - k.data_ptr())
    home = q.untyped_storage().data_ptr()
    if steps != (h * d * size, g * d * size) or v.untyped_storage().data_ptr() != home:
        return None
    return q.as_strided((b * t, width), (width, 1))
