"""Assertions with computed bounds. NaN never passes by accident."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stabletx.testing.reference import Reference

_NAMES = ("dq", "dk", "dv", "dbias", "dsinks")


class Comparison(NamedTuple):
    """How one tensor stands to its bound.

    Attributes:
        name: what was compared, such as ``out`` or ``dq``.
        occupancy: the worst error over its bound; at most 1 where all is well.
        n_beyond: how many places lie beyond the bound.
        n: how many places there are.
        first: index of the first place beyond, or None.
        worst: index of the worst place, or None where there are no places.
        message: what to tell a person; empty where all is well.
    """

    name: str
    occupancy: float
    n_beyond: int
    n: int
    first: tuple[int, ...] | None
    worst: tuple[int, ...] | None
    message: str

    @property
    def within(self) -> bool:
        """Tell whether every place keeps its bound."""
        return self.n_beyond == 0 and not self.message


def occupancies(bound: Tensor, actual: Tensor, expected: Tensor) -> Tensor:
    """Divide each error by its bound, so that above 1 means beyond it.

    Args:
        bound: absolute, float64; 0 asks for equality.
        actual: what was computed.
        expected: what is right. Where it is NaN, ``actual`` must not be finite.

    Returns:
        Float64. Infinite where ``actual`` is NaN and ``expected`` is not, where ``expected`` is
        NaN and ``actual`` finite, and where the bound itself is NaN.

    >>> one = torch.ones(1)
    >>> occupancies(one * 0.5, one, one * torch.nan)
    tensor([inf], dtype=torch.float64)
    """
    bound, actual, expected = (x.detach().cpu().double() for x in (bound, actual, expected))
    equal = actual == expected
    error = torch.where(equal, 0.0, (actual - expected).abs())
    ratio = torch.where(error == 0, 0.0, error / bound)
    unbounded = bound.isposinf() & ~actual.isnan()
    ratio = torch.where(unbounded, 0.0, ratio)
    ratio = torch.where(expected.isnan(), torch.where(actual.isfinite(), torch.inf, 0.0), ratio)
    return torch.where(ratio.isnan() | (bound.isnan() & ~expected.isnan()), torch.inf, ratio)


def compare(bound: Tensor, actual: Tensor, expected: Tensor, name: str = "out") -> Comparison:
    """Compare one tensor with its bound and say what a person needs to know.

    Args:
        bound: absolute bounds.
        actual: what was computed.
        expected: what is right.
        name: for the message.

    Returns:
        The verdict, with the first and the worst place.

    >>> one = torch.ones(2)
    >>> compare(one * 0.5, one, one + 0.25).occupancy
    0.5
    """
    if actual.shape != expected.shape:
        message = (
            f"{name} must have shape {tuple(expected.shape)}, "
            f"got {name} of shape {tuple(actual.shape)}."
        )
        return Comparison(name, float("inf"), 0, 0, None, None, message)
    ratio = occupancies(bound.expand(expected.shape), actual, expected)
    if not ratio.numel():
        return Comparison(name, 0.0, 0, 0, None, None, "")
    beyond = ratio > 1
    n_beyond = int(beyond.sum())
    worst = _place(int(ratio.flatten().argmax()), ratio.shape)
    occupancy = float(ratio.max())
    if not n_beyond:
        return Comparison(name, occupancy, 0, ratio.numel(), None, worst, "")
    first = _place(int(beyond.flatten().int().argmax()), ratio.shape)
    at_first, at_worst = (
        _at(p, bound.expand(expected.shape), actual, expected) for p in (first, worst)
    )
    message = (
        f"{name} is beyond its bound at {n_beyond} of {ratio.numel()} places ({actual.dtype}).\n"
        f"  first: {at_first}\n  worst: {at_worst}\n"
        f"{_advice(ratio, actual, expected)}"
    )
    return Comparison(name, occupancy, n_beyond, ratio.numel(), first, worst, message)


def assert_within(
    bound: Tensor | Sequence[Tensor | None],
    actual: Tensor | Sequence[Tensor | None],
    expected: Tensor | Reference | Sequence[Tensor | None],
) -> float:
    """Assert that every element keeps its computed bound.

    Args:
        bound: a tensor, a :class:`Bound` or a sequence of tensors.
        actual: one tensor (the output), or a sequence. Three to five tensors are dq, dk, dv,
            dbias, dsinks; with the output before them, as a :class:`Bound` is ordered, one more.
        expected: a tensor, a :class:`Reference`, :class:`Gradients` or a sequence; None is
            left out.

    Returns:
        The occupancy: the worst error over its bound.

    Raises:
        AssertionError: where the bound is broken or a NaN stands where none is due, with how many,
            where, by how much, and what to do.
        ValueError: sequences of lengths that do not fit.

    Numerics: compared in float64. A NaN fails unless a NaN is expected there; a finite number
        where a NaN is expected fails too.

    >>> one = torch.ones(1)
    >>> assert_within(one * 0.5, one, one.double())
    0.0
    """
    comparisons = compare_all(bound, actual, expected)
    broken = [one.message for one in comparisons if not one.within]
    if broken:
        raise AssertionError("\n".join(broken))
    return max((one.occupancy for one in comparisons), default=0.0)


def compare_all(
    bound: Tensor | Sequence[Tensor | None],
    actual: Tensor | Sequence[Tensor | None],
    expected: Tensor | Reference | Sequence[Tensor | None],
) -> list[Comparison]:
    """Compare like with like; see :func:`assert_within` for the forms it takes."""
    if isinstance(expected, Reference):
        expected = expected.out
    if isinstance(actual, Tensor):
        if not isinstance(expected, Tensor):
            expected = _only(expected)
        return [compare(bound if isinstance(bound, Tensor) else _only(bound), actual, expected)]
    if isinstance(expected, Tensor) or isinstance(bound, Tensor):
        raise ValueError(
            "actual must be one tensor where bound or expected is, "
            f"got actual=a sequence of {len(actual)}."
        )
    bounds, wanted = list(bound), list(expected)
    names = _NAMES if len(actual) != len(bounds) or len(bounds) != 6 else ("out", *_NAMES)
    if len(bounds) == 6 and len(actual) <= 5:
        bounds = bounds[1:]
    wanted += [None] * (len(actual) - len(wanted))
    if len(bounds) < len(actual) or any(x is not None for x in wanted[len(actual) :]):
        raise ValueError(
            f"bound, actual and expected must be as long, got {len(bounds)}, {len(actual)} "
            f"and {len(wanted)}."
        )
    found = []
    for name, limit, got, want in zip(names, bounds, actual, wanted, strict=False):
        if limit is None or want is None:
            continue
        if got is None:
            found.append(Comparison(name, float("inf"), 0, 0, None, None, f"{name} is missing."))
        else:
            found.append(compare(limit, got, want, name))
    return found


def is_vacuous(bound: Tensor, expected: Tensor) -> bool:
    """Tell whether zeros would pass: a test with such a bound tests nothing.

    >>> is_vacuous(torch.ones(1), torch.full((1,), 0.5))
    True
    """
    zeros = torch.zeros_like(expected)
    return expected.numel() > 0 and bool((occupancies(bound, zeros, expected) <= 1).all())


def _only(many: Sequence[Tensor | None]) -> Tensor:
    first = many[0]
    if first is None:
        raise ValueError("bound must hold a tensor for the output, got bound=None.")
    return first


def _place(flat: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), shape))


def _at(place: tuple[int, ...], bound: Tensor, actual: Tensor, expected: Tensor) -> str:
    limit, got, want = (float(x[place]) for x in (bound, actual, expected))
    error = abs(got - want)
    times = f"{error / limit:.3g} times " if limit > 0 else "against "
    verdict = f"error {error:.3g}, {times}the bound {limit:.3g}"
    return f"{list(place)} is {got!r}, expected {want!r}; {verdict}"


def _advice(ratio: Tensor, actual: Tensor, expected: Tensor) -> str:
    beyond = ratio > 1
    bad = actual.detach().cpu()[beyond]
    want = expected.detach().cpu()[beyond]
    if bool((want.isnan() & bad.isfinite()).any()):
        return "A NaN that is due was swallowed: something maps it to a number, such as a max."
    if bool((~bad.isfinite() & want.isfinite()).any()):
        return (
            "Not finite where the exact result is: look for an empty row, garbage at a masked "
            "position, or a score or a sum that leaves the range of its dtype."
        )
    if float(ratio.max()) < 4:
        return (
            "Close to the bound: if the kernel stores scores or weights in 16 bits, say so with "
            "profile=Profile(...); otherwise explain_difference(...) tries the known mistakes."
        )
    return "Far beyond rounding: explain_difference(...) tries the known mistakes."
