"""Who sees whom: the mask and the -inf of the bias, asked in the ways that attention asks.

Nothing here writes out more than one block of query rows, so memory stays linear in length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stabletx._mask_rules import Band
from stabletx.masks import Mask

ROWS_AT_ONCE = 256  # query rows whose pairs are written out together


def values_may_be_read(x: Tensor) -> bool:
    """Tell whether a branch may depend on values: on the CPU, and not while tracing.

    On a GPU reading a value makes the host wait; under ``torch.compile``, ``torch.export`` and
    ``torch.func`` there is no value to read.
    """
    return x.device.type == "cpu" and not is_traced()


def is_traced() -> bool:
    """Tell whether a compiler, an exporter or a transform stands between us and the values."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


@dataclass(frozen=True)
class Sight:
    """The pairs that may attend, for ``t`` queries and ``s`` keys."""

    mask: Mask | None
    blocking: Tensor | None  # the bias, where its -inf blocks
    band: Band | None  # the same as one band, where it is one
    t: int
    s: int
    device: torch.device

    @staticmethod
    def of(mask: Mask | None, bias: Tensor | None, t: int, s: int, device: torch.device) -> Sight:
        """Join a mask and a bias."""
        blocking = None if bias is None else bias.detach()
        if blocking is not None and values_may_be_read(blocking):
            blocking = blocking if bool((blocking == -torch.inf).any()) else None
        band = Band(None, None, None) if mask is None else mask.band(t, s)
        return Sight(mask, blocking, None if blocking is not None else band, t, s, device)

    @property
    def tensors(self) -> list[Tensor]:
        """List what a backward pass that writes out pairs again saves, and does not read.

        Autograd then refuses a mask that was written to since the forward pass.
        """
        held = [] if self.mask is None else self.mask.tensors()
        return [x for x in held if not x.is_inference()]

    @property
    def is_everything(self) -> bool:
        """Tell whether every query sees every key."""
        return self.band == Band(None, None, None)

    def tile(self, rows: slice, cols: Tensor) -> Tensor | None:
        """Write out queries ``rows`` and keys ``cols``; (b|1, h|1, r|1, c|1), None: all seen."""
        if self.mask is None and self.blocking is None:
            return None
        seen = None
        if self.mask is not None:
            index = torch.arange(rows.start, rows.stop, device=self.device)
            seen = self.mask.tile(index, cols, self.t, self.s)
        if self.blocking is not None:
            block = self.blocking if self.blocking.shape[2] == 1 else self.blocking[:, :, rows]
            block = block if block.shape[3] == 1 else block.index_select(3, cols)
            seen = block != -torch.inf if seen is None else seen & (block != -torch.inf)
        return seen

    def dense(self) -> Tensor | None:
        """Write out every pair; None where every query sees every key."""
        cols = torch.arange(self.s, device=self.device)
        return None if self.is_everything else self.tile(slice(0, self.t), cols)

    def _blocks(self) -> Iterator[tuple[slice, Tensor | None]]:
        cols = torch.arange(self.s, device=self.device)
        if is_traced():  # a loop would fix the length; what is traced writes out all pairs anyway
            yield slice(0, self.t), self.tile(slice(0, self.t), cols)
            return
        for start in range(0, self.t, ROWS_AT_ONCE):
            rows = slice(start, min(start + ROWS_AT_ONCE, self.t))
            yield rows, self.tile(rows, cols)

    def rows_with_a_key(self) -> Tensor | None:
        """Tell which queries see any key: (b|1, h|1, t|1) bool; None where all do."""
        band = self.band
        if band is not None and band.keep is None:
            if self.s and _always(band, self.t, self.s):
                return None
            low, high = _edges(band, self.t, self.s, self.device)
            return (high > low)[None, None]
        if band is not None and band.keep is not None:
            if band.lower is None and band.upper is None:
                return band.keep.any(-1)[:, None, None]
            return self.sees_any(band.keep[:, None])
        parts = []
        for rows, tile in self._blocks():
            n_rows = rows.stop - rows.start
            if tile is None or self.s == 0:
                parts.append(torch.full((1, 1, n_rows), self.s > 0, device=self.device))
            else:
                parts.append(tile.any(-1).expand(*tile.shape[:2], n_rows))
        return torch.cat(parts, -1) if parts else None

    def keys_with_a_row(self) -> Tensor | None:
        """Tell which keys any query sees: (b|1, h|1, s) bool; None where all are seen."""
        band = self.band
        if band is not None:
            first, last = _row_edges(band, self.t, self.s, self.device)
            seen = first < last
            return seen[None, None] if band.keep is None else (seen & band.keep)[:, None]
        seen_by: Tensor | None = None
        for _, tile in self._blocks():
            if tile is None:
                return None
            part = tile.any(2).expand(*tile.shape[:2], self.s)
            seen_by = part if seen_by is None else seen_by | part
        return seen_by

    def seen_by_any(self, flags: Tensor) -> Tensor:  # (b|1, h|1, t) bool -> (b|1, h|1, s)
        """Tell for each key whether any flagged query sees it."""
        band = self.band
        if band is not None:
            first, last = _row_edges(band, self.t, self.s, self.device)
            counts = torch.nn.functional.pad(flags.to(torch.int32).cumsum(-1), (1, 0))
            first = torch.minimum(first, last)
            seen = counts.index_select(-1, last) > counts.index_select(-1, first)
            return seen if band.keep is None else seen & band.keep[:, None]
        seen = flags.new_zeros(*flags.shape[:2], self.s)
        for rows, tile in self._blocks():
            hit = flags[:, :, rows, None]
            seen = seen | (hit if tile is None else hit & tile).any(2)
        return seen

    def sees_any(self, flags: Tensor) -> Tensor:  # (b|1, h|1, s) bool -> (b|1, h|1, t)
        """Tell for each query whether it sees any flagged key."""
        band = self.band
        if band is not None:
            kept = flags if band.keep is None else flags & band.keep[:, None]
            low, high = _edges(band, self.t, self.s, self.device)
            counts = torch.nn.functional.pad(kept.to(torch.int32).cumsum(-1), (1, 0))
            return counts.index_select(-1, high) > counts.index_select(-1, torch.minimum(low, high))
        parts = []
        for rows, tile in self._blocks():
            hit = flags[:, :, None] if tile is None else flags[:, :, None] & tile
            hit = hit.any(-1)
            parts.append(hit.expand(*hit.shape[:2], rows.stop - rows.start))
        return torch.cat(parts, -1) if parts else flags.any(-1, keepdim=True)[..., :0]

    def largest_seen(self, values: Tensor) -> Tensor:  # (b, h, s) >= 0 -> (b, h, t)
        """Give for each query the largest value among the keys that it sees, 0 for none."""
        band = self.band
        if band is not None and band.lower is None and self.s:
            kept = values if band.keep is None else values * band.keep[:, None]
            _, high = _edges(band, self.t, self.s, self.device)
            top = torch.nn.functional.pad(kept.cummax(-1).values, (1, 0))
            return top.index_select(-1, high)
        parts = []
        for rows, tile in self._blocks():
            seen = values[:, :, None]
            seen = seen if tile is None else torch.where(tile, seen, 0.0)
            top = seen.amax(-1) if self.s else seen.sum(-1)
            parts.append(top.expand(*top.shape[:2], rows.stop - rows.start))
        return torch.cat(parts, -1) if parts else values[..., :0]


def _edges(band: Band, t: int, s: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows = torch.arange(t, device=device)
    low = torch.zeros_like(rows) if band.lower is None else (rows + band.lower).clamp(0, s)
    high = torch.full_like(rows, s) if band.upper is None else (rows + band.upper + 1).clamp(0, s)
    return low, high


def _row_edges(band: Band, t: int, s: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Give the half-open range of rows that see each key."""
    cols = torch.arange(s, device=device)
    first = torch.zeros_like(cols) if band.upper is None else (cols - band.upper).clamp(0, t)
    last = torch.full_like(cols, t)
    return first, last if band.lower is None else (cols - band.lower + 1).clamp(0, t)


def _always(band: Band, t: int, s: int) -> bool:
    """Tell whether every row of a band without ``keep`` has a key (``s`` > 0)."""
    starts = band.upper is None or band.upper >= 0
    reaches = band.lower is None or t - 1 + band.lower <= s - 1
    width = band.lower is None or band.upper is None or band.lower <= band.upper
    return starts and reaches and width
