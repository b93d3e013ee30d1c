"""The guards: what is done to values before and after a kernel, so that it keeps the contract.

Three things happen here, and only where a first look at the magnitudes asks for them:

* keys and values that no query sees become 0, by the mask, whatever they hold;
* queries, keys and values that are not finite become 0, and the rows that really attend to one
  are made NaN at the end: nothing is swallowed and nothing reaches another row;
* rows whose scores may be too large for the kernel's arithmetic are found, one by one, from
  nothing but what they see, so that they can be computed in float64 instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import reduce, repeat
from torch import Tensor

from stabletx._precision import is_sixteen_bit
from stabletx.functional._magnitude import extremes, side_by_side
from stabletx.functional._problem import Problem
from stabletx.functional._sight import Sight, is_traced, values_may_be_read

# A kernel that keeps one float32 logsumexp rebuilds its weights in the backward pass with an
# error of about a quarter of the largest score, in units of the last place. Below this score
# that error, and the rounding of the scores themselves, stay inside the bound of the rows that go
# through the kernel; a wide rounding of the output does not hide it, where gradients cancel.
LARGEST_SCORE = 256.0
LARGEST_ENTRY = 2.0**60  # products of three such numbers stay finite in float32


def repeat_heads(x: Tensor, n_heads: int) -> Tensor:  # (b, g, ...) -> (b, h, ...)
    """Give each query head its key/value head: head ``i`` reads ``i * g // h``."""
    if x.shape[1] == n_heads:
        return x
    return repeat(x, "b g ... -> b (g r) ...", r=n_heads // x.shape[1])


def _largest(x: Tensor) -> float:
    """Give the largest magnitude; NaN where there is one."""
    low, high = extremes(x) if x.numel() else (0.0, 0.0)
    return max(-low, high) if low == low else low


def within_limits(problem: Problem) -> bool:
    """Tell, from a look or two at the magnitudes, whether every row is safe in a fused kernel.

    Reads values, so it is asked on the CPU alone. False also where anything is not finite.
    """
    q, k = problem.q.detach(), problem.k.detach()
    limit = LARGEST_SCORE
    if problem.bias is not None:
        bias = problem.bias.detach()
        limit -= _largest(bias.masked_fill(bias == -torch.inf, 0.0))
    if not limit >= 0.0:
        return False
    factor = _score_factor(problem)
    whole = side_by_side(q, k, problem.v.detach())
    if whole is not None:
        largest = _largest(whole)
        if largest <= LARGEST_ENTRY and largest * largest * q.shape[3] * factor <= limit:
            return True
    entries = [_largest(q), _largest(k), _largest(problem.v)]
    if not (max(entries) <= LARGEST_ENTRY and all(x == x for x in entries)):
        return False
    if entries[0] * entries[1] * q.shape[3] * factor <= limit:
        return True
    return float(_norms(q).amax() * _norms(k).amax()) * factor <= limit


def _score_factor(problem: Problem) -> float:
    """Give what the products are multiplied by; below a soft-cap they must not overflow either."""
    return abs(problem.scale) if problem.softcap is None else max(abs(problem.scale), 1.0)


def _norms(x: Tensor) -> Tensor:  # (..., d) -> (...) in float64 for float32: cannot overflow
    work = torch.float32 if is_sixteen_bit(x.dtype) else torch.float64
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=work)
    return norms


def hot_rows(problem: Problem, sight: Sight) -> Tensor:  # -> (b, h, t) bool
    """Find the rows that a fused kernel may get wrong, each from what it sees alone.

    Expects finite values. ``within_limits`` being true means that no row is hot.
    """
    q = problem.q.detach()
    k = repeat_heads(problem.k.detach(), q.shape[1])
    key_norm = sight.largest_seen(_norms(k).double())
    factor = _score_factor(problem)
    score = _norms(q).double() * key_norm * factor
    if problem.bias is not None:
        bias = problem.bias.detach().double()
        bias = torch.where(bias == -torch.inf, 0.0, bias).abs().amax(-1)
        score = score + bias.expand(-1, -1, bias.shape[2])
    return ~(score <= LARGEST_SCORE) | rows_beyond(problem, sight, LARGEST_ENTRY)


def rows_beyond(problem: Problem, sight: Sight, limit: float) -> Tensor:  # -> (b, h, t) bool
    """Find the rows that hold, or see, an entry beyond a limit."""
    k, v = (repeat_heads(x.detach(), problem.q.shape[1]) for x in (problem.k, problem.v))
    seen = sight.largest_seen(torch.maximum(_magnitude(k), _magnitude(v)))
    return torch.maximum(seen, _magnitude(problem.q)) > limit


def cooled(problem: Problem, hot: Tensor, limit: float) -> Problem:
    """Put 0 in hot rows, and in keys beyond the limit, which only hot rows see."""
    large = torch.maximum(_magnitude(problem.k), _magnitude(problem.v)) > limit
    q = torch.where(hot[..., None], 0.0, problem.q)
    k, v = (torch.where(large[..., None], 0.0, x) for x in (problem.k, problem.v))
    return problem.with_tensors(q, k, v)


def _magnitude(x: Tensor) -> Tensor:  # (..., d) -> (...)
    if x.shape[-1] == 0:
        return x.new_zeros(x.shape[:-1], dtype=torch.float64)
    return x.detach().abs().amax(-1).double()


@dataclass(frozen=True)
class Poison:
    """Which outputs are NaN because their row attends to something that is not finite."""

    rows: Tensor  # (b, h, t) bool, by a query, a key or a bias: the weights themselves are NaN
    channels: Tensor | None  # (b, h, t, e) bool, by a value: the weights are whole
    sight: Sight

    def apply(self, out: Tensor, problem: Problem) -> Tensor:
        """Make those outputs NaN, and the gradients of what their rows attend to."""
        spoilt = self.rows[..., None]
        spoilt = spoilt if self.channels is None else spoilt | self.channels
        if is_traced():
            return torch.where(spoilt, torch.nan, out)
        if values_may_be_read(out) and not bool(spoilt.any()):
            return out
        poisoned: Tensor = _Poisoned.apply(  # type: ignore[no-untyped-call]
            out, problem.q, problem.k, problem.v, spoilt, self.rows, self.sight
        )
        return poisoned


class _Poisoned(torch.autograd.Function):
    """Put NaN into some outputs, and in the backward pass where they would have spread it."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, q: Tensor, k: Tensor, v: Tensor,
        spoilt: Tensor, rows: Tensor, sight: Sight,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(q, k, v, spoilt, rows, *sight.tensors)
        ctx.sight = sight
        return torch.where(spoilt, torch.nan, out)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, spoilt, rows, *_ = ctx.saved_tensors
        lost = spoilt.any(-1)
        # What comes back through a lost row goes to what it attends to, and to nothing else.
        unsound = lost & ~grad_out.isfinite().all(-1)
        grad_out = torch.where((rows | unsound)[..., None], 0.0, grad_out)
        nan_k = _of_groups(ctx.sight.seen_by_any(lost), k)
        nan_v = _of_groups(ctx.sight.seen_by_any(rows | unsound), v)
        pairs = ((lost[..., None], q), (nan_k, k), (nan_v, v))
        return (grad_out, *(_nan_where(flag, x) for flag, x in pairs), None, None, None)


class _Cleaned(torch.autograd.Function):
    """Put 0 for a bad value; its own gradient does not depend on it and passes unchanged."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, good: Tensor) -> Tensor:
        return torch.where(good, v, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _of_groups(flags: Tensor, x: Tensor) -> Tensor:  # (b, h, s), (b, g, s, e) -> (b, g, s, 1)
    return reduce(flags, "b (g r) s -> b g s 1", "any", g=x.shape[1])


def _nan_where(flags: Tensor, x: Tensor) -> Tensor:
    return torch.where(flags, torch.nan, torch.zeros_like(x))


def sanitised(problem: Problem, sight: Sight) -> tuple[Problem, Poison]:
    """Put 0 where no query looks and where a value is not finite; say which rows that spoils."""
    q, k, v = problem.q, problem.k, problem.v
    h = q.shape[1]
    seen = sight.keys_with_a_row()
    if seen is not None:
        seen = (
            seen if seen.shape[1] == 1 else reduce(seen, "b (g r) s -> b g s", "any", g=k.shape[1])
        )
        k = torch.where(seen[..., None], k, 0.0)
        v = torch.where(seen[..., None], v, 0.0)
    good_q, good_k = (x.detach().isfinite().all(-1, keepdim=True) for x in (q, k))
    good_v = v.detach().isfinite()
    has_key = sight.rows_with_a_key()
    bad_q = ~good_q[..., 0] if has_key is None else ~good_q[..., 0] & has_key
    rows = bad_q | sight.sees_any(repeat_heads(~good_k[..., 0], h))
    channels = None
    if not values_may_be_read(v):
        # One flag a row is all that is affordable where nothing may be asked first.
        rows = rows | sight.sees_any(repeat_heads(~good_v.all(-1), h))
    elif not bool(good_v.all()):
        flags = repeat_heads(~good_v, h)
        channels = torch.stack([sight.sees_any(flag) for flag in flags.unbind(-1)], -1)
    bias = problem.bias
    if bias is not None:
        good = bias.detach().isfinite() | (bias.detach() == -torch.inf)
        rows = rows | _bad_bias_rows(~good, sight, rows.shape)
        bias = torch.where(good, bias, 0.0)
    q, k = torch.where(good_q, q, 0.0), torch.where(good_k, k, 0.0)
    v = torch.where(good_v, v, 0.0) if is_traced() else _Cleaned.apply(v, good_v)  # type: ignore[no-untyped-call]
    return replace(problem, q=q, k=k, v=v, bias=bias), Poison(rows, channels, sight)


def _bad_bias_rows(bad: Tensor, sight: Sight, shape: torch.Size) -> Tensor:
    allowed = sight.dense()
    bad = bad if allowed is None else bad & allowed
    return bad.any(-1).expand(shape)
