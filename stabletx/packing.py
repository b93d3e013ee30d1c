"""Ragged batches without padding: tokens laid end to end, and where each sequence lies.

A :class:`Packed` is what a caller passes in and gets back. A :class:`Plan` is made from it, or
from a padding mask, once in a forward pass: it puts sequences of equal length side by side, so that
attention can take each such run as a plain view. Everything but attention then works on
``(n_tokens, d_model)`` and no padding is ever computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from stabletx import _checks

FULL_ENOUGH = 0.95  # above this share of real tokens packing costs more than it saves; measured


@dataclass(frozen=True, eq=False)
class Packed:
    """Hold a ragged batch: the tokens of all sequences end to end, and their lengths.

    Args:
        tokens: (n_tokens, ...), ids or vectors.
        lengths: (b,) integers on the CPU, tokens; zero is allowed.

    Raises:
        TypeError: if ``lengths`` are not integers.
        ValueError: if they are not on the CPU, have not one axis, are negative, or do not sum to
            the number of tokens.

    >>> Packed(torch.tensor([5, 6, 7]), torch.tensor([1, 2]))
    Packed(tokens of shape (3,), lengths [1, 2])
    """

    tokens: Tensor
    lengths: Tensor

    def __post_init__(self) -> None:
        _checks.check_tensor("tokens", self.tokens)
        _checks.check_integers("lengths", self.lengths)
        _checks.check_axes("lengths", self.lengths, "b", "Pass one length per sequence.")
        _checks.check_lengths(self.lengths, self.tokens)

    def __repr__(self) -> str:
        shape = tuple(self.tokens.shape)
        return f"Packed(tokens of shape {shape}, lengths {self.lengths.tolist()})"


class Run(NamedTuple):
    """Neighbouring sequences of one length; the first of their tokens is ``start``."""

    start: int
    n_rows: int
    length: int


@dataclass(frozen=True, eq=False)
class Plan:
    """Say where the tokens of a batch lie once sequences of equal length are side by side.

    Attributes:
        runs: the sequences by length, the longest first.
        index: (n_tokens,), from which slot of the caller's layout each token comes.
        positions: (n_tokens,), how many tokens of its own sequence come before it.
        rank: (b,), where each of the caller's sequences stands in the plan's order.
        shape: the caller's layout: (b, n) if padded, (n_tokens,) if packed.
    """

    runs: tuple[Run, ...]
    index: Tensor
    positions: Tensor
    rank: Tensor
    shape: tuple[int, ...]

    @staticmethod
    def of_padding(
        keep: Tensor,  # (b, n) bool on the CPU, True = a real token
        device: torch.device | None = None,
    ) -> Plan:
        """Plan for a padded batch: right, left and holed padding alike.

        >>> Plan.of_padding(torch.tensor([[True, False], [True, True]])).index
        tensor([2, 3, 0])
        """
        lengths, order = torch.sort(keep.sum(1), descending=True, stable=True)
        row, column = keep.index_select(0, order).nonzero().unbind(1)
        index = order.index_select(0, row) * keep.shape[1] + column
        return Plan._of_order(lengths, order, index, tuple(keep.shape), device)

    @staticmethod
    def of_lengths(lengths: Tensor, device: torch.device | None = None) -> Plan:
        """Plan for a packed batch.

        >>> Plan.of_lengths(torch.tensor([1, 2])).runs
        (Run(start=0, n_rows=1, length=2), Run(start=2, n_rows=1, length=1))
        """
        lengths = lengths.long()
        starts = lengths.cumsum(0) - lengths
        ordered, order = torch.sort(lengths, descending=True, stable=True)
        n_tokens = int(ordered.sum())
        shift = starts.index_select(0, order) - (ordered.cumsum(0) - ordered)
        index = torch.arange(n_tokens, device=shift.device) + shift.repeat_interleave(ordered)
        return Plan._of_order(ordered, order, index, (n_tokens,), device)

    @staticmethod
    def _of_order(
        lengths: Tensor,
        order: Tensor,
        index: Tensor,
        shape: tuple[int, ...],
        device: torch.device | None,
    ) -> Plan:
        starts = lengths.cumsum(0) - lengths
        places = torch.arange(len(index), device=index.device)
        positions = places - starts.repeat_interleave(lengths)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device)
        runs, start = [], 0
        values, counts = torch.unique_consecutive(lengths, return_counts=True)
        for length, count in zip(values.tolist(), counts.tolist(), strict=True):
            runs.append(Run(start, count, length))
            start += count * length
        moved = (x if device is None else x.to(device, non_blocking=True) for x in (index, rank))
        index, rank = moved
        positions = positions.to(index.device, non_blocking=True)
        return Plan(tuple(runs), index, positions, rank, shape)

    @property
    def n_tokens(self) -> int:
        """Count the real tokens."""
        return self.index.shape[0]

    @property
    def max_length(self) -> int:
        """Give the length of the longest sequence, tokens."""
        return self.runs[0].length if self.runs else 0

    def cumulative_lengths(self) -> Tensor:  # (b + 1,) int32
        """Give where each sequence starts in the plan's order, as varlen kernels take it."""
        lengths = [run.length for run in self.runs for _ in range(run.n_rows)]
        starts = torch.tensor([0, *lengths], dtype=torch.int32, device="cpu")
        return starts.cumsum(0, dtype=torch.int32).to(self.index.device, non_blocking=True)

    def pack(self, x: Tensor) -> Tensor:  # (*shape, ...) -> (n_tokens, ...)
        """Take the real tokens out of the caller's layout, in the plan's order."""
        flat = rearrange(x, "b n ... -> (b n) ...") if len(self.shape) == 2 else x
        return flat.index_select(0, self.index)

    def unpack(self, x: Tensor) -> Tensor:  # (n_tokens, ...) -> (*shape, ...)
        """Put tokens back where the caller had them; padding is exactly 0."""
        n_slots = self.shape[0] * self.shape[1] if len(self.shape) == 2 else self.shape[0]
        flat = x.new_zeros(n_slots, *x.shape[1:]).index_copy(0, self.index, x)
        return flat.view(*self.shape, *x.shape[1:])
