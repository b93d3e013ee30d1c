"""What a law is, and what it says when it is broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from stabletx.testing.laws.ask import Ask
    from stabletx.testing.laws.setting import Choices, Setting


class Violation(Exception):
    """An attention broke a law on one example; the message says how."""


class Raised(Violation):
    """The attention raised an exception."""


class NotAsked(Exception):
    """An example cannot be asked of this attention; the message says why."""


@dataclass(frozen=True)
class Law:
    """One thing that every attention owes its users.

    Attributes:
        name: short and stable, such as ``"empty-rows"``.
        sentence: what must hold, in one sentence.
        source: where the demand comes from.
        check: asks an attention about one setting; raises :class:`Violation` where the law is
            broken.
        choices: what the settings of this law are drawn from.
        needs: what the attention must offer to be asked: ``"mask"``, ``"gradient"``, ``"bias"``...
        extreme: asks about magnitudes beyond 2^60; reported always, counted where asked for.
        dtypes: the dtypes in which it is asked; () = all.
        share: examples asked, relative to the other laws.
    """

    name: str
    sentence: str
    source: str
    check: Callable[[Ask, Setting], None]
    choices: Choices
    needs: tuple[str, ...] = ()
    extreme: bool = False
    dtypes: tuple[torch.dtype, ...] = ()
    share: float = 1.0
