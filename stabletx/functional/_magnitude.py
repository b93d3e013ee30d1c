"""A first look at magnitudes: is all of a tensor far from the limits of its dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from stabletx.functional._sight import values_may_be_read


def surely_within(x: Tensor, limit: float) -> bool:
    """Tell whether every magnitude is known to be at most ``limit``.

    False does not say that one is larger: where reading a value would make a GPU wait, or while
    tracing, the dtype alone is asked. NaN and the infinities of float16 pass that question, so the
    answer may only spare work that such values do not need.
    """
    if torch.finfo(x.dtype).max <= limit:
        return True
    if not values_may_be_read(x) or not x.numel():
        return False
    low, high = torch.aminmax(x.detach())
    return bool((low >= -limit) & (high <= limit))
