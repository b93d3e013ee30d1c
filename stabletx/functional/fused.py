"""Attention through torch's own CPU kernels, on as little of the problem as gives the answer.

They keep the contract where the inputs are finite and the scores moderate
(``_guards.within_limits``). They see float32 or float64 only: 16-bit inputs are converted, which is
more accurate and, for float16, several times faster than torch's own 16-bit code.

Keys that a batch row may not see are cut off rather than masked, and a causal or windowed problem
is split by queries where that saves work, so blocked keys cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from stabletx import _checks
from stabletx._precision import compute_dtype, is_sixteen_bit
from stabletx.functional._guards import repeat_heads
from stabletx.functional._kernels import PAIRS, How, Kept, attend, gradients
from stabletx.functional._problem import Problem
from stabletx.functional._sight import Sight

Exact = Callable[[Problem], Tensor]

# Splitting pays where the kernel's own key blocks (512 wide) save nothing, and 128 queries at once
# keep its scores in the nearest cache; measured.
SPLIT_ROWS = 128
KERNEL_IS_CAUSAL_FROM = 768
# 16-bit inputs are converted in parts that stay in the processor's cache; bytes.
CONVERTED_AT_ONCE = 2**20


@dataclass(frozen=True)
class _Piece:
    """One call of the kernel: some batch rows, some queries, the keys that they may see."""

    batch: slice
    rows: slice
    keys: slice | Tensor  # a Tensor of indices where they are not one run
    is_causal: bool
    is_full: bool

    def cut(self, x: Tensor) -> Tensor:  # (b, g, s, d)
        x = x[self.batch]
        return x[:, :, self.keys] if isinstance(self.keys, slice) else x.index_select(2, self.keys)

    def inputs(
        self, q: Tensor, k: Tensor, v: Tensor, work: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cut out what is read, in the dtype computed in."""
        block = q[self.batch, :, self.rows]
        return block.to(work), self.cut(k).to(work), self.cut(v).to(work)

    def is_whole(self, problem: Problem) -> bool:
        """Tell whether the piece is all of the problem."""
        b, _, t, _ = problem.q.shape
        if not isinstance(self.keys, slice) or self.keys != slice(0, problem.k.shape[2]):
            return False
        return self.batch == slice(0, b) and self.rows == slice(0, t)

    def how(self, problem: Problem) -> How:
        """Say what is asked beside the tensors."""
        return How(problem.scale, self.is_causal, problem.dropout_p)

    def add_keys(self, whole: Tensor, part: Tensor) -> None:
        """Add to the gradient of the keys that the piece read."""
        if isinstance(self.keys, slice):
            whole[self.batch, :, self.keys] += part
        else:
            whole[self.batch].index_add_(2, self.keys, part.to(whole.dtype))

    def mask(self, problem: Problem, sight: Sight, dtype: torch.dtype) -> Tensor | None:
        """Write out what is added to the scores: the bias, -inf where blocked."""
        if self.is_full and problem.bias is None:
            return None
        cols = self.keys
        if isinstance(cols, slice):
            cols = torch.arange(cols.start, cols.stop, device=sight.device)
        added = torch.zeros((), dtype=dtype, device=sight.device)
        if problem.bias is not None:
            bias = problem.bias.detach()
            bias = bias if bias.shape[0] == 1 else bias[self.batch]
            bias = bias if bias.shape[2] == 1 else bias[:, :, self.rows]
            added = (bias if bias.shape[3] == 1 else bias.index_select(3, cols)).to(dtype)
        allowed = None if self.is_full else sight.tile(self.rows, cols)
        if allowed is not None:
            allowed = allowed if allowed.shape[0] == 1 else allowed[self.batch]
            added = torch.where(allowed, added, -torch.inf)
        return added.expand(*added.shape[:3], len(cols))


def can_fuse(problem: Problem) -> str:
    """Say why the kernel cannot express this problem; an empty text where it can."""
    if problem.q.device.type != "cpu":
        return "the tensors are not on the CPU"
    if problem.softcap is not None:
        return "a soft-cap"
    if problem.sinks is not None:
        return "sinks"
    if problem.dropout_p > 0 and problem.q.shape[2] * problem.k.shape[2] > PAIRS:
        return "dropout on the weights of long rows"
    if problem.bias is not None and problem.bias.requires_grad and torch.is_grad_enabled():
        return "a bias that wants a gradient"
    if problem.q.shape[3] != problem.v.shape[3]:
        return "values of another width than the queries"
    if 0 in problem.q.shape or 0 in problem.k.shape:
        return "an axis of size 0"
    return ""


def fused(problem: Problem, sight: Sight, exact: Exact) -> Tensor:
    """Attend through torch's kernels, in the dtype of q; ``exact`` serves higher derivatives."""
    pieces = list(_pieces(sight, problem.q))
    out: Tensor
    if problem.needs_grad:
        out = _Fused.apply(  # type: ignore[no-untyped-call]
            problem.q, problem.k, problem.v, problem, sight, pieces, exact
        )
    else:
        out, _ = _attended(problem, sight, pieces, keep=False)
    has_key = sight.rows_with_a_key()
    if has_key is None or bool(has_key.all()):
        return out
    return torch.where(has_key[..., None], out, 0.0)


def in_one_call(problem: Problem, sight: Sight) -> Tensor:
    """Attend through one call of torch's public function, which other runtimes know.

    This is what an exported graph holds. It expects what no query sees, and what is not finite,
    to have been put to 0; it reads no value, so magnitudes are as on a GPU the caller's care.
    """
    work = compute_dtype(problem.q.dtype)
    q, k, v = (x.to(work) for x in (problem.q, problem.k, problem.v))
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    seen = sight.dense()
    if problem.bias is not None:
        added = problem.bias.to(work)
        seen = added if seen is None else torch.where(seen, added, -torch.inf)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=problem.scale)
    has_key = sight.rows_with_a_key()
    return out if has_key is None else torch.where(has_key[..., None], out, 0.0)


def _pieces(sight: Sight, q: Tensor) -> Iterator[_Piece]:
    n_batch, at_once = q.shape[0], q.shape[0]
    if is_sixteen_bit(q.dtype):
        at_once = max(1, CONVERTED_AT_ONCE // max(1, q[0].numel() * 4))
    for batch, keys in _key_runs(sight, n_batch):
        for start in range(batch.start, batch.stop, at_once):
            part = slice(start, min(start + at_once, batch.stop))
            yield from _row_pieces(sight, part, keys)


def _key_runs(sight: Sight, n_batch: int) -> Iterator[tuple[slice, slice | Tensor]]:
    """Group neighbouring batch rows that keep the same keys."""
    everything = slice(0, sight.s)
    if sight.band is None or sight.band.keep is None:
        yield slice(0, n_batch), everything
        return
    kept = [row.nonzero()[:, 0] for row in sight.band.keep.expand(n_batch, -1)]
    start = 0
    for i in range(1, n_batch + 1):
        if i < n_batch and torch.equal(kept[i], kept[start]):
            continue
        index = kept[start]
        one_run = len(index) and int(index[-1] - index[0]) + 1 == len(index)
        run = slice(int(index[0]), int(index[-1]) + 1) if one_run else index
        yield slice(start, i), run
        start = i


def _row_pieces(sight: Sight, batch: slice, keys: slice | Tensor) -> Iterator[_Piece]:
    t, band = sight.t, sight.band
    n_keys = keys.stop - keys.start if isinstance(keys, slice) else len(keys)
    if n_keys == 0:
        return
    if band is not None and band.lower is None and band.upper is None:
        yield _Piece(batch, slice(0, t), keys, is_causal=False, is_full=True)
        return
    whole = isinstance(keys, slice) and keys == slice(0, sight.s)
    causal = band is not None and band.lower is None and band.upper == 0 and whole
    if causal and (t <= SPLIT_ROWS or t > KERNEL_IS_CAUSAL_FROM):
        yield _Piece(batch, slice(0, t), keys, is_causal=True, is_full=True)
        return
    for start in range(0, t, SPLIT_ROWS):
        rows = slice(start, min(start + SPLIT_ROWS, t))
        seen, is_full = keys, False
        if band is not None and isinstance(keys, slice):
            first, last = band.keys_of(rows.start, rows.stop - 1, sight.s)
            seen = slice(max(first, keys.start), min(last, keys.stop))
            if seen.start >= seen.stop:
                continue
            is_full = band.is_full(rows.start, rows.stop - 1, seen.start, seen.stop)
        yield _Piece(batch, rows, seen, is_causal=False, is_full=is_full)


def _attended(
    problem: Problem, sight: Sight, pieces: list[_Piece], *, keep: bool
) -> tuple[Tensor, list[Kept]]:
    """Give the output, rounded once, and what its gradients want; rows without a key are unset."""
    dtype, work = problem.q.dtype, compute_dtype(problem.q.dtype)
    in_one = len(pieces) == 1 and pieces[0].is_whole(problem)
    out = torch.empty_like(problem.q)
    kept = []
    for piece in pieces:
        inputs = piece.inputs(problem.q, problem.k, problem.v, work)
        target = None if in_one and dtype == work else out[piece.batch, :, piece.rows]
        added, how = piece.mask(problem, sight, work), piece.how(problem)
        part, wanted = attend(*inputs, added, how, keep=keep, out=target)
        out = part if target is None else out
        kept.append(wanted)
    return out, kept


class _Fused(torch.autograd.Function):
    """The pieces with their own backward; the exact formula for derivatives beyond the first."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        problem: Problem,
        sight: Sight,
        pieces: list[_Piece],
        exact: Exact,
    ) -> Tensor:
        out, kept = _attended(problem, sight, pieces, keep=True)
        # The bias is saved so that autograd refuses one that was written to in between.
        needed = (x for own in kept for x in own)
        ctx.save_for_backward(q, k, v, problem.bias, *needed, *sight.tensors)
        ctx.rest = (problem, sight, pieces, [len(own) for own in kept], exact)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, _, *saved = ctx.saved_tensors
        problem, sight, pieces, counts, exact = ctx.rest
        if torch.is_grad_enabled():
            _checks.check_no_dropout(problem.dropout_p)
            wanted = [x for x in (q, k, v) if x.requires_grad]
            again = exact(problem.with_tensors(q, k, v)).to(grad_out.dtype)
            found = iter(
                torch.autograd.grad(again, wanted, grad_out, create_graph=True, allow_unused=True)
            )
            return (*(next(found) if x.requires_grad else None for x in (q, k, v)), *[None] * 4)
        rest = iter(saved)
        kept = (tuple(islice(rest, n)) for n in counts)
        again = problem.with_tensors(q, k, v)
        return (*_gradients(again, sight, pieces, kept, grad_out), *[None] * 4)


def _gradients(
    problem: Problem,
    sight: Sight,
    pieces: list[_Piece],
    saved: Iterable[Kept],
    grad_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (problem.q, problem.k, problem.v)
    dtype, work = problem.q.dtype, compute_dtype(problem.q.dtype)

    def of_piece(piece: _Piece, kept: Kept) -> tuple[Tensor, Tensor, Tensor]:
        grad = grad_out[piece.batch, :, piece.rows].to(work)
        added = piece.mask(problem, sight, work)
        return gradients(grad, *piece.inputs(*inputs, work), added, kept, piece.how(problem))

    if len(pieces) == 1 and pieces[0].is_whole(problem):
        dq, dk, dv = of_piece(pieces[0], *saved)
        return dq.to(dtype), dk.to(dtype), dv.to(dtype)
    # Keys that several pieces share gather their gradient in the dtype computed in.
    shared = len({piece.batch.start for piece in pieces}) < len(pieces)
    dq, dk, dv = (torch.zeros_like(x, dtype=work if shared else dtype) for x in inputs)
    for piece, kept in zip(pieces, saved, strict=True):
        parts = of_piece(piece, kept)
        dq[piece.batch, :, piece.rows] = parts[0]
        for whole, part in ((dk, parts[1]), (dv, parts[2])):
            piece.add_keys(whole, part)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)
