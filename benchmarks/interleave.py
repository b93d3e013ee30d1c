"""Time callables turn by turn, so that a noisy machine disturbs all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

Call = Callable[[], object]
PAUSE = 0.005  # seconds; threads that spin after a call have stopped before the next contestant


class Timing(NamedTuple):
    """One contestant: median milliseconds and their spread; each round in seconds."""

    ms: float
    spread_ms: float
    rounds: tuple[float, ...]

    def ratio_of(self, ours: Timing) -> tuple[float, float]:
        """Give the median and the spread of ours / this over the rounds."""
        ratios = [a / b for a, b in zip(ours.rounds, self.rounds, strict=True)]
        return statistics.median(ratios), spread(ratios)


class Ratio(NamedTuple):
    """Median times in milliseconds, and the median of ours / theirs over the rounds."""

    ours: float
    theirs: float
    ratio: float
    spread: float  # interquartile range of the ratio


def in_turns(
    contestants: Mapping[str, Call],
    *,
    rounds: int = 15,
    seconds_a_turn: float = 0.03,
    device: str = "cpu",
) -> dict[str, Timing]:
    """Warm all up, then time them in turns; each round starts with another contestant.

    Args:
        contestants: what to call, by name.
        rounds: turns of each.
        seconds_a_turn: a short call is repeated for about this long, and the mean taken.
        device: "cuda" times with events on the device, "cpu" with the clock.
    """
    once = _once_cuda if device == "cuda" else _once_cpu
    repeats = {}
    for name, call in contestants.items():
        once(call)
        repeats[name] = max(1, int(seconds_a_turn / max(once(call), 1e-9)))
    names = list(contestants)
    found: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(PAUSE)
            turns = [once(contestants[name]) for _ in range(repeats[name])]
            found[name].append(statistics.fmean(turns))
    return {
        name: Timing(1e3 * statistics.median(x), 1e3 * spread(x), tuple(x))
        for name, x in found.items()
    }


def interleaved(
    ours: Call, theirs: Call, *, rounds: int = 15, seconds_a_round: float = 0.03
) -> Ratio:
    """Time two in turns."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    both = in_turns(
        {"ours": ours, "theirs": theirs},
        rounds=rounds,
        seconds_a_turn=seconds_a_round,
        device=device,
    )
    return Ratio(both["ours"].ms, both["theirs"].ms, *both["theirs"].ratio_of(both["ours"]))


def spread(values: list[float]) -> float:
    """Give the interquartile range."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return ordered[-1 - quarter] - ordered[quarter]


def _once_cpu(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _once_cuda(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3
