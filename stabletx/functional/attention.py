"""Scaled dot-product attention: the public functions, the choice of a method, and the formula.

Read :func:`_formula` for the mathematics: it is written with plain operations, in float64, and
every other method is held to it. ``fused`` and ``tiled`` are faster ways to the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from stabletx import _checks
from stabletx._precision import compute_dtype
from stabletx.functional import _guards
from stabletx.functional._extended import ROOM, extended
from stabletx.functional._guards import repeat_heads
from stabletx.functional._problem import Problem, checked_problem
from stabletx.functional._sight import Sight, values_may_be_read
from stabletx.functional.fused import can_fuse, fused, in_one_call
from stabletx.functional.softmax import logsumexp, softmax
from stabletx.functional.tiled import tiled
from stabletx.masks import Mask

Method = Literal["auto", "fused", "tiled", "exact"]


@dataclass(frozen=True)
class AttentionDetails:
    """What :func:`attention_details` returns.

    Attributes:
        out: (b, h, t, e), in the dtype of q.
        lse: (b, h, t), logsumexp of a row's scores, the sink included; -inf for an empty row
            without a sink. At least float32, with gradient.
        max_score: (b, h), the largest score over the pairs that may attend; -inf where none may.
        entropy: (b, h), nats, mean over the rows that have a key.
        empty_rows: (b, h), int64, how many queries see no key.
        weights: (b, h, t, s) in the dtype of q, or None where not asked for.
        method: the path that ran.
        reason: why it, and why no faster one.
    """

    out: Tensor
    lse: Tensor
    max_score: Tensor
    entropy: Tensor
    empty_rows: Tensor
    weights: Tensor | None
    method: str
    reason: str


class _Result(NamedTuple):
    """What a method computes, in its own dtype; None where it does not."""

    out: Tensor  # (b, h, t, e)
    lse: Tensor | None = None  # (b, h, t)
    max_score: Tensor | None = None  # (b, h, t)
    entropy: Tensor | None = None  # (b, h, t)
    weights: Tensor | None = None  # (b, h, t, s)


_Core = Callable[[Problem, Sight], _Result]


def attention(
    q: Tensor,  # (b, h, t, d)
    k: Tensor,  # (b, g, s, d)
    v: Tensor,  # (b, g, s, e)
    *,
    mask: Mask | Tensor | None = None,  # a Mask, or bool (b|1, h|1, t|1, s|1)
    bias: Tensor | None = None,  # (b|1, h|1, t|1, s|1)
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (h,)
    dropout_p: float = 0.0,
    training: bool | None = None,
    method: Method = "auto",
) -> Tensor:  # (b, h, t, e)
    """Let each query take the mean of the values, weighted by the softmax of its scores.

    ``scores = softcap * tanh(scale * q k^T / softcap) + bias``

    Args:
        q: queries. Query head ``i`` reads key/value head ``i * g // h``.
        k: keys; ``h`` is a multiple of ``g``.
        v: values, of any width ``e``.
        mask: True = may attend. A blocked pair has weight exactly 0, whatever lies there.
        bias: added to the scaled and soft-capped scores; -inf blocks. It may want a gradient.
        scale: factor on the products; None takes ``d ** -0.5``.
        softcap: bounds the scores smoothly; None does not.
        sinks: one score a head that joins each row's denominator and nothing else.
        dropout_p: probability in [0, 1) that a weight is dropped while training.
        training: must be given with ``dropout_p``; nothing else knows the mode.
        method: "auto" takes the fastest that keeps the contract; "fused" torch's kernels; "tiled"
            an online softmax in linear memory; "exact" plain operations in float64.

    Returns:
        The output in the dtype of q. A query that sees no key gives 0, with gradient 0.

    Raises:
        TypeError: a wrong dtype or kind; a float ``mask`` (it is a bias).
        ValueError: a wrong shape, device or number; a method that cannot express the problem.

    Numerics: computed in float32 at least (float64 for float64), rounded once; rows whose scores
        may exceed what that dtype can carry are computed in float64. "auto" reads magnitudes on
        the CPU only; on a GPU nothing waits, and extreme magnitudes need "tiled" or "exact".
        torch.compile traces "exact"; torch.export traces torch's own function, in float32 at
        least, which keeps its accuracy up to scores of about 256.
    Source: Vaswani et al. (2017), section 3.2.1; Milakov & Gimelshein (2018) for "tiled".

    >>> q = k = torch.zeros(1, 1, 2, 4)
    >>> v = torch.tensor([[[[1.0], [3.0]]]])
    >>> attention(q, k, v, mask=Mask.causal())[0, 0, :, 0]
    tensor([1., 2.])
    """
    problem = checked_problem(q, k, v, mask, bias, scale, softcap, sinks, dropout_p, training)
    core, _, _ = _choose(problem, method, stats=False, weights=False)
    return _solve(problem, problem.sight(), core).out.to(q.dtype)


def attention_details(
    q: Tensor,  # (b, h, t, d)
    k: Tensor,  # (b, g, s, d)
    v: Tensor,  # (b, g, s, e)
    *,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool | None = None,
    method: Method = "auto",
    weights: bool = False,
) -> AttentionDetails:
    """Attend as :func:`attention` does, and say what happened.

    Args:
        q: as in :func:`attention`, like all the others.
        k: keys.
        v: values.
        mask: True = may attend.
        bias: added to the scores.
        scale: factor on the products.
        softcap: bounds the scores.
        sinks: one score a head for the denominator.
        dropout_p: probability that a weight is dropped while training.
        training: must be given with ``dropout_p``.
        method: "auto" takes "tiled", or "exact" where the weights are asked for.
        weights: return them too; needs memory for every pair.

    Returns:
        See :class:`AttentionDetails`. ``weights`` are those before dropout.

    Raises:
        TypeError: as :func:`attention`.
        ValueError: as :func:`attention`; also ``method="fused"``, whose kernel keeps none of this.

    Numerics: as :func:`attention`.

    >>> q = k = v = torch.zeros(1, 1, 2, 4)
    >>> attention_details(q, k, v, mask=Mask.lengths(torch.tensor([0]))).empty_rows
    tensor([[2]])
    """
    problem = checked_problem(q, k, v, mask, bias, scale, softcap, sinks, dropout_p, training)
    sight = problem.sight()
    core, method_run, reason = _choose(problem, method, stats=True, weights=weights)
    result = _solve(problem, sight, core)
    has_key = sight.rows_with_a_key()
    if has_key is None:
        has_key = torch.ones(1, 1, 1, dtype=torch.bool, device=q.device)
    has_key = has_key.expand(q.shape[:3])
    assert result.lse is not None
    assert result.max_score is not None
    assert result.entropy is not None
    work = compute_dtype(q.dtype)
    entropy = torch.where(has_key, result.entropy, 0.0).sum(-1) / has_key.sum(-1).clamp(min=1)
    tops = result.max_score
    top = tops.amax(-1) if tops.shape[-1] else tops.new_full(tops.shape[:2], -torch.inf)
    return AttentionDetails(
        out=result.out.to(q.dtype),
        lse=result.lse.to(work),
        max_score=top.to(work).detach(),
        entropy=entropy.to(work).detach(),
        empty_rows=(~has_key).sum(-1),
        weights=None if result.weights is None else result.weights.to(q.dtype),
        method=method_run,
        reason=reason,
    )


def _choose(problem: Problem, method: str, *, stats: bool, weights: bool) -> tuple[_Core, str, str]:
    """Pick the core for a problem; say its name and why."""
    _checks.check_one_of("method", method, get_args(Method))
    transformed = needs_plain_operations(problem)
    obstacle = can_fuse(problem)
    tiles = _by_tiles_in_detail if stats else _by_tiles
    if method == "fused":
        obstacle = obstacle or transformed or ("details asked for" if stats else "")
        _checks.check_method_can("fused", obstacle)
        return _by_kernel, "fused", "asked for"
    if method == "tiled":
        _checks.check_method_can("tiled", transformed or ("weights asked for" if weights else ""))
        return tiles, "tiled", "asked for"
    if method == "auto" and not stats and not obstacle and torch.compiler.is_exporting():
        return _in_one_call, "fused", "torch.export is tracing: a graph for other runtimes"
    if method == "exact" or weights or transformed:
        why = "asked for" if method == "exact" else transformed or "weights asked for"
        return _formula, "exact", why
    if stats:
        return tiles, "tiled", "details need every row's scores, which the kernel keeps"
    if obstacle:
        return _by_tiles, "tiled", f"torch's kernels cannot take it: {obstacle}"
    return _by_kernel, "fused", "nothing stands against torch's kernels"


def needs_plain_operations(problem: Problem) -> str:
    """Say which transform only plain operations can go through; an empty text for none."""
    if torch.compiler.is_compiling():
        return "torch.compile or torch.export is tracing"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if torch.autograd.forward_ad._current_level >= 0:
        duals = [torch.autograd.forward_ad.unpack_dual(x) for x in problem.tensors]  # type: ignore[no-untyped-call]
        if any(dual.tangent is not None for dual in duals):
            return "forward-mode derivatives"
    return ""


def _solve(problem: Problem, sight: Sight, core: _Core) -> _Result:
    """Run a core on the rows that it can be trusted with, and the others in wider arithmetic."""
    if not values_may_be_read(problem.q):
        clean, poison = _guards.sanitised(problem, sight)
        return _poisoned(core(clean, sight), poison, problem)
    if _guards.within_limits(problem):
        return core(problem, sight)
    clean, poison = _guards.sanitised(problem, sight)
    return _poisoned(_guarded(clean, sight, core), poison, problem)


def _guarded(problem: Problem, sight: Sight, core: _Core) -> _Result:
    """Compute hot rows in float64, and rows near float64's own limit with scaled exponents."""
    hot = _guards.hot_rows(problem, sight)
    # Both halves come from one float64 copy, so that gradients are added up there.
    work = compute_dtype(problem.q.dtype)
    problem = problem.map(torch.Tensor.double)
    if core is _formula:
        return _guarded_wide(problem, sight, core)
    tiles = _by_tiles if core is _by_kernel else core
    cool = _guards.cooled(problem, hot, _guards.LARGEST_ENTRY).map(lambda x: x.to(work))
    return _split(cool, sight, hot, core, lambda: _guarded_wide(problem, sight, tiles))


def _guarded_wide(problem: Problem, sight: Sight, core: _Core) -> _Result:
    extreme = _guards.rows_beyond(problem, sight, ROOM)
    cool = _guards.cooled(problem, extreme, ROOM)
    return _split(cool, sight, extreme, core, lambda: _extended(problem, sight))


def _split(
    cool: Problem, sight: Sight, hot: Tensor, core: _Core, careful: Callable[[], _Result]
) -> _Result:
    """Take hot rows from ``careful`` and the others from ``core``, as if the hot were not there."""
    if not bool(hot.any()):
        return core(cool, sight)
    slow = careful()
    if bool(hot.all()):
        return slow
    fast = core(cool, sight)
    out = _select(hot, fast.out, slow.out)
    assert out is not None
    rest = zip(fast[1:], slow[1:], strict=True)
    return _Result(out, *(_select(hot, a, b) for a, b in rest))


def _select(hot: Tensor, fast: Tensor | None, slow: Tensor | None) -> Tensor | None:
    if fast is None or slow is None:
        return None
    # The fast rows keep the very bits that they have without any hot row beside them.
    return torch.where(hot[..., None] if fast.ndim == 4 else hot, slow, fast.double())


def _poisoned(result: _Result, poison: _guards.Poison, problem: Problem) -> _Result:
    rows = poison.rows
    stats = (
        None if x is None else torch.where(rows if x.ndim == 3 else rows[..., None], torch.nan, x)
        for x in result[1:]
    )
    return _Result(poison.apply(result.out, problem), *stats)


def _by_kernel(problem: Problem, sight: Sight) -> _Result:
    return _Result(fused(problem, sight, lambda again: _formula(again, again.sight()).out))


def _in_one_call(problem: Problem, sight: Sight) -> _Result:
    return _Result(in_one_call(problem, sight))


def _by_tiles(problem: Problem, sight: Sight) -> _Result:
    return _with_tiles(problem, sight, entropy=False)


def _by_tiles_in_detail(problem: Problem, sight: Sight) -> _Result:
    return _with_tiles(problem, sight, entropy=True)


def _with_tiles(problem: Problem, sight: Sight, *, entropy: bool) -> _Result:
    def again(other: Problem) -> tuple[Tensor, Tensor]:
        result = _formula(other, other.sight())
        assert result.lse is not None
        return result.out, result.lse

    work = compute_dtype(problem.q.dtype)
    out, lse, rows = tiled(problem, sight, work, again, entropy=entropy)
    has_key = sight.rows_with_a_key()
    if has_key is not None:
        out = torch.where(has_key[..., None], out, 0.0)
    return _Result(out, lse, rows.max_score, rows.entropy)


def _extended(problem: Problem, sight: Sight) -> _Result:
    return _Result(*extended(problem, sight.dense()))


def _formula(problem: Problem, sight: Sight) -> _Result:
    """Compute the formula itself in float64 with plain operations: every derivative exists.

    Expects what no query sees, and what is not finite, to have been put to 0.
    """
    q, k, v = (x.double().contiguous() for x in (problem.q, problem.k, problem.v))
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    allowed = sight.dense()

    scores = (problem.scale * q) @ k.transpose(-1, -2)  # (b, h, t, s)
    if problem.softcap is not None:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    if problem.bias is not None:
        scores = scores + problem.bias.double()
    keys_only = scores
    if problem.sinks is not None:
        scores, allowed = _with_sinks(scores, problem.sinks, allowed)

    weights = softmax(scores, allowed=allowed)
    lse = logsumexp(scores, allowed=allowed)
    if problem.sinks is not None:
        weights = weights[..., :-1]
    used = torch.nn.functional.dropout(weights, problem.dropout_p)
    out = used @ v

    has_key = sight.rows_with_a_key()
    if has_key is not None:
        out = torch.where(has_key[..., None], out, 0.0)
    return _Result(out, lse, *_statistics(keys_only, weights, lse, sight), weights)


def _with_sinks(
    scores: Tensor, sinks: Tensor, allowed: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Give each row one more key, that holds the sink and is always allowed."""
    sink = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
    if allowed is not None:
        allowed = torch.nn.functional.pad(
            allowed.expand(*allowed.shape[:3], scores.shape[3]), (0, 1), value=True
        )
    return torch.cat([scores, sink], -1), allowed


def _statistics(
    scores: Tensor, weights: Tensor, lse: Tensor, sight: Sight
) -> tuple[Tensor, Tensor]:
    """Give each row's largest score and entropy, without gradient."""
    scores, weights, lse = scores.detach(), weights.detach(), lse.detach()
    allowed = sight.dense()
    if allowed is not None:
        scores = torch.where(allowed, scores, -torch.inf)
    top = scores.amax(-1) if scores.shape[-1] else lse.new_full(lse.shape, -torch.inf)
    surprise = torch.where(weights > 0, lse[..., None] - scores, 0.0)
    return top, (weights * surprise).sum(-1)
