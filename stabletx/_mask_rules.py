"""The rules that a :class:`stabletx.Mask` is made of.

Each rule writes out any tile of the mask (some queries, some keys), and says itself as a
:class:`Band` where it can: one diagonal band and one set of keys per batch row. Fast paths read
the band; everything else reads tiles.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from stabletx import _checks


@dataclass(frozen=True)
class Band:
    """Query ``i`` sees key ``j`` where ``i + lower <= j <= i + upper`` and ``keep[b, j]``."""

    lower: int | None
    upper: int | None
    keep: Tensor | None  # (b, s) bool

    def meet(self, other: Band) -> Band:
        """Join two bands by "and"."""
        lowers = [x for x in (self.lower, other.lower) if x is not None]
        uppers = [x for x in (self.upper, other.upper) if x is not None]
        keeps = [x for x in (self.keep, other.keep) if x is not None]
        return Band(
            max(lowers) if lowers else None,
            min(uppers) if uppers else None,
            keeps[0] & keeps[1] if len(keeps) == 2 else (keeps[0] if keeps else None),
        )

    def keys_of(self, first: int, last: int, n_keys: int) -> tuple[int, int]:
        """Give the half-open range of keys that queries ``first .. last`` can see at most."""
        start = 0 if self.lower is None else max(0, first + self.lower)
        stop = n_keys if self.upper is None else min(n_keys, last + self.upper + 1)
        return min(start, n_keys), max(stop, 0)

    def is_full(self, first: int, last: int, start: int, stop: int) -> bool:
        """Tell whether queries ``first .. last`` all see keys ``start .. stop - 1``, by band."""
        low = self.lower is None or last + self.lower <= start
        return low and (self.upper is None or stop - 1 <= first + self.upper)


class Rule(ABC):
    """What every rule can do. Rules hold tensors and ints, and never change."""

    @abstractmethod
    def tile(self, rows: Tensor, cols: Tensor, t: int, s: int) -> Tensor:
        """Write out the pairs of queries ``rows`` and keys ``cols``: (b|1, h|1, r|1, c|1) bool."""

    def band(self, t: int, s: int) -> Band | None:
        """Say the rule as a band, or None."""
        return None

    def tensors(self) -> list[Tensor]:
        """List the tensors that the rule holds."""
        return []

    def sizes(self) -> tuple[int | None, int | None]:
        """Give the rule's own batch size and heads; None or 1 where it serves any."""
        batch = [x.shape[0] for x in self.tensors()]
        return max(batch) if batch else None, None

    def device(self) -> torch.device:
        """Give the device of the rule's tensors, or the CPU."""
        return next((x.device for x in self.tensors()), torch.device("cpu"))


def _aligned(offset: int | Tensor | None, t: int, s: int) -> int | Tensor:
    if offset is not None:
        return offset if isinstance(offset, int) else offset.to(torch.int64)[:, None, None, None]
    _checks.check_not_longer(t, s)
    return s - t


def _offset_text(offset: int | Tensor | None) -> str:
    if offset is None:
        return ""
    if isinstance(offset, int):
        return f"offset={offset}"
    return f"offset of shape {tuple(offset.shape)}"


@dataclass(frozen=True, repr=False)
class Causal(Rule):
    """Key ``j <= i + offset``."""

    offset: int | Tensor | None

    def tile(self, rows: Tensor, cols: Tensor, t: int, s: int) -> Tensor:
        """See :meth:`Rule.tile`."""
        offset = _aligned(self.offset, t, s)
        return cols[None, None, None, :] <= rows[None, None, :, None] + offset

    def band(self, t: int, s: int) -> Band | None:
        """See :meth:`Rule.band`."""
        offset = _aligned(self.offset, t, s)
        return Band(None, offset, None) if isinstance(offset, int) else None

    def tensors(self) -> list[Tensor]:
        """See :meth:`Rule.tensors`."""
        return [self.offset] if isinstance(self.offset, Tensor) else []

    def __repr__(self) -> str:
        return f"Mask.causal({_offset_text(self.offset)})"


@dataclass(frozen=True, repr=False)
class Window(Rule):
    """Key ``i + offset - left <= j <= i + offset + right``."""

    left: int | None
    right: int | None
    offset: int | Tensor | None

    def tile(self, rows: Tensor, cols: Tensor, t: int, s: int) -> Tensor:
        """See :meth:`Rule.tile`."""
        gap = cols[None, None, None, :] - rows[None, None, :, None] - _aligned(self.offset, t, s)
        seen = torch.ones((), dtype=torch.bool, device=cols.device).expand(gap.shape)
        if self.left is not None:
            seen = gap >= -self.left
        if self.right is not None:
            seen = seen & (gap <= self.right)
        return seen

    def band(self, t: int, s: int) -> Band | None:
        """See :meth:`Rule.band`."""
        offset = _aligned(self.offset, t, s)
        if not isinstance(offset, int):
            return None
        lower = None if self.left is None else offset - self.left
        return Band(lower, None if self.right is None else offset + self.right, None)

    def tensors(self) -> list[Tensor]:
        """See :meth:`Rule.tensors`."""
        return [self.offset] if isinstance(self.offset, Tensor) else []

    def __repr__(self) -> str:
        if self.left is None and self.right is None:
            return "Mask.everything()"
        parts = [f"left={self.left}", f"right={self.right}", _offset_text(self.offset)]
        return f"Mask.window({', '.join(part for part in parts if part)})"


@dataclass(frozen=True, repr=False)
class Lengths(Rule):
    """Key ``j < lengths[b]``."""

    lengths: Tensor

    def tile(self, rows: Tensor, cols: Tensor, t: int, s: int) -> Tensor:
        """See :meth:`Rule.tile`."""
        return cols[None, None, None, :] < self.lengths[:, None, None, None]

    def band(self, t: int, s: int) -> Band | None:
        """See :meth:`Rule.band`."""
        cols = torch.arange(s, device=self.lengths.device)
        return Band(None, None, cols < self.lengths[:, None])

    def tensors(self) -> list[Tensor]:
        """See :meth:`Rule.tensors`."""
        return [self.lengths]

    def __repr__(self) -> str:
        return f"Mask.lengths(key_lengths of shape {tuple(self.lengths.shape)})"


@dataclass(frozen=True, repr=False)
class Padding(Rule):
    """Key ``j`` where ``keep[b, j]``."""

    keep: Tensor

    def tile(self, rows: Tensor, cols: Tensor, t: int, s: int) -> Tensor:
        """See :meth:`Rule.tile`."""
        _checks.check_mask_width("keep", self.keep.shape[1], "keys", s)
        return self.keep[:, None, None, :].index_select(3, cols)

    def band(self, t: int, s: int) -> Band | None:
        """See :meth:`Rule.band`."""
        _checks.check_mask_width("keep", self.keep.shape[1], "keys", s)
        return Band(None, None, self.keep)

    def tensors(self) -> list[Tensor]:
        """See :meth:`Rule.tensors`."""
        return [self.keep]

    def __repr__(self) -> str:
        return f"Mask.padding(keep of shape {tuple(self.keep.shape)})"


@dataclass(frozen=True, repr=False)
class Segments(Rule):
    """Pairs whose ids are equal."""

    query_ids: Tensor
    key_ids: Tensor

    def tile(self, rows: Tensor, cols: Tensor, t: int, s: int) -> Tensor:
        """See :meth:`Rule.tile`."""
        _checks.check_mask_width("query_ids", self.query_ids.shape[1], "queries", t)
        _checks.check_mask_width("key_ids", self.key_ids.shape[1], "keys", s)
        query_ids = self.query_ids.index_select(1, rows)[:, None, :, None]
        return query_ids == self.key_ids.index_select(1, cols)[:, None, None, :]

    def tensors(self) -> list[Tensor]:
        """See :meth:`Rule.tensors`."""
        return [self.query_ids, self.key_ids]

    def __repr__(self) -> str:
        shapes = f"{tuple(self.query_ids.shape)} and {tuple(self.key_ids.shape)}"
        return f"Mask.segments(ids of shapes {shapes})"


@dataclass(frozen=True, repr=False)
class Dense(Rule):
    """The pairs that a tensor names."""

    allowed: Tensor

    def tile(self, rows: Tensor, cols: Tensor, t: int, s: int) -> Tensor:
        """See :meth:`Rule.tile`."""
        allowed = self.allowed
        for axis, index, size, what in ((2, rows, t, "queries"), (3, cols, s, "keys")):
            if allowed.shape[axis] != 1:
                _checks.check_mask_width("allowed", allowed.shape[axis], what, size)
                if index.shape[0] != size:  # len() would fix an open axis
                    allowed = allowed.index_select(axis, index)
        return allowed

    def tensors(self) -> list[Tensor]:
        """See :meth:`Rule.tensors`."""
        return [self.allowed]

    def sizes(self) -> tuple[int | None, int | None]:
        """See :meth:`Rule.sizes`."""
        return self.allowed.shape[0], self.allowed.shape[1]

    def __repr__(self) -> str:
        return f"Mask.dense(allowed of shape {tuple(self.allowed.shape)})"


def _joined_sizes(left: Rule, right: Rule) -> tuple[int | None, int | None]:
    joined = []
    for pair in zip(left.sizes(), right.sizes(), strict=True):
        known = [x for x in pair if x is not None]
        joined.append(max(known) if known else None)
    return joined[0], joined[1]


@dataclass(frozen=True, repr=False)
class And(Rule):
    """Both."""

    left: Rule
    right: Rule

    def tile(self, rows: Tensor, cols: Tensor, t: int, s: int) -> Tensor:
        """See :meth:`Rule.tile`."""
        return self.left.tile(rows, cols, t, s) & self.right.tile(rows, cols, t, s)

    def band(self, t: int, s: int) -> Band | None:
        """See :meth:`Rule.band`."""
        left, right = self.left.band(t, s), self.right.band(t, s)
        return None if left is None or right is None else left.meet(right)

    def tensors(self) -> list[Tensor]:
        """See :meth:`Rule.tensors`."""
        return [*self.left.tensors(), *self.right.tensors()]

    def sizes(self) -> tuple[int | None, int | None]:
        """See :meth:`Rule.sizes`."""
        return _joined_sizes(self.left, self.right)

    def __repr__(self) -> str:
        return f"({self.left!r} & {self.right!r})"


@dataclass(frozen=True, repr=False)
class Or(Rule):
    """Either."""

    left: Rule
    right: Rule

    def tile(self, rows: Tensor, cols: Tensor, t: int, s: int) -> Tensor:
        """See :meth:`Rule.tile`."""
        return self.left.tile(rows, cols, t, s) | self.right.tile(rows, cols, t, s)

    def tensors(self) -> list[Tensor]:
        """See :meth:`Rule.tensors`."""
        return [*self.left.tensors(), *self.right.tensors()]

    def sizes(self) -> tuple[int | None, int | None]:
        """See :meth:`Rule.sizes`."""
        return _joined_sizes(self.left, self.right)

    def __repr__(self) -> str:
        return f"({self.left!r} | {self.right!r})"


@dataclass(frozen=True, repr=False)
class Not(Rule):
    """The opposite."""

    inner: Rule

    def tile(self, rows: Tensor, cols: Tensor, t: int, s: int) -> Tensor:
        """See :meth:`Rule.tile`."""
        return ~self.inner.tile(rows, cols, t, s)

    def tensors(self) -> list[Tensor]:
        """See :meth:`Rule.tensors`."""
        return self.inner.tensors()

    def sizes(self) -> tuple[int | None, int | None]:
        """See :meth:`Rule.sizes`."""
        return self.inner.sizes()

    def __repr__(self) -> str:
        return f"~{self.inner!r}"
