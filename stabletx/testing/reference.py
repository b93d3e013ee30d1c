"""Attention in float64, written to be read: the judge of every other implementation.

It shares no code with the rest of the library. Pairs that a mask blocks do not exist: nothing
that lies there is ever touched by arithmetic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stabletx.testing._problem import (
    HUGE,
    Problem,
    prepare,
    products_of,
    sum_over_groups,
    times_power,
)

# A row whose largest score is larger, of either sign, is computed with a power of two taken out.
_HIGH = 2.0**900


class Reference(NamedTuple):
    """What :func:`reference_attention` returns, all float64 and on the CPU.

    Attributes:
        out: (b, h, t, e).
        weights: (b, h, t, s), exactly 0 where blocked.
        lse: (b, h, t), logsumexp of a row's scores with the sink; -inf for an empty row.
        max_score: (b, h, t), the largest allowed score, the sink left out; -inf for an empty row.
        entropy: (b, h, t), nats; 0 for an empty row.
    """

    out: Tensor
    weights: Tensor
    lse: Tensor
    max_score: Tensor
    entropy: Tensor


class Gradients(NamedTuple):
    """Gradients in the shapes of the inputs, float64; None where the input is."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None = None
    dsinks: Tensor | None = None


class Rows(NamedTuple):
    """The softmax of a problem, before anything non-finite is put back."""

    scores: Tensor  # (b, h, t, s), -inf where blocked; times 2 ** -power in high rows
    power: int  # exponent taken out of the scores of high rows, 0 for ordinary magnitudes
    high: Tensor  # (b, h, t), rows whose largest score nears the end of float64's range
    products: Tensor  # (b, h, t, s), scale * q k^T before softcap and bias, at most HUGE
    weights: Tensor  # (b, h, t, s)
    sink_weight: Tensor  # (b, h, t), 0 without a sink
    row_max: Tensor  # (b, h, t), the sink included, 0 for an empty row; as the scores
    log_sum: Tensor  # (b, h, t), log of the sum of exp(score - row_max)

    def plain(self, x: Tensor) -> Tensor:  # (b, h, t) or (b, h, t, s)
        """Put the power back into what has the units of the scores."""
        if not self.power:
            return x
        high = self.high if x.ndim == 3 else self.high.unsqueeze(-1)
        return torch.where(high, times_power(x, self.power), x)


def softmax_rows(problem: Problem) -> Rows:
    """Compute scores and weights of every row."""
    power = problem.powers["q"] + problem.powers["k"]
    products = products_of(problem, problem.q, problem.k, problem.scale)
    scores = products
    if problem.softcap is not None:
        scores = problem.softcap * torch.tanh(products / problem.softcap)
        power = 0
    if problem.bias is not None:
        scores = scores + problem.bias
    scores = scores.masked_fill(~problem.allowed, -torch.inf)
    sink = torch.full_like(problem.has_key, -torch.inf, dtype=torch.float64)
    if problem.sinks is not None:
        sink = problem.sinks[None, :, None].expand_as(sink)
    high = torch.zeros_like(problem.has_key)
    if power and scores.shape[-1]:
        high = torch.maximum(scores.amax(-1), sink).abs() > _HIGH
        sink = torch.where(high, times_power(sink, -power), sink)
        scores = torch.where(high.unsqueeze(-1), _tame_scores(problem, power), scores)
    row_max = torch.cat([scores, sink.unsqueeze(-1)], dim=-1).amax(-1)
    row_max = torch.where(row_max.isneginf(), 0.0, row_max)
    shifts, sink_shift = scores - row_max.unsqueeze(-1), sink - row_max
    if power:
        shifts = torch.where(high.unsqueeze(-1), times_power(shifts, power), shifts)
        sink_shift = torch.where(high, times_power(sink_shift, power), sink_shift)
    exps, sink_exp = shifts.exp(), sink_shift.exp()
    total = exps.sum(-1) + sink_exp
    divisor = torch.where(total == 0, 1.0, total)
    return Rows(
        scores=scores,
        power=power,
        high=high,
        products=products.clamp(-HUGE, HUGE),
        weights=exps / divisor.unsqueeze(-1),
        sink_weight=sink_exp / divisor,
        row_max=row_max,
        log_sum=total.log(),
    )


def _tame_scores(problem: Problem, power: int) -> Tensor:  # (b, h, t, s)
    """Compute the scores times ``2 ** -power``, -inf where blocked."""
    scores = problem.scale * (problem.q @ problem.k.mT)
    if problem.bias is not None:
        scores = scores + times_power(problem.bias, -power)
    return scores.masked_fill(~problem.allowed, -torch.inf)


def reference_attention(
    q: Tensor,  # (b, h, t, d)
    k: Tensor,  # (b, g, s, d)
    v: Tensor,  # (b, g, s, e)
    *,
    mask: Tensor | None = None,  # bool, (b, h, t, s), each axis full or 1
    bias: Tensor | None = None,  # (b, h, t, s), each axis full or 1
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (h,)
) -> Reference:
    """Compute attention in float64, as exactly as the formula allows.

    Args:
        q: queries of any float dtype; head ``i`` reads key/value head ``i * g // h``.
        k: keys.
        v: values.
        mask: True = may attend.
        bias: added to the scaled, soft-capped scores; -inf blocks.
        scale: factor on the products; None takes ``d ** -0.5``.
        softcap: ``softcap * tanh(scores / softcap)``; None leaves the scores alone.
        sinks: one score a head that joins each row's denominator only.

    Returns:
        Output, weights and row statistics. An empty row has output and weights 0. A row that
        attends something that is not finite is NaN (a value: in its own channels only).

    Raises:
        ValueError: shapes that do not fit.
        TypeError: a mask that is not boolean with 4 axes.

    Numerics: float64 with powers of two taken out of huge inputs; within a few ulps of the
        condition scale, for every finite input in any dtype.
    Source: Vaswani et al. (2017), section 3.2.1.

    >>> q = k = torch.zeros(1, 1, 1, 4)
    >>> reference_attention(q, k, torch.full((1, 1, 1, 2), 3.0)).out
    tensor([[[[3., 3.]]]], dtype=torch.float64)
    """
    options = {"mask": mask, "bias": bias, "scale": scale, "softcap": softcap, "sinks": sinks}
    problem = prepare(q, k, v, None, **options)  # type: ignore[arg-type]
    rows = softmax_rows(problem)
    nan = problem.nan_rows
    max_score = torch.full_like(rows.row_max, -torch.inf)
    if rows.scores.shape[-1]:
        max_score = rows.scores.amax(-1)
    log_weights = rows.plain(rows.scores - rows.row_max.unsqueeze(-1))
    log_weights = log_weights - rows.log_sum.unsqueeze(-1)
    surprise = torch.where(rows.weights > 0, -rows.weights * log_weights, 0.0)
    return Reference(
        out=exact_output(problem, rows),
        weights=rows.weights.masked_fill(nan.unsqueeze(-1) & problem.allowed, torch.nan),
        lse=(rows.plain(rows.row_max) + rows.log_sum).masked_fill(nan, torch.nan),
        max_score=rows.plain(max_score).masked_fill(nan, torch.nan),
        entropy=surprise.sum(-1).masked_fill(nan, torch.nan),
    )


def reference_gradients(
    q: Tensor,  # (b, h, t, d)
    k: Tensor,  # (b, g, s, d)
    v: Tensor,  # (b, g, s, e)
    grad_out: Tensor,  # (b, h, t, e)
    *,
    mask: Tensor | None = None,  # bool, (b, h, t, s), each axis full or 1
    bias: Tensor | None = None,  # (b, h, t, s), each axis full or 1
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (h,)
) -> Gradients:
    """Compute the gradients of ``(attention * grad_out).sum()`` in float64, by formula.

    Args:
        q: as in :func:`reference_attention`, like all that is not named here.
        k: keys.
        v: values.
        grad_out: upstream gradient. What it holds in empty rows is never looked at.
        mask: True = may attend.
        bias: added to the scores; its gradient is summed over the axes of size 1.
        scale: None takes ``d ** -0.5``.
        softcap: None leaves the scores alone.
        sinks: one score a head.

    Returns:
        dq, dk, dv, dbias and dsinks. A row that attends something that is not finite has NaN in
        dq and passes it on to what it attends, and to nothing else.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: a mask that is not boolean with 4 axes.

    Numerics: float64 with powers of two taken out of huge inputs.
    Source: Dao et al. (2022), appendix B.2.

    >>> one = torch.ones(1, 1, 1, 1)
    >>> reference_gradients(one, one, one, one).dv
    tensor([[[[1.]]]], dtype=torch.float64)
    """
    options = {"mask": mask, "bias": bias, "scale": scale, "softcap": softcap, "sinks": sinks}
    problem = prepare(q, k, v, grad_out, **options)  # type: ignore[arg-type]
    rows = softmax_rows(problem)
    return exact_gradients(problem, rows, score_gradients(problem, rows))


def exact_output(problem: Problem, rows: Rows) -> Tensor:  # (b, h, t, e)
    """Compute the output, NaN where something that is not finite reaches it."""
    out = times_power(_weighted_values(problem, rows), problem.powers["v"])
    nan = problem.nan_rows.unsqueeze(-1) | _reaches(problem.allowed, problem.nan_v)
    return out.masked_fill(nan, torch.nan)


def exact_gradients(problem: Problem, rows: Rows, back: ScoreGradients) -> Gradients:
    """Take the gradients from the scores to every input."""
    lost = _lost_rows(problem)
    ev_eg = problem.powers["v"] + problem.powers["g"]
    dbias = dsinks = None
    if problem.bias is not None:
        full = back.scores.masked_fill(lost.unsqueeze(-1) & problem.allowed, torch.nan)
        dbias = times_power(full.sum_to_size(problem.bias_shape), ev_eg)
    if problem.sinks is not None:
        pulls = (-rows.sink_weight * back.mean).masked_fill(lost, torch.nan)
        dsinks = times_power(pulls.sum((0, 2)), ev_eg)
    return Gradients(*_input_gradients(problem, rows, back, lost), dbias, dsinks)


def _lost_rows(problem: Problem) -> Tensor:  # (b, h, t)
    """Tell the rows in which something that is not finite meets the gradient of the scores."""
    return problem.nan_rows | (_reaches(problem.allowed, problem.nan_v) | problem.nan_g).any(-1)


def _input_gradients(
    problem: Problem, rows: Rows, back: ScoreGradients, lost: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Take the gradient of the scores to q and k, and that of the output to v."""
    assert problem.grad_out is not None
    dq, dk, dv = back.inputs
    # Values meet weights only: a row whose weights are whole gives them an exact gradient.
    nan_k = (problem.allowed & lost.unsqueeze(-1)).any(-2).unsqueeze(-1)
    nan_v = (problem.allowed & problem.nan_rows.unsqueeze(-1)).any(-2).unsqueeze(-1)
    nan_v = nan_v | _reaches(problem.allowed.transpose(-1, -2), problem.nan_g)
    eq, ek, ev, eg = (problem.powers[name] for name in ("q", "k", "v", "g"))
    dk = sum_over_groups(dk.masked_fill(nan_k, torch.nan), problem.n_kv_heads)
    dv = sum_over_groups(dv.masked_fill(nan_v, torch.nan), problem.n_kv_heads)
    return (
        times_power(dq, ek + ev + eg).masked_fill(lost.unsqueeze(-1), torch.nan),
        times_power(dk, eq + ev + eg),
        times_power(dv, eg),
    )


class ScoreGradients(NamedTuple):
    """The backward pass down to the scores, in the scaled units of the problem."""

    pulls: Tensor  # (b, h, t, s), grad_out . v
    mean: Tensor  # (b, h, t), the weighted mean of the pulls; a sink pulls with 0
    scores: Tensor  # (b, h, t, s), gradient of the scores
    products: Tensor  # (b, h, t, s), gradient of scale * q k^T, below the soft-cap
    inputs: tuple[Tensor, Tensor, Tensor]  # of q, k and v, a head of k and v for each of q


def score_gradients(problem: Problem, rows: Rows) -> ScoreGradients:
    """Take the upstream gradient back to the scores."""
    assert problem.grad_out is not None
    pulls = problem.grad_out @ problem.v.mT
    mean = (rows.weights * pulls).sum(-1)
    scores = rows.weights * (pulls - mean.unsqueeze(-1))
    products = scores
    if problem.softcap is not None:
        products = scores * sech2(rows.products / problem.softcap)
    dq, dk = problem.scale * (products @ problem.k), problem.scale * (products.mT @ problem.q)
    dv = rows.weights.mT @ problem.grad_out
    return ScoreGradients(pulls, mean, scores, products, (dq, dk, dv))


def sech2(x: Tensor) -> Tensor:
    """Compute ``1 - tanh(x) ** 2`` without cancellation."""
    small = (-2.0 * x.abs()).exp()
    return 4.0 * small / (1.0 + small) ** 2


def _weighted_values(problem: Problem, rows: Rows) -> Tensor:
    out = rows.weights @ problem.v
    if not problem.v.shape[2]:
        return out
    # A mean is no larger than what it is a mean of; rounding could lift it past the largest float.
    largest = problem.v.abs().amax(2, keepdim=True)
    return out.clamp(-largest, largest)


def _reaches(allowed: Tensor, bad: Tensor) -> Tensor:
    """Tell which rows see a bad entry, channel by channel: (t, s), (s, e) -> (t, e)."""
    if not bad.any():
        return torch.zeros(*allowed.shape[:-1], bad.shape[-1], dtype=torch.bool)
    return (allowed.double() @ bad.double()) > 0
