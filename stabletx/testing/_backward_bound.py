"""The backward half of the bound: dq, dk, dv, dbias, dsinks.

``dS = p (dP - delta)`` with ``dP = g v^T`` and ``delta = sum p dP = sum g o``, which kernels
compute either way; the bound covers both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stabletx.testing._forward_bound import ForwardErrors, scaled, stored
from stabletx.testing._problem import Problem, sum_over_groups, times_power
from stabletx.testing._units import Units
from stabletx.testing.reference import Rows, ScoreGradients, sech2

_LARGE = 60.0


class _ScoreErrors(NamedTuple):
    """Absolute errors on the way back, in the scaled units of the problem."""

    weights: Tensor  # (b, h, t, s), as the backward pass has them
    delta: Tensor  # (b, h, t)
    sink: Tensor  # (b, h, t)
    scores: Tensor  # (b, h, t, s)
    products: Tensor  # (b, h, t, s), below the soft-cap


def gradient_bounds(
    problem: Problem, rows: Rows, back: ScoreGradients, forward: ForwardErrors, units: Units
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Bound dq, dk, dv and, where there are such inputs, dbias and dsinks."""
    assert problem.grad_out is not None
    errors = _score_errors(problem, rows, back, forward, units)
    t, s = rows.weights.shape[2:]
    n_rows = t * (problem.q.shape[1] // problem.n_kv_heads)
    eq, ek, ev, eg = (problem.powers[name] for name in ("q", "k", "v", "g"))
    size = abs(problem.scale)
    d_products = back.products.abs()

    def moved(values: Tensor, error: Tensor, n: int) -> Tensor:
        """Join a term's own error and the roundings of a sum of n such terms."""
        return error + units.dot(n + 5) * (values + error)

    to_q, to_k = moved(d_products, errors.products, s), moved(d_products, errors.products, n_rows)
    to_v = moved(rows.weights, errors.weights + units.weights * rows.weights, n_rows)
    dq = size * (to_q @ problem.k.abs())
    dk = size * (to_k.mT @ problem.q.abs())
    dv = to_v.mT @ problem.grad_out.abs()
    exact_q, exact_k, exact_v = back.inputs
    seen = problem.has_key.unsqueeze(-1)
    used = sum_over_groups(problem.used.double(), problem.n_kv_heads).unsqueeze(-1) > 0
    lost = units.grain * max(1.0, size)

    def grouped(error: Tensor, exact: Tensor, power: int) -> Tensor:
        total = times_power(sum_over_groups(error, problem.n_kv_heads), power)
        total = total + (n_rows + 2) * lost
        exact = times_power(sum_over_groups(exact, problem.n_kv_heads), power)
        return torch.where(used, stored(total, exact, units, strict=False), 0.0)

    bound_q = times_power(dq, ek + ev + eg) + (s + 2) * lost
    bound_q = stored(bound_q, times_power(exact_q, ek + ev + eg), units, strict=False)
    return (
        torch.where(seen, bound_q, 0.0),
        grouped(dk, exact_k, eq + ev + eg),
        grouped(dv, exact_v, eg),
        _bias_bound(problem, back, errors, units),
        _sink_bound(problem, rows, back, errors, units),
    )


def _score_errors(
    problem: Problem, rows: Rows, back: ScoreGradients, forward: ForwardErrors, units: Units
) -> _ScoreErrors:
    """Bound ``p (dP - delta)``, factor by factor."""
    assert problem.grad_out is not None
    n, width = problem.v.shape[2:]
    weights, sink = forward.weights, forward.sink
    if units.profile.recompute_from_lse:
        weights, sink = _from_lse(problem, rows, forward, units)
    reach = rows.weights + weights
    grain = scaled(units.grain, -problem.powers["v"] - problem.powers["g"])
    sizes = problem.grad_out.abs() @ problem.v.abs().mT
    pulls = units.dot(width) * sizes + units.scores * back.pulls.abs() + width * grain
    far = (back.pulls - back.mean.unsqueeze(-1)).abs()
    # Weights that sum to 1 whatever their errors move delta by their spread only.
    drift = weights.sum(-1)
    if not units.profile.recompute_from_lse:
        drift = torch.minimum(drift, sink + forward.row_sum)
    by_weights = (weights * far).sum(-1) + back.mean.abs() * drift + (reach * pulls).sum(-1)
    roundings = units.dot(n + 1) + units.weights
    by_weights = by_weights + roundings * (reach * (back.pulls.abs() + pulls)).sum(-1)
    out_error = forward.out
    if units.profile.delta_from_output or units.out <= units.u:
        out_error = out_error + units.out * (forward.exact.abs() + out_error)
    terms = out_error + units.dot(width) * (forward.exact.abs() + out_error)
    by_output = (problem.grad_out.abs() * terms).sum(-1)
    delta = torch.maximum(by_weights, by_output)
    inner = pulls + delta[..., None] + 3 * units.u * (back.pulls.abs() + back.mean.abs()[..., None])
    scores = weights * far + reach * inner
    scores = scores + units.weights * (back.scores.abs() + scores) + 2 * grain
    scores = torch.where(problem.allowed, scores, 0.0)
    products = _through_softcap(problem, rows, back, forward, scores, units)
    return _ScoreErrors(weights, delta, sink, scores, products)


def _from_lse(
    problem: Problem, rows: Rows, forward: ForwardErrors, units: Units
) -> tuple[Tensor, Tensor]:
    """Widen the weights by what one rounded logsumexp loses: about u times its size."""
    row_max = rows.plain(rows.row_max)
    lse = (row_max + rows.log_sum).nan_to_num(neginf=0.0)
    lost = 2 * units.u * (row_max.abs() + lse.abs() + rows.log_sum.nan_to_num(neginf=0.0).abs())
    factor = lost.clamp(max=_LARGE).exp()
    weights = (rows.weights + forward.weights) * factor.unsqueeze(-1) - rows.weights
    sink = (rows.sink_weight + forward.sink) * factor - rows.sink_weight
    return torch.where(problem.allowed, weights, 0.0), sink


def _through_softcap(
    problem: Problem,
    rows: Rows,
    back: ScoreGradients,
    forward: ForwardErrors,
    scores: Tensor,
    units: Units,
) -> Tensor:
    """Multiply by ``1 - tanh(x)^2``, whose own error is relative to 1, not to itself."""
    if problem.softcap is None:
        return scores
    x = rows.products.abs()
    moved = forward.products + 2 * units.u * x
    most = sech2((x - moved).clamp(min=0.0) / problem.softcap)
    least = sech2((x + moved) / problem.softcap)
    own = most - least + 2 * (units.exp + 2 * units.u)
    return scores * most + (back.scores.abs() + scores) * own


def _bias_bound(
    problem: Problem, back: ScoreGradients, errors: _ScoreErrors, units: Units
) -> Tensor | None:
    """Sum over the axes along which the bias was repeated."""
    if problem.bias is None:
        return None
    power = problem.powers["v"] + problem.powers["g"]
    shape = problem.bias_shape
    size = 1
    for own in shape:
        size *= own
    n = max(1, back.scores.numel() // max(1, size))
    error = errors.scores + units.dot(n) * (back.scores.abs() + errors.scores)
    total = times_power(error.sum_to_size(shape), power)
    exact = times_power(back.scores.sum_to_size(shape), power)
    touched = problem.allowed.double().sum_to_size(shape) > 0
    return torch.where(touched, stored(total, exact, units, strict=False), 0.0)


def _sink_bound(
    problem: Problem, rows: Rows, back: ScoreGradients, errors: _ScoreErrors, units: Units
) -> Tensor | None:
    """Bound ``-sum p_sink delta`` over batch and rows."""
    if problem.sinks is None:
        return None
    power = problem.powers["v"] + problem.powers["g"]
    n = rows.sink_weight.shape[0] * rows.sink_weight.shape[2]
    reach = rows.sink_weight + errors.sink
    term = errors.sink * back.mean.abs() + reach * errors.delta
    term = term + units.dot(n + 3) * reach * (back.mean.abs() + errors.delta)
    term = torch.where(problem.has_key, term, 0.0)
    exact = times_power(-(rows.sink_weight * back.mean).sum((0, 2)), power)
    total = times_power(term.sum((0, 2)), power) + n * units.grain
    return stored(total, exact, units, strict=False)
