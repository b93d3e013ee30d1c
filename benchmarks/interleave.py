"""Time two callables turn by turn, so that a noisy machine disturbs both alike."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Ratio(NamedTuple):
    """Median times in milliseconds, and the median of ours / theirs over the rounds."""

    ours: float
    theirs: float
    ratio: float
    spread: float  # interquartile range of the ratio


def interleaved(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    *,
    rounds: int = 15,
    seconds_a_round: float = 0.03,
) -> Ratio:
    """Warm both up, then time them in turns."""
    for _ in range(2):
        ours()
        theirs()
    repeats = max(1, int(seconds_a_round / max(_once(theirs), 1e-9)))
    pairs = []
    for _ in range(rounds):
        pairs.append(tuple(sum(_once(f) for _ in range(repeats)) / repeats for f in (ours, theirs)))
    ratios = sorted(a / b for a, b in pairs)
    quarter = len(ratios) // 4
    return Ratio(
        1e3 * statistics.median(a for a, _ in pairs),
        1e3 * statistics.median(b for _, b in pairs),
        statistics.median(ratios),
        ratios[-1 - quarter] - ratios[quarter],
    )


def _once(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    f()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def machine() -> str:
    """Say what the figures were measured on."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            name = next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
