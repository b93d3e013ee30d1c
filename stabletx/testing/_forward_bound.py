"""The forward half of the bound: scores, weights, output.

The letters: a row has scores ``s_j``, maximum ``m``, weights ``p_j``, output ``o``; ``u`` is the
unit roundoff of the compute dtype. A hat marks what a kernel computes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stabletx.testing._problem import HUGE, Problem, products_of, times_power
from stabletx.testing._units import LOST, Units
from stabletx.testing.reference import Rows, sech2

# An absolute error of a score past which its exponential says nothing; exp of it stays finite.
_LARGE = 60.0
# Elements of the (rows, s, e) block that is looked at in one go.
_CHUNK = 1 << 21
# Divides in place of a room that is used up; what comes of it is capped.
_NOTHING = 1e-30


class ForwardErrors(NamedTuple):
    """Absolute errors of the forward pass, in the scaled units of the problem."""

    out: Tensor  # (b, h, t, e), before the output is rounded to its dtype
    exact: Tensor  # (b, h, t, e), the exact output
    weights: Tensor  # (b, h, t, s), normalised weights
    sink: Tensor  # (b, h, t), the weight of the sink
    products: Tensor  # (b, h, t, s), scale * q k^T
    row_sum: float  # by how much the computed weights of a row may miss the sum 1


def forward_errors(problem: Problem, rows: Rows, units: Units) -> ForwardErrors:
    """Bound the computed weights and output of every row.

    The computed output is ``sum p(1 + theta)(1 + phi) v / sum p(1 + theta)(1 + psi)`` with
    ``|theta_j| <= t_j``, ``|phi|, |psi| <= g``, so that
    ``|o^ - o| <= (sum p t |v - o| + g sum p(1 + t)|v| + g(1 + T)|o|) / (1 - T - g)``.
    The factor ``|v - o|``, not ``|v|``, is what keeps it tight.
    """
    n = problem.k.shape[2]
    products, eta = _score_errors(problem, rows, units)
    t = eta.expm1() + units.exp * eta.exp()
    sink_t, sink_floor = _sink_errors(problem, rows, units)
    p, sink_pt = rows.weights, rows.sink_weight * sink_t
    # A maximum that runs along is updated, and everything rescaled, once a block.
    rescales = -(-n // units.profile.block)
    g = min(units.dot(n + 3) + units.steps((units.profile.exp_ulps + 3) * rescales), LOST)
    total = (p * t).sum(-1) + sink_pt
    room = 1.0 - total - g
    exact = p @ problem.v
    size = problem.v.abs()
    spread, hull = _spreads(problem, p * t, exact, hulls=bool((room <= 0.5).any()))
    raw = spread + sink_pt.unsqueeze(-1) * exact.abs()
    raw = raw + (units.weights + g) * ((p * (1 + t)) @ size)
    raw = (raw + g * (1 + total).unsqueeze(-1) * exact.abs()) / room.clamp(min=_NOTHING)[..., None]
    if hull is not None:
        # Whatever the weights, a mean lies between the values it is a mean of.
        capped = hull + (units.weights + 3 * g) * (hull + exact.abs())
        raw = torch.where(room[..., None] > 0, torch.minimum(raw, capped), capped)
    floor = _flushed(problem, rows, eta, units)
    raw = raw + floor @ size
    raw = raw + scaled((n + 2) * units.grain, -problem.powers["v"])
    # A weight is e(1 + theta) / (sum (1 + psi)), and never more than about 1.
    gain = (1 + g) ** 2 * (1 + 3 * units.u) / room.clamp(min=_NOTHING)
    most = 1 + 4 * g if g < 0.5 else LOST
    weights = (p * ((1 + t) * gain[..., None] - 1)).clamp(max=most) + floor
    sink = (rows.sink_weight * ((1 + sink_t) * gain - 1)).clamp(max=most) + sink_floor
    weights = torch.where(problem.allowed, weights, 0.0)
    return ForwardErrors(raw, exact, weights, sink, products, 3 * g)


def stored(error: Tensor, exact: Tensor, units: Units, *, strict: bool = True) -> Tensor:
    """Add the rounding to the output's dtype.

    A result past the dtype's range may become anything. Where not strict, so may one that its
    error can push past it; the output itself is a mean of values and has no such excuse.
    """
    largest = torch.finfo(units.out_dtype).max
    out_grain = torch.finfo(units.out_dtype).tiny * torch.finfo(units.out_dtype).eps
    bound = error + units.out * (exact.abs() + error) + out_grain
    leaves = exact.abs() > largest if strict else exact.abs() + bound > largest
    return torch.where(leaves, torch.inf, bound)


def scaled(x: float, power: int) -> Tensor:
    """Return a number times a power of two, as a tensor that may underflow quietly."""
    return times_power(torch.tensor(x, dtype=torch.float64), power)


def _score_errors(problem: Problem, rows: Rows, units: Units) -> tuple[Tensor, Tensor]:
    """Bound the errors of ``scale * q k^T`` and of the score less its maximum.

    The shift by the maximum cancels; what is left of it is the rounding of the difference.
    """
    sizes = products_of(problem, problem.q.abs(), problem.k.abs(), 1.0)
    # d products and sums, a rounded scale or its root on both sides, the change to base 2.
    d = problem.q.shape[3]
    per_dot = units.dot(d) + units.steps(7)
    products = (abs(problem.scale) * per_dot * sizes).clamp(max=HUGE)
    products = torch.where(_never_rounded(problem, sizes, units), 0.0, products)
    x = rows.products
    eta, score = products, x
    if problem.softcap is not None:
        cap = problem.softcap
        moved = products + 2 * units.u * x.abs()
        score = cap * (x / cap).tanh()
        eta = sech2((x.abs() - moved).clamp(min=0.0) / cap) * moved
        eta = (
            torch.minimum(eta, 2 * torch.tensor(cap).double()) + (units.exp + units.u) * score.abs()
        )
    eta = eta + units.scores * score.abs()
    shift = rows.plain((rows.scores - rows.row_max.unsqueeze(-1)).abs())
    eta = eta + 3 * units.u * torch.where(problem.allowed, shift, 0.0)
    if problem.bias is not None:
        # A bias that is centred by its row's maximum first is rounded once more.
        seen = torch.where(problem.allowed, score.abs(), 0.0)
        largest = seen.amax(-1, keepdim=True) if seen.shape[-1] else seen
        eta = eta + units.u * (problem.bias.abs() + 2 * score.abs() + largest)
        eta = eta + units.scores * problem.bias.abs()
    return products, eta.nan_to_num(nan=_LARGE).clamp(max=_LARGE)


def _never_rounded(problem: Problem, sizes: Tensor, units: Units) -> Tensor:  # (b, h, t, s)
    """Tell which dot products are exact in any order: all terms share a grid that is fine enough.

    The scale must be a power of four, for it may be applied as its root on both sides.
    """
    fraction, exponent = math.frexp(problem.scale)
    if fraction != 0.5 or exponent % 2 == 0 or units.profile.base_two:
        return torch.zeros_like(sizes, dtype=torch.bool)
    eq, ek = problem.powers["q"], problem.powers["k"]
    grid = (_grid(problem.q) + eq)[..., :, None] + (_grid(problem.k) + ek)[..., None, :]
    logs = sizes.log2()
    if logs.isposinf().any():  # past float64's range, where the tamed inputs still tell
        tame = problem.q.abs() @ problem.k.abs().mT
        logs = torch.where(logs.isposinf(), tame.log2() + (eq + ek), logs)
    digits = -math.log2(units.u_sum)
    return logs - grid <= math.floor(digits + 0.5)


def _grid(x: Tensor) -> Tensor:  # (..., n, w) -> (..., n)
    """Return the largest power of two, as its exponent, that divides every entry of a row."""
    fraction, exponent = torch.frexp(x)
    whole = (fraction * 2.0**53).long()
    lowest = (whole & -whole).double().log2() + exponent - 53
    lowest = torch.where(x == 0, 4096.0, lowest)
    return lowest.amin(-1) if x.shape[-1] else lowest.sum(-1)


def _sink_errors(problem: Problem, rows: Rows, units: Units) -> tuple[Tensor, Tensor]:
    """Bound the relative error of the sink's exponential, and what is lost where it becomes 0."""
    if problem.sinks is None:
        none = torch.zeros_like(rows.row_max)
        return none, none
    sinks = problem.sinks.clamp(min=-1e300)[None, :, None]
    shift = sinks - rows.plain(rows.row_max)
    eta = 3 * units.u * shift.abs() + (units.scores + units.u) * sinks.abs()
    absent = problem.sinks.isneginf()[None, :, None]
    eta = torch.where(absent, 0.0, eta).clamp(max=_LARGE)
    low = ~absent & ((shift - eta).exp() < 4 * units.tiny)
    floor = rows.sink_weight.clamp(max=4 * units.tiny) + 2 * units.grain
    return eta.expm1() + units.exp * eta.exp(), torch.where(low, floor, 0.0)


def _flushed(problem: Problem, rows: Rows, eta: Tensor, units: Units) -> Tensor:
    """Bound what is lost where an exponential falls below the normal range and may become 0."""
    shift = rows.plain(rows.scores - rows.row_max.unsqueeze(-1))
    low = problem.allowed & ((shift - eta).exp() < 4 * units.tiny)
    return torch.where(low, rows.weights.clamp(max=4 * units.tiny) + 2 * units.grain, 0.0)


def _spreads(
    problem: Problem, moved: Tensor, exact: Tensor, *, hulls: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum ``moved |v - o|`` over the keys; on demand the width of the values that a row sees."""
    b, h, t, s = moved.shape
    spread = torch.empty_like(exact)
    hull = torch.zeros_like(exact) if hulls else None
    n_rows = max(1, _CHUNK // max(1, s * exact.shape[3]))
    n_heads = max(1, n_rows // max(1, t))
    for i in range(b):
        for j in range(0, h, n_heads):
            values = problem.v[i, j : j + n_heads].unsqueeze(1)
            for start in range(0, t, n_rows):
                at = (i, slice(j, j + n_heads), slice(start, start + n_rows))
                far = (values - exact[at].unsqueeze(2)).abs_()
                spread[at] = (moved[at].unsqueeze(2) @ far).squeeze(2)
                if hull is not None and s:
                    seen = problem.allowed[at].unsqueeze(-1)
                    seen_values = torch.where(seen, values, torch.nan)
                    hull[at] = _width(seen_values, with_zero=problem.sinks is not None)
    return spread, hull


def _width(values: Tensor, *, with_zero: bool) -> Tensor:  # (h, t, s, e) -> (h, t, e)
    """Return the distance between the largest and the smallest value, NaN left out.

    A sink is a key whose value is 0.
    """
    high = torch.where(values.isnan(), -torch.inf, values).amax(2)
    low = torch.where(values.isnan(), torch.inf, values).amin(2)
    if with_zero:
        high, low = high.clamp(min=0.0), low.clamp(max=0.0)
    return torch.where(high < low, 0.0, high - low)
