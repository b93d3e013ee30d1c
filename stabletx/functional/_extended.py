"""Attention in float64 for float64 inputs near its largest value.

Each row of q, k, v and of the incoming gradient is brought near 1 by an exact power of two, and
the powers are put back where a number's true size is wanted, so nothing overflows on the way to a
result that does not. 16-bit and 32-bit inputs never come here: float64 has room for their
products as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from stabletx import _checks
from stabletx.functional._guards import repeat_heads
from stabletx.functional._problem import Problem

ROOM = 2.0**250  # products of four such numbers stay finite in float64
_SAFE = 500  # exponents up to here leave room for one more product
_ORDINARY = 2.0**900  # scores up to here lie well inside float64's range
_NOTHING = -(10**6)  # the exponent of zero


class Scaled(NamedTuple):
    """A tensor ``x * 2**power`` whose ``x`` is of moderate size; ``power`` broadcasts."""

    x: Tensor
    power: Tensor

    @staticmethod
    def rows(x: Tensor) -> Scaled:
        """Bring each row near 1 where it is beyond ``ROOM``."""
        top = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
        power = torch.where(top > ROOM, torch.frexp(top).exponent, 0)
        return Scaled(times_power(x, -power), power)

    def levelled(self, axis: int | tuple[int, ...]) -> Scaled:
        """Take one power for each line along ``axis``, so that the line can be summed."""
        if not self.x.numel():
            return Scaled(self.x, self.x.new_zeros((), dtype=torch.int32))
        sizes = torch.where(self.x == 0, _NOTHING, torch.frexp(self.x).exponent) + self.power
        power = (sizes.amax(axis, keepdim=True) - _SAFE).clamp(min=0)
        return Scaled(times_power(self.x, self.power - power), power)

    def value(self) -> Tensor:
        """Give the true numbers."""
        return times_power(self.x, self.power)


def times_power(x: Tensor, power: Tensor) -> Tensor:
    """Multiply by 2**power in steps that float64 can hold."""
    power = power.to(torch.int64)
    for _ in range(5):
        step = power.clamp(-1000, 1000)
        x = x * torch.exp2(step.double())
        power = power - step
    return x


def extended(problem: Problem, allowed: Tensor | None) -> tuple[Tensor, ...]:
    """Attend to float64 inputs of any finite size.

    Returns:
        out, lse, max_score, entropy, weights as the formula's, the first two with a gradient.
    """
    bias = None if problem.bias is None else problem.bias.double()
    sinks = None if problem.sinks is None else problem.sinks.double()
    dropout_p = problem.dropout_p
    _checks.check_huge("dropout_p", "be 0", dropout_p, broken=dropout_p > 0)
    return _Extended.apply(  # type: ignore[no-any-return, no-untyped-call]
        problem.q, problem.k, problem.v, bias, sinks, problem, allowed
    )


class _Softmax(NamedTuple):
    weights: Tensor
    slope: Tensor | None  # of the soft-cap
    lse: Tensor
    top: Tensor
    entropy: Tensor
    sink_weight: Tensor | None


def _softmax(
    q: Scaled, k: Scaled, bias: Tensor | None, sinks: Tensor | None,
    problem: Problem, allowed: Tensor | None,
) -> _Softmax:  # fmt: skip
    product = Scaled(q.x @ k.x.transpose(-1, -2), q.power + k.power.transpose(-1, -2))
    slope = None
    if problem.softcap is None:
        product = Scaled(product.x * problem.scale, product.power)
        blocked = product.x if allowed is None else torch.where(allowed, product.x, 0.0)
        scores = Scaled(blocked, product.power).levelled(-1)
    else:
        inner = Scaled(product.x * (problem.scale / problem.softcap), product.power).value()
        slope = 1 - torch.tanh(inner) ** 2
        scores = Scaled(problem.softcap * torch.tanh(inner), torch.zeros_like(q.power))
    x, power = _plain_where_ordinary(scores, bias, sinks, allowed)
    x, keys_top = _joined(x, power, bias, allowed)
    top, sink = keys_top, None
    if sinks is not None:
        sink = times_power(sinks[None, :, None, None].expand(top.shape), -power)
        top = torch.maximum(top, sink)
    base = torch.where(top == -torch.inf, 0.0, top)
    gap = times_power(x - base, power)
    parts = gap.exp()
    total = parts.sum(-1, keepdim=True)
    if sink is not None:
        sink = times_power(sink - base, power).exp()
        total = total + sink
    divisor = torch.where(total == 0, 1.0, total)
    weights = parts / divisor
    surprise = torch.where(weights > 0, divisor.log() - gap, 0.0)
    lse = torch.where(total == 0, -torch.inf, times_power(base, power) + divisor.log())
    return _Softmax(
        weights,
        slope,
        lse[..., 0],
        times_power(keys_top, power)[..., 0],
        (weights * surprise).sum(-1),
        None if sink is None else sink / divisor,
    )


def _joined(
    x: Tensor, power: Tensor, bias: Tensor | None, allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Add the bias to scores times ``2**-power`` and block pairs; give each row's largest too."""
    if bias is not None:
        x = x + times_power(bias, -power)
    if allowed is not None:
        x = torch.where(allowed, x, -torch.inf)
    if x.shape[-1]:
        return x, x.amax(-1, keepdim=True)
    return x, x.new_full((*x.shape[:-1], 1), -torch.inf)


def _plain_where_ordinary(
    scores: Scaled, bias: Tensor | None, sinks: Tensor | None, allowed: Tensor | None
) -> Scaled:
    """Put the power back in rows whose largest score is an ordinary number.

    There a bias or a sink counts, and would be lost beside a power; a huge negative score may
    become -inf, for its weight is 0.
    """
    plain = scores.value()
    _, top = _joined(plain, torch.zeros_like(scores.power), bias, allowed)
    if sinks is not None:
        top = torch.maximum(top, sinks[None, :, None, None])
    ordinary = top.abs() <= _ORDINARY
    return Scaled(torch.where(ordinary, plain, scores.x), torch.where(ordinary, 0, scores.power))


class _Extended(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        sinks: Tensor | None,
        problem: Problem,
        allowed: Tensor | None,
    ) -> tuple[Tensor, ...]:
        keys, values = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
        found = _softmax(Scaled.rows(q), Scaled.rows(keys), bias, sinks, problem, allowed)
        # The mean of the values is no larger than the largest of them, whatever rounding says.
        ceiling = torch.finfo(torch.float64).max / 4
        out = (found.weights @ (values * 0.25)).clamp(-ceiling, ceiling) * 4.0
        ctx.save_for_backward(q, k, v, bias, sinks, allowed)
        ctx.problem = problem
        ctx.mark_non_differentiable(found.top, found.entropy)
        return out, found.lse, found.top, found.entropy, found.weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _checks.check_huge("create_graph", "be False", True, broken=torch.is_grad_enabled())
        on_weights = bool(grads[4].any())
        _checks.check_huge("weights", "be left out of the loss", "a gradient", broken=on_weights)
        q, k, v, bias, sinks, allowed = ctx.saved_tensors
        problem: Problem = ctx.problem
        h, g = q.shape[1], k.shape[1]
        q, k, v = (Scaled.rows(repeat_heads(x, h)) for x in (q, k, v))
        found = _softmax(q, k, bias, sinks, problem, allowed)
        grad = Scaled.rows(grads[0])
        # What weighs nothing is left out: a row is levelled by what it sees.
        push = torch.where(found.weights == 0, 0.0, grad.x @ v.x.transpose(-1, -2))
        pushed = Scaled(push, grad.power + v.power.transpose(-1, -2)).levelled(-1)
        mean = (found.weights * pushed.x).sum(-1, keepdim=True)
        mean = mean - times_power(grads[1][..., None], -pushed.power)
        grad_scores = Scaled(found.weights * (pushed.x - mean), pushed.power)
        grad_bias = grad_sinks = None
        if bias is not None:
            grad_bias = _sum_to_shape(grad_scores, bias.shape)
        if found.sink_weight is not None:
            terms = Scaled(-found.sink_weight * mean, pushed.power)
            grad_sinks = _sum_to_shape(terms, (1, terms.x.shape[1], 1, 1)).flatten()
        if found.slope is not None:
            grad_scores = Scaled(grad_scores.x * found.slope, grad_scores.power)
        to_q = Scaled(grad_scores.x, k.power.transpose(-1, -2).expand_as(grad_scores.x))
        to_q = to_q.levelled(-1)
        grad_q = Scaled(to_q.x @ k.x * problem.scale, to_q.power + grad_scores.power)
        to_k = Scaled(grad_scores.x, grad_scores.power + q.power).levelled(-2)
        grad_k = _sum_over_groups(_transposed_product(to_k, q.x * problem.scale), g)
        to_v = Scaled(found.weights, grad.power).levelled(-2)
        grad_v = _sum_over_groups(_transposed_product(to_v, grad.x), g)
        return grad_q.value(), grad_k, grad_v, grad_bias, grad_sinks, None, None


def _sum_to_shape(terms: Scaled, shape: Sequence[int]) -> Tensor:
    """Sum over the axes that are 1 in ``shape``; the sum may pass the largest value on its way."""
    axes = tuple(axis for axis, size in enumerate(shape) if size != terms.x.shape[axis])
    if not axes:
        return terms.value()
    level = terms.levelled(axes)
    return Scaled(level.x.sum(axes, keepdim=True), level.power).value()


def _transposed_product(a: Scaled, b: Tensor) -> Scaled:
    power = a.power.transpose(-1, -2) if a.power.ndim else a.power
    return Scaled(a.x.transpose(-1, -2) @ b, power)


def _sum_over_groups(terms: Scaled, n_kv_heads: int) -> Tensor:
    """Sum the query heads of each key/value head."""
    x = rearrange(terms.x, "b (g r) s d -> b g r s d", g=n_kv_heads)
    power = terms.power.expand(*terms.x.shape[:3], 1)
    power = rearrange(power, "b (g r) s 1 -> b g r s 1", g=n_kv_heads)
    total = _sum_to_shape(Scaled(x, power), (*x.shape[:2], 1, *x.shape[3:]))
    return rearrange(total, "b g 1 s d -> b g s d")
