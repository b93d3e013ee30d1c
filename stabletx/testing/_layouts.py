"""The ways a tensor of four axes can lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "permuted", "sliced", "strided", "expanded")


def arranged(x: Tensor, layout: str) -> Tensor:
    """Return the same values (b, h, n, w) in another layout.

    "permuted" is stored (b, n, h, w), as a projection leaves it; "sliced" starts inside a larger
    tensor that is full of NaN; "strided" has its last axis apart, as a transposed cache; "expanded"
    repeats the first example, or head, without storing it again.
    """
    if layout == "contiguous":
        return x.contiguous()
    if layout == "permuted":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "sliced":
        b, h, n, w = x.shape
        whole = torch.full((b, h, n + 3, w + 8), torch.nan, dtype=x.dtype)
        inner = whole[:, :, 2 : n + 2, 4 : w + 4]
        return inner.copy_(x)
    if layout == "expanded":
        axis = 0 if x.shape[0] > 1 else 1
        if x.shape[axis] < 2 or not _repeats(x, axis):
            return x.contiguous()
        return x.narrow(axis, 0, 1).contiguous().expand_as(x)
    raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got layout={layout!r}.")


def _repeats(x: Tensor, axis: int) -> bool:
    first = x.narrow(axis, 0, 1).expand_as(x)
    return bool(((x == first) | (x.isnan() & first.isnan())).all())
