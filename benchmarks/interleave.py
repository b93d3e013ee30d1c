"""Time callables turn by turn, so that a noisy machine disturbs all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch

Call = Callable[[], object]
# Seconds; threads that spin after a call have stopped before the next contestant, also those of
# another process, where an OpenMP of another kind may spin for a fifth of a second.
PAUSE, PAUSE_APART = 0.005, 0.25
# Seconds for which a short call is repeated; long enough that one disturbance does not make a turn.
TURN, TURN_APART = 0.03, 0.3


class Elsewhere(Protocol):
    """A contestant in another process."""

    def seconds(self) -> float:
        """Take a turn; give the mean time of a call."""
        ...


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
    contestants: Mapping[str, Call | Elsewhere],
    *,
    rounds: int = 15,
    seconds_a_turn: float | None = None,
    device: str = "cpu",
) -> dict[str, Timing]:
    """Warm all up, then time them in turns; each round starts with another contestant.

    Args:
        contestants: what to call, by name, or what times itself in another process.
        rounds: turns of each.
        seconds_a_turn: a short call is repeated for about this long, and the mean taken; None takes
            more where some are in other processes, which take turns as long.
        device: "cuda" times with events on the device, "cpu" with the clock.
    """
    is_together = all(map(callable, contestants.values()))
    pause = PAUSE if is_together else PAUSE_APART
    if seconds_a_turn is None:
        seconds_a_turn = TURN if is_together else TURN_APART
    turns: dict[str, Callable[[], float]] = {}
    for name, contestant in contestants.items():
        is_here = callable(contestant)
        turns[name] = turn_of(contestant, seconds_a_turn, device) if is_here else contestant.seconds
    names = list(contestants)
    found: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(pause)
            found[name].append(turns[name]())
    return {
        name: Timing(1e3 * statistics.median(x), 1e3 * spread(x), tuple(x))
        for name, x in found.items()
    }


def turn_of(call: Call, seconds: float, device: str) -> Callable[[], float]:
    """Warm a callable up; give what calls it for about so long and returns the mean time."""
    once = _once_cuda if device == "cuda" else _once_cpu
    once(call)
    repeats = max(1, int(seconds / max(once(call), 1e-9)))

    def turn() -> float:
        once(call)  # its threads have slept, and others have used the cache
        return statistics.fmean(once(call) for _ in range(repeats))

    return turn


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
