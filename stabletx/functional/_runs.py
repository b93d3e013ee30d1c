"""Attention over runs of equal length through torch's kernels, as one step of the graph.

A ragged batch has many short runs. Guards, checks and bookkeeping are therefore paid once for the
whole batch and not once a run; each run is read as a view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from stabletx import _checks
from stabletx._precision import compute_dtype
from stabletx.functional._kernels import How, Kept, attend, gradients, is_aligned, takes_products
from stabletx.packing import Plan

# Mean length, tokens, from which a sequence is worth operations of its own; measured.
ALONE_FROM = 24

Exact = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend_runs(
    q: Tensor,  # (n_tokens, h, d), in the plan's order
    k: Tensor,  # (n_tokens, g, d)
    v: Tensor,  # (n_tokens, g, d)
    plan: Plan,
    how: How,
    exact: Exact,
) -> Tensor:  # (n_tokens, h, d)
    """Attend within each sequence; expects moderate finite values and at least one token.

    ``exact`` computes the same with plain operations, for derivatives beyond the first.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        made: Tensor = _Runs.apply(q, k, v, plan, how, exact)  # type: ignore[no-untyped-call]
        return made
    if is_short(q, k, v, plan, how):
        with torch.autocast("cpu", enabled=False):
            return _one_by_one(q, k, v, plan, how.scale)
    parts = [attend(q, k, v, None, how, keep=False)[0] for q, k, v in _runs(plan, q, k, v)]
    return _joined(parts, q.dtype)


def is_short(q: Tensor, k: Tensor, v: Tensor, plan: Plan, how: How) -> bool:
    """Tell whether every sequence is best multiplied out by itself, without masks or groups."""
    plain = how.dropout_p == 0 and not how.is_causal and q.shape[1] == k.shape[1]
    plain = plain and all(map(is_aligned, (q, k, v)))  # so that a view has the bits of a copy
    worth_it = plan.n_tokens >= ALONE_FROM * len(plan.rank)
    return plain and worth_it and takes_products(plan.max_length, plan.max_length)


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Tensor:
    """Attend in each sequence by the formula: few operations, for they cost as much as the work."""
    sizes = [run.length for run in plan.runs if run.length for _ in range(run.n_rows)]
    work = compute_dtype(q.dtype)
    base = q.new_empty(1, 1, 1, dtype=work)  # not read
    cut = (torch.split(x.to(work).transpose(0, 1), sizes, dim=1) for x in (q, k, v))
    outs = []
    for queries, keys, values in zip(*cut, strict=True):  # of (h, t, d)
        scores = torch.baddbmm(base, queries, keys.mT, beta=0, alpha=scale)
        out = torch.bmm(torch.softmax(scores, -1, out=scores), values)
        outs.append(out.transpose(0, 1))
    return torch.cat(outs).to(q.dtype)


def _runs(plan: Plan, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut (n_tokens, h, d) into runs (b, h, t, d), in the dtype computed in.

    Plain views instead of einops: dozens of runs a layer, a few microseconds each.
    """
    runs = [run for run in plan.runs if run.length]
    sizes = [run.n_rows * run.length for run in runs]
    work = compute_dtype(tensors[0].dtype)
    for run, *cuts in zip(runs, *(torch.split(x, sizes) for x in tensors), strict=True):
        if run.n_rows == 1:
            heads = [x.transpose(0, 1)[None] for x in cuts]
        else:
            heads = [x.unflatten(0, (run.n_rows, run.length)).transpose(1, 2) for x in cuts]
        yield tuple(heads if heads[0].dtype == work else (x.to(work) for x in heads))


def _joined(parts: list[Tensor], dtype: torch.dtype) -> Tensor:  # of (b, h, t, d) -> (n, h, d)
    rows = [part.transpose(1, 2).flatten(0, 1) for part in parts]
    return (rows[0] if len(rows) == 1 else torch.cat(rows)).to(dtype)


class _Runs(torch.autograd.Function):
    """Attention on every run, with its own backward pass."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, how: How, exact: Exact
    ) -> Tensor:
        made = [attend(a, b, c, None, how, keep=True) for a, b, c in _runs(plan, q, k, v)]
        ctx.save_for_backward(q, k, v, *(x for _, kept in made for x in kept))
        ctx.rest = (plan, how, [len(kept) for _, kept in made], exact)
        return _joined([part for part, _ in made], q.dtype)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *saved = ctx.saved_tensors
        plan, how, counts, exact = ctx.rest
        inputs = (q, k, v)
        if torch.is_grad_enabled():
            _checks.check_no_dropout(how.dropout_p)
            wanted = [x for x in inputs if x.requires_grad]
            again = torch.autograd.grad(exact(*inputs), wanted, grad_out, create_graph=True)
            found = iter(again)
            return (*(next(found) if x.requires_grad else None for x in inputs), *[None] * 3)
        rest = iter(saved)
        grads = []
        for count, run in zip(counts, _runs(plan, grad_out, *inputs), strict=True):
            grad, q_run, k_run, v_run = run
            kept: Kept = tuple(islice(rest, count))
            grads.append(gradients(grad, q_run, k_run, v_run, None, kept, how))
        return (*(_joined(list(x), q.dtype) for x in zip(*grads, strict=True)), *[None] * 3)
