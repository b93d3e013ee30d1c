"""How far rounding can move attention and its gradients, derived step by step.

The letters: a row has scores ``s_j``, maximum ``m``, weights ``p_j``, output ``o``; ``u`` is the
unit roundoff of the compute dtype, to which the reference's own is added.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stabletx.testing._backward_bound import gradient_bounds
from stabletx.testing._forward_bound import forward_errors, stored
from stabletx.testing._problem import Problem, prepare, sum_over_groups, times_power
from stabletx.testing._units import Units
from stabletx.testing.reference import Rows, ScoreGradients, score_gradients, softmax_rows
from stabletx.testing.rounding import Mode, Profile


class Bound(NamedTuple):
    """Absolute bounds in float64, one for each element; None where not asked for."""

    out: Tensor
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    dbias: Tensor | None = None
    dsinks: Tensor | None = None


def attention_error_bound(
    q: Tensor,  # (b, h, t, d)
    k: Tensor,  # (b, g, s, d)
    v: Tensor,  # (b, g, s, e)
    *,
    mask: Tensor | None = None,  # bool, (b, h, t, s), each axis full or 1
    bias: Tensor | None = None,  # (b, h, t, s), each axis full or 1
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (h,)
    grad_out: Tensor | None = None,  # (b, h, t, e)
    profile: Profile | None = None,
    mode: Mode = "deterministic",
) -> Bound:
    """Bound what rounding can do to attention on these very inputs, and to its gradients.

    Args:
        q: queries, whose dtype is taken to be the dtype of the results.
        k: keys.
        v: values.
        mask: True = may attend.
        bias: added to the scores; -inf blocks.
        scale: None takes ``d ** -0.5``.
        softcap: None leaves the scores alone.
        sinks: one score a head that joins the denominator.
        grad_out: give it to have the gradients bounded too.
        profile: what the kernel states about itself; None = computes in float32 at least.
        mode: "deterministic" always holds; "probable" is tighter for long rows.

    Returns:
        Bounds on ``abs(actual - reference)``. 0 for an empty row. Infinite where the stated
        precision can lose everything, or where the result leaves the range of its dtype.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: a mask that is not boolean with 4 axes.

    Numerics: holds for sums in any order, with or without fused multiply-add; not for hardware
        modes that round the inputs of a product (TF32).
    Source: Blanchard, Higham & Higham (2021), section 3; Higham (2002), chapter 3.

    >>> x = torch.ones(1, 1, 1, 1)
    >>> bool(attention_error_bound(x, x, x).out < 1e-5)
    True
    """
    problem = prepare(
        q, k, v, grad_out, mask=mask, bias=bias, scale=scale, softcap=softcap, sinks=sinks
    )
    rows = softmax_rows(problem)
    back = None if grad_out is None else score_gradients(problem, rows)
    return error_bound(problem, rows, back, Units.of(q.dtype, profile or Profile(), mode))


def error_bound(problem: Problem, rows: Rows, back: ScoreGradients | None, units: Units) -> Bound:
    """Bound the output and, where there is a backward pass, the gradients."""
    forward = forward_errors(problem, rows, units)
    exact_out = times_power(forward.exact, problem.powers["v"])
    out = stored(times_power(forward.out, problem.powers["v"]), exact_out, units)
    out = torch.where(problem.has_key.unsqueeze(-1), out, 0.0)
    if back is None:
        return Bound(out)
    return Bound(out, *gradient_bounds(problem, rows, back, forward, units))


def condition_scales(
    q: Tensor,  # (b, h, t, d)
    k: Tensor,  # (b, g, s, d)
    v: Tensor,  # (b, g, s, e)
    *,
    mask: Tensor | None = None,  # bool, (b, h, t, s), each axis full or 1
    bias: Tensor | None = None,  # (b, h, t, s), each axis full or 1
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (h,)
    grad_out: Tensor | None = None,  # (b, h, t, e)
) -> Bound:
    """Compute the condition scale of each result: its sum with every term made positive.

    Args:
        q: as in :func:`attention_error_bound`, like all other arguments.
        k: keys.
        v: values.
        mask: True = may attend.
        bias: added to the scores.
        scale: None takes ``d ** -0.5``.
        softcap: None leaves the scores alone.
        sinks: one score a head.
        grad_out: give it to have the scales of the gradients too.

    Returns:
        ``out`` is ``sum p |v|``; ``dq`` is ``scale sum p (|g||v| + sum p |g||v|) |k|`` and so on.
        Divide an error by the ulp of it with :func:`condition_ulps`.

    Raises:
        ValueError: shapes that do not fit.

    Numerics: float64.
    Source: Higham (2002), section 1.6.

    >>> x = torch.ones(1, 1, 1, 1)
    >>> condition_scales(x, x, -x).out
    tensor([[[[1.]]]], dtype=torch.float64)
    """
    problem = prepare(
        q, k, v, grad_out, mask=mask, bias=bias, scale=scale, softcap=softcap, sinks=sinks
    )
    p = softmax_rows(problem).weights
    eq, ek, ev, eg = (problem.powers[name] for name in ("q", "k", "v", "g"))
    out = times_power(p @ problem.v.abs(), ev)
    if problem.grad_out is None:
        return Bound(out)
    g = problem.grad_out.abs()
    pulls = g @ problem.v.abs().mT
    scores = p * (pulls + (p * pulls).sum(-1, keepdim=True))
    size = abs(problem.scale)
    dq = size * (scores @ problem.k.abs())
    dk = size * (scores.mT @ problem.q.abs())
    dv = p.mT @ g
    return Bound(
        out=out,
        dq=times_power(dq, ek + ev + eg),
        dk=times_power(sum_over_groups(dk, problem.n_kv_heads), eq + ev + eg),
        dv=times_power(sum_over_groups(dv, problem.n_kv_heads), eg),
    )
