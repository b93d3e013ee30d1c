"""A contest: some callables that do the same work, checked, then timed turn by turn."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.apart import Apart
from benchmarks.errors import BenchmarkError as BenchmarkError
from benchmarks.interleave import Call, Timing, in_turns
from benchmarks.machine import FLOPS_OF_GEMM, READ_BYTES, limits

OURS = "stabletx"


class Settings(NamedTuple):
    """How to measure."""

    device: str = "cpu"
    rounds: int = 9
    is_quick: bool = False  # the smallest size of everything, to see that it runs

    def fewer(self) -> Settings:
        """Take two thirds of the rounds, for workloads of seconds a call."""
        return self._replace(rounds=max(1, 2 * self.rounds // 3))


@dataclass
class Row:
    """What is known of one contestant."""

    ms: float | None = None
    spread_ms: float = 0.0
    ratio: float | None = None  # stabletx's time over this one's, median over the rounds
    ratio_spread: float = 0.0
    error: float | None = None  # largest difference from the judge
    reason: str = ""  # why it has no time
    points: dict[str, float] = field(default_factory=dict)  # of a curve, by length
    rounds_ms: list[float] = field(default_factory=list)


@dataclass
class Outcome:
    """What a case found; ``rows`` begin with stabletx."""

    rows: dict[str, Row]
    about: dict[str, Any] = field(default_factory=dict)


class Case(NamedTuple):
    """One workload.

    Attributes:
        part: what it belongs to.
        name: of the workload.
        names: the contestants.
        run: measures.
        asked: by contestant, what stabletx's ratio to it must not exceed; "best" of all.
        unit: of the figures.
    """

    part: str
    name: str
    names: tuple[str, ...]
    run: Callable[[Settings], Outcome]
    asked: dict[str, float] = {}  # noqa: RUF012  (never written to)
    unit: str = "ms"


@dataclass
class Contest:
    """What a case builds.

    Attributes:
        makers: by name, what builds each contestant; one that raises ImportError is left out.
        error: how far a result lies from the judge's, largest difference.
        allowed: largest error that is still the right answer, by name, or for all as "".
        dtype: of the products, for the machine's limit.
        flops: that the work needs, or 0.
        n_bytes: of memory that the work must read, or 0.
        about: what else to record.
        device: where it runs.
        is_inference: whether it is called in inference mode.
    """

    makers: dict[str, Callable[[], Call | Apart]]
    error: Callable[[Any], float]
    allowed: dict[str, float]
    dtype: torch.dtype = torch.float32
    flops: float = 0.0
    n_bytes: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    is_inference: bool = False

    def apart(self, part: str, workload: str) -> Contest:
        """Put every contestant into a process of its own, where ``part`` builds it by its name."""
        made = {name: partial(Apart, part, workload, name, self.device) for name in self.makers}
        return replace(self, makers=made)


def hold(contest: Contest, settings: Settings) -> Outcome:
    """Build the contestants, refuse wrong answers, and time the others in turns.

    Raises:
        BenchmarkError: if stabletx itself is wrong.
    """
    rows: dict[str, Row] = {}
    calls: dict[str, Call | Apart] = {}
    with ExitStack() as open_ones:
        for name, make in contest.makers.items():
            rows[name] = row = Row()
            try:
                contestant = make()
            except ImportError as missing:
                row.reason = f"{missing.name or missing} is not installed"
                continue
            is_apart = isinstance(contestant, Apart)
            if is_apart:
                open_ones.callback(contestant.close)
            row.error = contestant.error if is_apart else contest.error(contestant())
            allowed = contest.allowed.get(name, contest.allowed[""])
            if row.error <= allowed:
                calls[name] = contestant
            elif name == OURS:
                raise BenchmarkError(f"{OURS} is off by {row.error:.3g}, more than {allowed:.3g}.")
            else:
                row.reason = f"wrong by {row.error:.3g}, more than {allowed:.3g}"
        wants_limit = bool(contest.flops or contest.n_bytes) and not settings.is_quick
        machine = limits(contest.dtype, settings.device) if wants_limit else {}
        timings = in_turns(
            {**calls, **machine},
            rounds=settings.rounds,
            seconds_a_turn=0.0 if settings.is_quick else None,
            device=settings.device,
        )
    for name in calls:
        rows[name] = timed(rows[name], timings[name], timings[OURS])
    about = {**contest.about, **_shares(contest, timings)} if machine else dict(contest.about)
    return Outcome(rows, about)


def timed(row: Row, own: Timing, ours: Timing) -> Row:
    """Write down the times of a contestant."""
    row.ms, row.spread_ms = own.ms, own.spread_ms
    row.ratio, row.ratio_spread = own.ratio_of(ours)
    row.rounds_ms = [round(1e3 * x, 4) for x in own.rounds]
    return row


def _shares(contest: Contest, timings: dict[str, Timing]) -> dict[str, Any]:
    seconds = timings[OURS].ms / 1e3
    products = [t.ms for name, t in timings.items() if name in ("limit: torch.mm", "limit: oneDNN")]
    peak = FLOPS_OF_GEMM / (min(products) / 1e3)
    bandwidth = READ_BYTES / (timings["limit: read"].ms / 1e3)
    found = {"peak_gflops": peak / 1e9, "bandwidth_gb": bandwidth / 1e9}
    if contest.flops:
        found["share_of_products"] = contest.flops / seconds / peak
    if contest.n_bytes:
        found["share_of_bandwidth"] = contest.n_bytes / seconds / bandwidth
    return found


def largest(difference: torch.Tensor) -> float:
    """Give the largest magnitude, infinite where there is a NaN."""
    found = float(difference.abs().max()) if difference.numel() else 0.0
    return found if found == found else float("inf")


def ragged_lengths(b: int, n: int, fill: float) -> torch.Tensor:
    """Draw lengths from a lognormal law whose mean is ``fill * n`` and whose longest is n, seeded.

    The shape parameter is 0.6, as in texts of one kind. Nobody is made to pad beyond the longest.
    """
    if fill >= 1.0:
        return torch.full((b,), n)
    raw = torch.empty(b).log_normal_(0.0, 0.6, generator=torch.Generator().manual_seed(1))
    scale = fill * n / float(raw.mean())
    for _ in range(20):
        lengths = (raw * scale).round().clamp(1, n)
        lengths[raw.argmax()] = n
        scale *= fill * n / float(lengths.mean())
    return lengths.long()
