"""What every family says of its checkpoints, and how that is carried out and reported."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from stabletx.interop.checkpoints import _messages
from stabletx.models._storage import StoredModel
from stabletx.models.config import TransformerConfig


@dataclass(frozen=True)
class Change:
    """A change of shape, there and back."""

    name: str
    there: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


TRANSPOSED = Change("transposed", lambda x: x.transpose(0, -1), lambda x: x.T)
FLATTENED = Change("flattened", lambda x: x.flatten(), lambda x: x[None])


def without_rows(n: int) -> Change:
    """Leave out the first ``n`` rows of a table, which no real token reads."""
    pad = (0, 0, n, 0)
    return Change(f"without its first {n} rows", lambda x: x[n:], lambda x: _padded(x, pad))


def _padded(x: Tensor, pad: tuple[int, ...]) -> Tensor:
    return torch.nn.functional.pad(x, pad)


@dataclass(frozen=True)
class Piece:
    """One tensor of ours and the tensor, or the tensors joined by rows, that it is made of.

    Attributes:
        ours: its name in our model.
        theirs: the names in the file, in the order in which they are joined.
        sizes: rows of each, where there are several.
        change: of shape, for each of theirs.
    """

    ours: str
    theirs: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    change: Change | None = None

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Make ours of theirs."""
        parts = [tensors[name] for name in self.theirs]
        if self.change is not None:
            parts = [self.change.there(part) for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def split(self, ours: Tensor) -> dict[str, Tensor]:
        """Make theirs of ours."""
        parts = list(torch.split(ours, list(self.sizes))) if self.sizes else [ours]
        if self.change is not None:
            parts = [self.change.back(part) for part in parts]
        return dict(zip(self.theirs, parts, strict=True))

    @property
    def how(self) -> str:
        """Say what happens to the shape; empty where nothing does."""
        changes = [self.change.name] if self.change is not None else []
        return ", ".join([*changes, *(["joined"] if len(self.theirs) > 1 else [])])


@dataclass(frozen=True)
class Ignored:
    """Names in a file that are left out, and why; ``pattern`` must match the whole name."""

    pattern: str
    reason: str


@dataclass(frozen=True)
class Conversion:
    """How a checkpoint of a family becomes a model of ours.

    Attributes:
        family: as in ``model_type``.
        model: the class of ours.
        config: of our model.
        pieces: every tensor of ours and where it comes from.
        tied: names in the file that repeat another, and which.
        ignored: names in the file that are left out.
        notes: settings that our model does not take over.
    """

    family: str
    model: type[StoredModel]
    config: TransformerConfig
    pieces: tuple[Piece, ...]
    tied: Mapping[str, str]
    ignored: tuple[Ignored, ...] = ()
    notes: tuple[str, ...] = ()


@final
@dataclass(frozen=True)
class Report:
    """What became of every tensor in a checkpoint.

    Attributes:
        family: as in ``model_type``.
        model: the name of our class.
        n_loaded: tensors of ours that were filled.
        missing: names that the file lacks; an error when loading, but for a head asked for.
        fresh: tensors of ours that start anew.
        unexpected: names in the file that nothing is known of; an error when loading.
        reshaped: (names in the file, our name, what happened to the shape).
        tied: (name in the file, the name whose tensor it repeats).
        ignored: (name in the file, why it is left out).
        notes: settings that our model does not take over.
    """

    family: str
    model: str
    n_loaded: int
    missing: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reshaped: tuple[tuple[tuple[str, ...], str, str], ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    ignored: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.family} into {self.model}: {self.n_loaded} tensors loaded"]
        lines += [f"  missing     {name}" for name in self.missing]
        lines += [f"  fresh       {name}" for name in self.fresh]
        lines += [f"  unexpected  {name}" for name in self.unexpected]
        for theirs, ours, how in self.reshaped:
            lines.append(f"  reshaped    {' + '.join(theirs)} -> {ours} ({how})")
        lines += [f"  tied        {name} = {other}" for name, other in self.tied]
        lines += [f"  ignored     {name} ({reason})" for name, reason in self.ignored]
        return "\n".join([*lines, *(f"  note        {note}" for note in self.notes)])


def carry_out(
    conversion: Conversion, tensors: Mapping[str, Tensor], *, ignore: Iterable[str] = ()
) -> tuple[dict[str, Tensor], Report]:
    """Make our tensors of a file's, and report on every one of both.

    Args:
        conversion: what the family says.
        tensors: by their names in the file.
        ignore: names to leave out, at the caller's wish.

    Returns:
        Our tensors by name, and the report; neither missing nor unexpected names raise here.

    Raises:
        ValueError: if tensors that must be one are not, or parts do not have the sizes to join.
    """
    known = dict(tensors)
    tied = _settle_ties(conversion, known)
    rules = [*conversion.ignored, *(Ignored(re.escape(name), "as asked for") for name in ignore)]
    made: dict[str, Tensor] = {}
    missing: list[str] = []
    used = set(tied)
    for piece in conversion.pieces:
        used |= set(piece.theirs) & known.keys()
        if not set(piece.theirs) <= known.keys():
            missing += [name for name in piece.theirs if name not in known]
            continue
        row = known[piece.theirs[0]].shape[1:]
        for name, size in zip(piece.theirs, piece.sizes or (None,), strict=True):
            _messages.check_rows(name, known[name], size, row)
        made[piece.ours] = piece.join(known)
    ignored, unexpected = [], []
    for name in sorted(tensors.keys() - used):
        reason = next((r.reason for r in rules if re.fullmatch(r.pattern, name)), None)
        (unexpected.append(name) if reason is None else ignored.append((name, reason)))
    reshaped = [(p.theirs, p.ours, p.how) for p in conversion.pieces if p.how and p.ours in made]
    return made, Report(
        conversion.family,
        conversion.model.__name__,
        len(made),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        reshaped=tuple(reshaped),
        tied=tuple(sorted(tied.items())),
        ignored=tuple(ignored),
        notes=conversion.notes,
    )


def _settle_ties(conversion: Conversion, known: dict[str, Tensor]) -> dict[str, str]:
    """Find the names that repeat another, and give each tensor the one name that is read."""
    found = {}
    for name, main in conversion.tied.items():
        if name not in known:
            continue
        if main not in known:
            known[main] = known[name]
        elif not torch.equal(known[name], known[main]):
            _messages.refuse_untied(name, main)
        found[name] = main
    return found
