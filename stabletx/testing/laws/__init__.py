"""The laws that every attention owes its users."""

from stabletx.testing.laws import (
    accuracy,
    blocked,
    conduct,
    extras,
    extremes,
    gradients,
    independence,
    symmetry,
)
from stabletx.testing.laws.ask import Ask
from stabletx.testing.laws.law import Law, NotAsked, Raised, Violation
from stabletx.testing.laws.setting import Setting

# In the order in which they are asked: the plainest first, conduct over all calls last.
LAWS: tuple[Law, ...] = (
    *conduct.LAWS[:-1],
    *accuracy.LAWS,
    *blocked.LAWS,
    *independence.LAWS,
    *symmetry.LAWS,
    *gradients.LAWS,
    *extras.LAWS,
    *conduct.LAWS[-1:],
    *extremes.LAWS,
)

__all__ = ["LAWS", "Ask", "Law", "NotAsked", "Raised", "Setting", "Violation"]
