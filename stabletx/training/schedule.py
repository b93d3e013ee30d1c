"""The learning rate over a run, as a pure function of how far the run is."""

import math
from typing import Literal

from stabletx import _checks
from stabletx._checks import must

Decay = Literal["cosine", "linear", "none"]
DECAYS: tuple[Decay, ...] = ("cosine", "linear", "none")


def learning_rate_factor(
    share: float, *, warmup: float = 0.05, decay: Decay = "cosine", floor: float = 0.0
) -> float:
    """Return what the peak learning rate is multiplied with.

    Args:
        share: how much of the run is done, in [0, 1]; anything above counts as 1.
        warmup: share of the run in which the factor rises linearly, in [0, 1).
        decay: the way from 1 at the end of the warm-up to ``floor`` at the end of the run.
        floor: the factor at the end, in [0, 1].

    Returns:
        A factor in [0, 1].

    Raises:
        ValueError: for a number out of its range or an unknown decay.

    Numerics: Python floats; the factor is never above 1.
    Source: Loshchilov and Hutter (2017), SGDR, for the cosine.

    >>> [round(learning_rate_factor(x, warmup=0.5), 3) for x in (0.0, 0.25, 0.5, 0.75, 1.0)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    _checks.check_probability("warmup", warmup)
    _checks.check_one_of("decay", decay, DECAYS)
    if not 0.0 <= floor <= 1.0:
        raise ValueError(must("floor", "be in [0, 1]", floor))
    if not share >= 0.0:
        raise ValueError(must("share", "be at least 0", share))
    if share < warmup:
        return share / warmup
    if decay == "none":
        return 1.0
    done = min((share - warmup) / (1.0 - warmup), 1.0)
    left = 1.0 - done if decay == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)
    return floor + (1.0 - floor) * left
