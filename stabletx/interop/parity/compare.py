"""Run the same rows through several environments and say how far their answers lie apart."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from stabletx._checks import check_one_of, check_positive, must
from stabletx.data import collate
from stabletx.functional.softmax import softmax
from stabletx.interop.parity.environments import BASE, EXACT, NotHere, Subject, build, names
from stabletx.interop.parity.rounding import distances, rounding_bounds
from stabletx.interop.parity.stages import stage_names

_ROWS_LOOKED_INTO = 16


@dataclass(frozen=True)
class Finding:
    """What one environment does.

    Attributes:
        name: of the environment.
        about: what is different in it.
        largest_change: of any probability, against float32.
        mean_change: over the rows, of each row's largest change.
        changed_labels: share of the rows in [0, 1] whose most probable class is another.
        worst_row: the row with the largest change.
        distances: from float64 at each stage: the 2-norm of the worst token's error.
        ratios: the same in units of what rounding can explain; see :mod:`.rounding`.
        diverges_at: the first stage that rounding does not explain; "" where it explains all.
        ignores_padding: other ids at padding change no bit.
        empty_is_finite: a row without a token has finite logits.
        seconds: for all rows, without preparation.
    """

    name: str
    about: str
    largest_change: float
    mean_change: float
    changed_labels: float
    worst_row: int
    distances: list[float]
    ratios: list[float]
    diverges_at: str
    ignores_padding: bool
    empty_is_finite: bool
    seconds: float

    def passes(self, threshold: float) -> bool:
        """Tell whether the change stays within a threshold and padding keeps the contract."""
        return self.largest_change <= threshold and self.ignores_padding and self.empty_is_finite


@dataclass(frozen=True)
class Comparison:
    """What all environments do.

    Attributes:
        stages: names, from the embeddings to the logits.
        n_rows: rows compared.
        findings: one for each environment, in the order asked for.
        left_out: environments that this machine cannot run, and why.
        rounding: for each dtype, the distance that rounding can explain at each stage.
    """

    stages: list[str]
    n_rows: int
    findings: list[Finding]
    left_out: dict[str, str]
    rounding: dict[str, list[float]]

    def to_dict(self) -> dict[str, Any]:
        """Give every figure as what JSON can hold; what is not finite as a text."""
        figures: dict[str, Any] = _finite_only(asdict(self))
        return figures


def compare(
    subject: Subject,
    rows: Sequence[Sequence[int]],
    *,
    environments: Sequence[str] = (),
    batch: int = 32,
    on_start: Callable[[str], object] = lambda name: None,
) -> Comparison:
    """Compare the environments of a classifier.

    Args:
        subject: the model, on the CPU.
        rows: token ids of each text, at least one.
        environments: names; none takes all that need neither a GPU that is not there, nor a
            package that is not installed, nor minutes of compilation.
        batch: rows in a batch; they are not sorted, so that there is padding.
        on_start: called with the name of each environment before it runs.

    Raises:
        ValueError: if there is no row, or an environment is unknown.
        ImportError: if a package is missing for an environment that was named.
        NotHere: if the device is missing for an environment that was named.
    """
    if not rows:
        raise ValueError(must("rows", "hold at least one text", "none"))
    check_positive("batch", batch)
    for name in environments:
        check_one_of("environments", name, tuple(names()))
    asked = list(environments) or names(defaults=True)
    run = _Run(subject, rows, batch)
    findings, left_out = [], {}
    for name in asked:
        on_start(name)
        try:
            findings.append(run.finding(name))
        except (ImportError, NotHere) as error:
            if environments:
                raise
            left_out[name] = str(error)
    rounding = {str(k).removeprefix("torch."): v for k, v in run.rounding.items()}
    return Comparison(stage_names(subject.model), len(rows), findings, left_out, rounding)


class _Run:
    """The rows, and what every environment is held against."""

    def __init__(self, subject: Subject, rows: Sequence[Sequence[int]], batch: int) -> None:
        self.subject, self.rows, self.batch = subject, rows, batch
        self.names = stage_names(subject.model)
        self.base = self._probabilities(build(BASE, subject).logits)
        self.sample = self._collated(rows[:_ROWS_LOOKED_INTO])
        self.probe = self._padding_probe()
        with torch.inference_mode():
            self.exact = build(EXACT, subject).stages(*self.sample)
        self.rounding: dict[torch.dtype, list[float]] = {}

    def finding(self, name: str) -> Finding:
        environment = build(name, self.subject)
        ids, other_ids, keep = self.probe
        with torch.inference_mode():
            first, again = environment.logits(ids, keep), environment.logits(other_ids, keep)
            stages = environment.stages(*self.sample)
        started = time.perf_counter()
        probabilities = self._probabilities(environment.logits)
        seconds = time.perf_counter() - started
        change = (probabilities - self.base).abs().amax(1)
        moved = probabilities.argmax(1) != self.base.argmax(1)
        worst = int(change.nan_to_num(nan=math.inf).argmax())
        off = distances(stages, self.exact) if stages else []
        ratios = _ratios(off, self._rounding(environment.dtype))
        beyond = (n for n, r in zip(self.names, ratios, strict=False) if not r <= 1)
        return Finding(
            name=name,
            about=environment.about,
            largest_change=float(change[worst]),
            mean_change=float(change.mean()),
            changed_labels=float(moved.double().mean()),
            worst_row=worst,
            distances=off,
            ratios=ratios,
            diverges_at=next(beyond, ""),
            ignores_padding=torch.equal(first, again),
            empty_is_finite=bool(first[-1].isfinite().all()),
            seconds=round(seconds, 3),
        )

    def _rounding(self, dtype: torch.dtype) -> list[float]:
        if dtype not in self.rounding:
            model = self.subject.copy(torch.float64)
            with torch.inference_mode():
                self.rounding[dtype] = rounding_bounds(model, *self.sample, self.exact, dtype)
        return self.rounding[dtype]

    def _probabilities(self, logits: Callable[[Tensor, Tensor], Tensor]) -> Tensor:  # (n, c)
        # Batches of even size: a last one of a single row would be another case for a compiler.
        n_batches = -(-len(self.rows) // self.batch)
        edges = [len(self.rows) * i // n_batches for i in range(n_batches + 1)]
        with torch.inference_mode():
            parts = [
                logits(*self._collated(self.rows[a:b])).double()
                for a, b in itertools.pairwise(edges)
            ]
        return softmax(torch.cat(parts))

    def _collated(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        batch = collate(rows, pad_id=self.subject.model.config.pad_id)
        return batch.input_ids, batch.attention_mask

    def _padding_probe(self) -> tuple[Tensor, Tensor, Tensor]:
        """Give a batch twice with other ids at padding; its last row has no token at all."""
        config = self.subject.model.config
        room = max(config.max_seq_len - 3, 1)
        rows = [list(row)[:room] for row in self.rows[:3]]
        ids, keep = self._collated([*rows, []])
        width = min(ids.shape[1] + 3, config.max_seq_len) - ids.shape[1]
        ids = torch.nn.functional.pad(ids, (0, width), value=config.pad_id)
        keep = torch.nn.functional.pad(keep, (0, width), value=False)
        garbage = torch.arange(ids.numel()).view_as(ids) % config.vocab_size
        return ids, torch.where(keep, ids, garbage), keep


def _ratios(distances: Sequence[float], rounding: Sequence[float]) -> list[float]:
    """Divide; where even rounding makes no error, none is allowed."""
    return [
        0.0 if a == 0 else a / b if b else math.inf
        for a, b in zip(distances, rounding, strict=False)
    ]


def _finite_only(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite_only(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_only(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
