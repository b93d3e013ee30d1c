"""Attention over runs of equal length through the fused kernel, as one step of the graph.

A ragged batch has many short runs. Guards, checks and bookkeeping are therefore paid once for the
whole batch and not once a run; the kernel reads each run as a view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from stabletx._precision import compute_dtype
from stabletx.packing import Plan, Run

Exact = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend_runs(
    q: Tensor,  # (n_tokens, h, d), in the plan's order
    k: Tensor,  # (n_tokens, g, d)
    v: Tensor,  # (n_tokens, g, d)
    plan: Plan,
    *,
    is_causal: bool,
    exact: Exact,
) -> Tensor:  # (n_tokens, h, d)
    """Attend within each sequence; expects moderate finite values and at least one token.

    ``exact`` computes the same with plain operations, for derivatives beyond the first.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        made: Tensor = _Runs.apply(q, k, v, plan, is_causal, exact)  # type: ignore[no-untyped-call]
        return made
    return _forward(q, k, v, plan, is_causal)[0].to(q.dtype)


def _rows(plan: Plan) -> Iterator[Run]:
    return (run for run in plan.runs if run.length)


# Plain views instead of einops: dozens of runs a layer, a few microseconds each.
def _cut(x: Tensor, run: Run) -> Tensor:  # (n_tokens, h, d) -> (b, t, h, d), a view
    rows = x[run.start : run.start + run.n_rows * run.length]
    return rows.view(run.n_rows, run.length, x.shape[1], x.shape[2])


def _heads(x: Tensor, run: Run) -> Tensor:  # -> (b, h, t, d), in the dtype computed in
    return _cut(x, run).transpose(1, 2).to(compute_dtype(x.dtype))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, is_causal: bool
) -> tuple[Tensor, list[Tensor]]:
    """Give the output in the dtype computed in, and the logsumexp of each run."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out = q.new_empty(q.shape, dtype=compute_dtype(q.dtype))
    logs = []
    for run in _rows(plan):
        part, log = kernel(*(_heads(x, run) for x in (q, k, v)), 0.0, is_causal)
        _cut(out, run).copy_(part.transpose(1, 2))
        logs.append(log)
    return out, logs


class _Runs(torch.autograd.Function):
    """The kernel on every run, with its own backward pass."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, is_causal: bool, exact: Exact
    ) -> Tensor:
        out, logs = _forward(q, k, v, plan, is_causal)
        # The row term of the backward pass wants the output as it was before it was rounded.
        ctx.save_for_backward(q, k, v, out, *logs)
        ctx.rest = (plan, is_causal, exact)
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *logs = ctx.saved_tensors
        plan, is_causal, exact = ctx.rest
        inputs = (q, k, v)
        if torch.is_grad_enabled():
            wanted = [x for x in inputs if x.requires_grad]
            again = torch.autograd.grad(exact(*inputs), wanted, grad_out, create_graph=True)
            found = iter(again)
            return (*(next(found) if x.requires_grad else None for x in inputs), None, None, None)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
        grads = [x.new_empty(x.shape) for x in inputs]
        for run, log in zip(_rows(plan), logs, strict=True):
            parts = kernel(*(_heads(x, run) for x in (grad_out, *inputs, out)), log, 0.0, is_causal)
            for whole, part in zip(grads, parts, strict=True):
                _cut(whole, run).copy_(part.transpose(1, 2))
        return (*grads, None, None, None)
