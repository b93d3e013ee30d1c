"""Attention by tiles: an online softmax in memory linear in length, forward and backward.

This is the path for what the fused kernel cannot express (a bias with gradient, a soft-cap, sinks,
dropout, the logsumexp with gradient) and for rows whose scores are too large for it. The largest
score and the sum of a row are kept apart, so the backward pass rebuilds the weights as
``exp(score - max) / sum`` and a common offset of the scores costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from stabletx import _checks
from stabletx.functional._problem import Problem
from stabletx.functional._sight import Sight

QUERIES, KEYS = 128, 256  # as fast as any tile measured on a CPU, in the least memory


class Rows(NamedTuple):
    """What the softmax keeps of each query row; every field is (b, h, t)."""

    out: Tensor  # (b, h, t, e)
    top: Tensor  # the largest score, a sink included; -inf where the row is empty
    total: Tensor  # sum of exp(score - top), a sink included
    max_score: Tensor  # the largest score over the keys alone
    entropy: Tensor  # of the weights over the keys, nats; 0 where the row is empty


Exact = Callable[[Problem], tuple[Tensor, Tensor]]


def tiled(
    problem: Problem, sight: Sight, work: torch.dtype, exact: Exact, *, entropy: bool
) -> tuple[Tensor, Tensor, Rows]:
    """Attend by tiles in dtype ``work``.

    Args:
        problem: finite where it may be seen.
        sight: who sees whom.
        work: dtype to compute in.
        entropy: compute it; it costs two passes over every tile.
        exact: gives (out, lse) by plain operations, for derivatives beyond the first.

    Returns:
        out and lse in ``work``, both with gradient, and what was kept of each row, without.
    """
    bias = None if problem.bias is None else problem.bias.to(work)
    sinks = None if problem.sinks is None else problem.sinks.to(work)
    q, k, v = (x.to(work).contiguous() for x in (problem.q, problem.k, problem.v))
    seed = int(torch.randint(2**62, ())) if problem.dropout_p > 0 else 0
    plan = _Plan(problem, sight, seed, entropy)
    out, lse, *rows = _Tiled.apply(q, k, v, bias, sinks, plan, exact)  # type: ignore[no-untyped-call]
    return out, lse, Rows(out.detach(), *rows)


@dataclass(frozen=True)
class _Plan:
    """Which tiles there are, and what is done to the scores of one."""

    problem: Problem
    sight: Sight
    seed: int
    entropy: bool

    def query_blocks(self) -> Iterator[slice]:
        for start in range(0, self.sight.t, QUERIES):
            yield slice(start, min(start + QUERIES, self.sight.t))

    def key_blocks(self, rows: slice) -> Iterator[slice]:
        band, s = self.sight.band, self.sight.s
        first, last = (0, s) if band is None else band.keys_of(rows.start, rows.stop - 1, s)
        for start in range(first, last, KEYS):
            yield slice(start, min(start + KEYS, last))

    def allowed(self, rows: slice, cols: slice) -> Tensor | None:
        band = self.sight.band
        if (
            band is not None
            and band.keep is None
            and band.is_full(rows.start, rows.stop - 1, cols.start, cols.stop)
        ):
            return None
        index = torch.arange(cols.start, cols.stop, device=self.sight.device)
        return self.sight.tile(rows, index)

    def scores(
        self, q: Tensor, k: Tensor, bias: Tensor | None, rows: slice, cols: slice
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the scores of one tile, and the slope that a soft-cap leaves."""
        scores = grouped_product(q * self.problem.scale, k[:, :, cols].transpose(-1, -2))
        slope = None
        if self.problem.softcap is not None:
            capped = (scores / self.problem.softcap).tanh_()
            slope = 1 - capped * capped
            scores = capped.mul_(self.problem.softcap)
        if bias is not None:
            scores += _cut(bias, rows, cols)
        allowed = self.allowed(rows, cols)
        if allowed is not None:
            scores.masked_fill_(~allowed, -torch.inf)
        return scores, slope

    def kept(self, scores: Tensor, rows: slice, cols: slice) -> Tensor | None:
        """Draw the weights that dropout keeps, the same in every pass, already rescaled."""
        p = self.problem.dropout_p
        if p == 0:
            return None
        generator = torch.Generator(scores.device)
        generator.manual_seed((self.seed + rows.start * 1_000_003 + cols.start) % 2**63)
        drawn = torch.rand(
            scores.shape, dtype=scores.dtype, device=scores.device, generator=generator
        )
        return (drawn >= p).to(scores.dtype).div_(1 - p)


def grouped_product(a: Tensor, b: Tensor) -> Tensor:  # (b, h, r, x), (b, g, x, y) -> (b, h, r, y)
    """Multiply per query head by its key/value head, without repeating the latter."""
    if a.shape[1] == b.shape[1]:
        return torch.matmul(a, b)
    g = b.shape[1]
    rows = rearrange(a, "b (g n) r x -> b g (n r) x", g=g)
    return rearrange(torch.matmul(rows, b), "b g (n r) y -> b (g n) r y", r=a.shape[2])


def _grouped_sum(a: Tensor, b: Tensor, n_groups: int) -> Tensor:  # -> (b, g, x, y)
    """Sum ``a^T b`` over the rows and over the query heads of each group."""
    a = rearrange(a, "b (g n) r x -> b g x (n r)", g=n_groups)
    b = rearrange(b, "b (g n) r y -> b g (n r) y", g=n_groups)
    return torch.matmul(a, b)


def _cut(bias: Tensor, rows: slice, cols: slice) -> Tensor:
    bias = bias if bias.shape[2] == 1 else bias[:, :, rows]
    return bias if bias.shape[3] == 1 else bias[..., cols]


def _forward_block(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None,
    plan: _Plan, rows: slice,
) -> Rows:  # fmt: skip
    block = q[:, :, rows]
    top = block.new_full(block.shape[:3], -torch.inf)
    total, pull = torch.zeros_like(top), torch.zeros_like(top)
    acc = block.new_zeros(*block.shape[:3], v.shape[3])
    for cols in plan.key_blocks(rows):
        scores, _ = plan.scores(block, k, bias, rows, cols)
        higher = torch.maximum(top, scores.amax(-1))
        base = torch.where(higher == -torch.inf, 0.0, higher)
        scores.sub_(base[..., None])
        weights = scores.exp() if plan.entropy else scores.exp_()
        keep = torch.exp(top - base)
        if plan.entropy:
            # It needs the sum of weight * score; blocked scores are -inf and weigh nothing.
            pulled = weights * torch.where(weights > 0, scores, 0.0)
            shift = torch.where(top == -torch.inf, 0.0, top - base)
            pull = keep * (pull + shift * total) + pulled.sum(-1)
        total = keep * total + weights.sum(-1)
        dropped = plan.kept(weights, rows, cols)
        if dropped is not None:
            weights.mul_(dropped)
        acc.mul_(keep[..., None]).add_(grouped_product(weights, v[:, :, cols]))
        top = higher
        del scores, weights, dropped  # before the next tile takes its memory
    return _finish(acc, top, total, pull, sinks)


def _finish(acc: Tensor, top: Tensor, total: Tensor, pull: Tensor, sinks: Tensor | None) -> Rows:
    max_score = top
    keys_total = total
    if sinks is not None:
        sink = sinks[None, :, None]
        higher = torch.maximum(top, sink)
        base = torch.where(higher == -torch.inf, 0.0, higher)
        keep = torch.exp(top - base)
        shift = torch.where(top == -torch.inf, 0.0, top - base)
        pull = keep * (pull + shift * total)
        keys_total = keep * total
        total = keys_total + torch.exp(sink - base)
        acc = acc * keep[..., None]
        top = higher
    divisor = torch.where(total == 0, 1.0, total)
    entropy = (keys_total * divisor.log() - pull) / divisor
    out = torch.where((max_score == -torch.inf)[..., None], 0.0, acc / divisor[..., None])
    return Rows(out, top, total, max_score, entropy)


class _Tiled(torch.autograd.Function):
    """The tiles, with a backward pass that computes them again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        sinks: Tensor | None,
        plan: _Plan,
        exact: Exact,
    ) -> tuple[Tensor, ...]:
        b, h, t, _ = q.shape
        rows = Rows(
            q.new_zeros(b, h, t, v.shape[3]),
            *(q.new_full((b, h, t), fill) for fill in (-torch.inf, 0.0, -torch.inf, 0.0)),
        )
        with torch.autocast(q.device.type, enabled=False):
            for block in plan.query_blocks():
                parts = _forward_block(q, k, v, bias, sinks, plan, block)
                for whole, part in zip(rows, parts, strict=True):
                    whole[:, :, block] = part
        lse = rows.top + rows.total.log()
        lse = torch.where(rows.top == -torch.inf, -torch.inf, lse)
        watched = plan.sight.tensors
        ctx.save_for_backward(q, k, v, bias, sinks, rows.out, rows.top, rows.total, *watched)
        ctx.rest = (plan, exact)
        ctx.mark_non_differentiable(*rows[1:])
        return rows.out, lse, *rows[1:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, sinks, out, top, total, *_ = ctx.saved_tensors
        plan, exact = ctx.rest
        inputs = (q, k, v, bias, sinks)
        if torch.is_grad_enabled():
            _checks.check_no_dropout(plan.problem.dropout_p)
            wanted = [x for x in inputs if x is not None and x.requires_grad]
            problem = plan.problem.with_tensors(q, k, v).with_extras(bias, sinks)
            # Where v alone wants a gradient, lse has none.
            again = [(x, y) for x, y in zip(exact(problem), grads, strict=False) if x.requires_grad]
            outs, pushes = zip(*again, strict=True)
            found = iter(
                torch.autograd.grad(outs, wanted, pushes, create_graph=True, allow_unused=True)
            )
            given = (next(found) if x is not None and x.requires_grad else None for x in inputs)
            return (*given, None, None)
        whole = _Gradients.zeros(inputs)
        for rows in plan.query_blocks():
            saved = _Saved(
                out[:, :, rows], top[:, :, rows], total[:, :, rows],
                grads[0][:, :, rows], grads[1][:, :, rows],
            )  # fmt: skip
            with torch.autocast(q.device.type, enabled=False):
                _backward_block(q, k, v, bias, sinks, plan, rows, saved, whole)
        return (whole.q, whole.k, whole.v, whole.bias, whole.sinks, None, None)


class _Saved(NamedTuple):
    out: Tensor
    top: Tensor
    total: Tensor
    grad_out: Tensor
    grad_lse: Tensor


class _Gradients(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    sinks: Tensor | None

    @staticmethod
    def zeros(inputs: tuple[Tensor | None, ...]) -> _Gradients:
        made = (None if x is None else torch.zeros_like(x) for x in inputs)
        return _Gradients(*made)  # type: ignore[arg-type]


def _backward_block(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None,
    plan: _Plan, rows: slice, saved: _Saved, whole: _Gradients,
) -> None:  # fmt: skip
    block, g = q[:, :, rows], k.shape[1]
    base = torch.where(saved.top == -torch.inf, 0.0, saved.top)
    inverse = torch.where(saved.total == 0, 0.0, 1 / saved.total)
    grad_lse = torch.where(saved.total == 0, 0.0, saved.grad_lse)
    grad_out = torch.where((saved.total == 0)[..., None], 0.0, saved.grad_out)
    row_term = (grad_out * saved.out).sum(-1) - grad_lse
    for cols in plan.key_blocks(rows):
        scores, slope = plan.scores(block, k, bias, rows, cols)
        weights = scores.sub_(base[..., None]).exp_().mul_(inverse[..., None])
        grad_weights = grouped_product(grad_out, v[:, :, cols].transpose(-1, -2))
        dropped = plan.kept(weights, rows, cols)
        used = weights
        if dropped is not None:
            used = weights * dropped
            grad_weights.mul_(dropped)
        whole.v[:, :, cols] += _grouped_sum(used, grad_out, g)
        grad_scores = grad_weights.sub_(row_term[..., None]).mul_(weights)
        if whole.bias is not None:
            part = _cut(whole.bias, rows, cols)
            part += grad_scores.sum_to_size(part.shape)
        if slope is not None:
            grad_scores.mul_(slope)
        grad_scores.mul_(plan.problem.scale)
        whole.q[:, :, rows] += grouped_product(grad_scores, k[:, :, cols])
        whole.k[:, :, cols] += _grouped_sum(grad_scores, block, g)
    if sinks is not None and whole.sinks is not None:
        share = torch.exp(sinks[None, :, None] - base) * inverse
        whole.sinks.sub_((share * row_term).sum((0, 2)))
