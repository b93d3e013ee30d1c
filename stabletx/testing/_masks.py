"""Masks of every kind that attention meets, as plain bool tensors; True = may attend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from stabletx.testing.cases import Shape

MASKS = (
    "none",
    "causal",
    "causal_top_left",
    "padding_right",
    "padding_left",
    "padding_holes",
    "window",
    "segments",
    "random",
    "empty_rows",
    "per_head",
    "dead_example",
    "dead_head",
)


def build_mask(kinds: str, sizes: Shape, generator: torch.Generator) -> Tensor | None:
    """Build a mask (b|1, h|1, t, s) from one kind, or from several joined with ``&``."""
    mask: Tensor | None = None
    for kind in kinds.split("&"):
        if kind not in MASKS:
            raise ValueError(f"mask must be one of {', '.join(MASKS)}, got mask={kind!r}.")
        if kind != "none":
            one = _one(kind, sizes, generator)
            mask = one if mask is None else mask & one
    return mask


def _one(kind: str, sizes: Shape, generator: torch.Generator) -> Tensor:
    b, h, _, t, s, _, _ = sizes
    i, j = torch.arange(t)[:, None], torch.arange(s)[None, :]
    if kind == "causal":
        return (j <= i + s - t)[None, None]
    if kind == "causal_top_left":
        return (j <= i)[None, None]
    if kind.startswith("padding"):
        return _padding(kind, b, s, generator)[:, None, None].expand(b, 1, t, s)
    if kind == "window":
        width = 1 + _draw(max(1, s // 3), generator)
        return ((j - i - (s - t)).abs() <= width)[None, None]
    if kind == "segments":
        return _segments(b, t, s, generator)[:, None]
    if kind == "dead_example":
        return (torch.arange(b) != _draw(b, generator))[:, None, None, None].expand(b, 1, t, s)
    if kind == "dead_head":
        return (torch.arange(h) != _draw(h, generator))[None, :, None, None].expand(1, h, t, s)
    if kind == "per_head":
        return torch.rand(b, h, t, s, generator=generator) < 0.7
    if kind == "empty_rows":
        rows = torch.rand(b, 1, t, 1, generator=generator) < 0.7
        rows[:, :, _draw(t, generator) if t else slice(0)] = False
        return rows.expand(b, 1, t, s)
    return torch.rand(b, 1, t, s, generator=generator) < 0.6


def _draw(n: int, generator: torch.Generator) -> int:
    return int(torch.randint(max(1, n), (), generator=generator))


def _padding(kind: str, b: int, s: int, generator: torch.Generator) -> Tensor:  # (b, s)
    """Keep at least one key of each example, and pad at least one where there are two."""
    lengths = torch.randint(1, max(2, s), (b, 1), generator=generator)
    j = torch.arange(s)[None, :]
    if kind == "padding_right":
        return j < lengths
    if kind == "padding_left":
        return j >= s - lengths
    keep = torch.rand(b, s, generator=generator) < 0.6
    return keep | (j == lengths - 1)


def _segments(b: int, t: int, s: int, generator: torch.Generator) -> Tensor:  # (b, t, s)
    """Cut queries and keys into documents that do not see each other."""
    cuts = torch.rand(b, max(t, s), generator=generator) < 0.3
    ids = cuts.long().cumsum(-1)
    return ids[:, -t or s + t :][:, :t, None] == ids[:, -s or s + t :][:, None, :s]
