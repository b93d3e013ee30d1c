"""Attention through torch's fused CPU kernel, on as little of the problem as gives the answer.

The kernel keeps the contract where its inputs are finite and its scores are moderate
(``_guards.within_limits``). It sees float32 or float64 only: 16-bit inputs are converted, which is
more accurate and, for float16, several times faster than the kernel's own 16-bit code.

Keys that a batch row may not see are cut off rather than masked, and a causal or windowed problem
is split by queries where that saves work, so blocked keys cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stabletx._precision import compute_dtype, is_sixteen_bit
from stabletx.functional._guards import repeat_heads
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
        """Cut out what the kernel reads, as it wants it."""
        block = q[self.batch, :, self.rows]
        parts = (x.to(work) for x in (block, self.cut(k), self.cut(v)))
        q, k, v = (_last_stride_one(x) for x in parts)
        return q, k, v

    def add_keys(self, whole: Tensor, part: Tensor) -> None:
        """Add to the gradient of the keys that the piece read."""
        if isinstance(self.keys, slice):
            whole[self.batch, :, self.keys] += part
        else:
            whole[self.batch].index_add_(2, self.keys, part.to(whole.dtype))

    def mask(self, problem: Problem, sight: Sight, dtype: torch.dtype) -> Tensor | None:
        """Write out what the kernel adds to the scores: the bias, -inf where blocked."""
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
        n_rows = self.rows.stop - self.rows.start
        return added.expand(
            self.batch.stop - self.batch.start, problem.q.shape[1], n_rows, len(cols)
        )


def can_fuse(problem: Problem) -> str:
    """Say why the kernel cannot express this problem; an empty text where it can."""
    if problem.q.device.type != "cpu":
        return "the tensors are not on the CPU"
    if problem.softcap is not None:
        return "a soft-cap"
    if problem.sinks is not None:
        return "sinks"
    if problem.dropout_p > 0:
        return "dropout on the weights"
    if problem.bias is not None and problem.bias.requires_grad and torch.is_grad_enabled():
        return "a bias that wants a gradient"
    if problem.q.shape[3] != problem.v.shape[3]:
        return "values of another width than the queries"
    if 0 in problem.q.shape or 0 in problem.k.shape:
        return "an axis of size 0"
    return ""


def fused(problem: Problem, sight: Sight, exact: Exact) -> Tensor:
    """Attend through the fused kernel, in the dtype of q; ``exact`` serves higher derivatives."""
    pieces = list(_pieces(sight, problem.q))
    out: Tensor
    if problem.needs_grad:
        out = _Fused.apply(  # type: ignore[no-untyped-call]
            problem.q, problem.k, problem.v, problem, sight, pieces, exact
        )
    else:
        out = _assemble(problem, pieces, (part for part, _ in _parts(problem, sight, pieces)))
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


def _parts(problem: Problem, sight: Sight, pieces: list[_Piece]) -> Iterator[tuple[Tensor, Tensor]]:
    """Run the kernel on each piece; its output and logsumexp, in the dtype computed in."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    work = compute_dtype(problem.q.dtype)
    for piece in pieces:
        q, k, v = piece.inputs(problem.q, problem.k, problem.v, work)
        mask = piece.mask(problem, sight, work)
        yield kernel(q, k, v, 0.0, piece.is_causal, attn_mask=mask, scale=problem.scale)


def _assemble(problem: Problem, pieces: list[_Piece], parts: Iterable[Tensor]) -> Tensor:
    """Put the pieces' outputs together, rounded once; rows without a key are left as they are."""
    out = None
    for piece, part in zip(pieces, parts, strict=True):
        if len(pieces) == 1 and tuple(part.shape) == problem.out_shape:
            return part.to(problem.q.dtype)
        out = problem.q.new_empty(problem.out_shape) if out is None else out
        out[piece.batch, :, piece.rows] = part
    return problem.q.new_zeros(problem.out_shape) if out is None else out


def _last_stride_one(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _Fused(torch.autograd.Function):
    """The kernel with its own backward, and the exact formula for derivatives beyond the first."""

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
        saved = list(_parts(problem, sight, pieces))
        out = _assemble(problem, pieces, (part for part, _ in saved))
        # The row term of the backward pass wants the output as it was before it was rounded.
        ctx.save_for_backward(q, k, v, *(x for pair in saved for x in pair))
        ctx.rest = (problem, sight, pieces, exact)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *saved = ctx.saved_tensors
        problem, sight, pieces, exact = ctx.rest
        if torch.is_grad_enabled():
            wanted = [x for x in (q, k, v) if x.requires_grad]
            again = exact(problem.with_tensors(q, k, v)).to(grad_out.dtype)
            found = iter(
                torch.autograd.grad(again, wanted, grad_out, create_graph=True, allow_unused=True)
            )
            return (*(next(found) if x.requires_grad else None for x in (q, k, v)), *[None] * 4)
        pairs = zip(saved[::2], saved[1::2], strict=True)
        return (
            *_gradients(problem.with_tensors(q, k, v), sight, pieces, pairs, grad_out),
            *[None] * 4,
        )


def _gradients(
    problem: Problem,
    sight: Sight,
    pieces: list[_Piece],
    saved: Iterable[tuple[Tensor, Tensor]],
    grad_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    inputs = (problem.q, problem.k, problem.v)
    work = compute_dtype(problem.q.dtype)
    # Keys that several pieces share gather their gradient in the dtype computed in.
    shared = len({piece.batch.start for piece in pieces}) < len(pieces)
    gathered = work if shared else problem.q.dtype
    dq, dk, dv = (torch.zeros_like(x, dtype=gathered) for x in inputs)
    for piece, (out, log) in zip(pieces, saved, strict=True):
        q, k, v = piece.inputs(*inputs, work)
        part = _last_stride_one(grad_out[piece.batch, :, piece.rows].to(work))
        mask = piece.mask(problem, sight, work)
        parts = kernel(
            part, q, k, v, out, log, 0.0, piece.is_causal, attn_mask=mask, scale=problem.scale
        )
        if len(pieces) == 1 and parts[0].shape == dq.shape and parts[1].shape == dk.shape:
            return parts[0].to(dq.dtype), parts[1].to(dq.dtype), parts[2].to(dq.dtype)
        dq[piece.batch, :, piece.rows] = parts[0]
        for whole, part in ((dk, parts[1]), (dv, parts[2])):
            piece.add_keys(whole, part)
    dtype = problem.q.dtype
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)
