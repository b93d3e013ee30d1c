"""What a classifier's probabilities are worth: accuracy, F1, confusion, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stabletx import _checks
from stabletx._checks import must

N_BINS = 15


class ClassScore(NamedTuple):
    """How well one class is found; a share whose denominator is 0 counts as 0."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int  # rows that are of this class


class Bin(NamedTuple):
    """Rows whose highest probability lies in ``(low, high]``."""

    low: float
    high: float
    n: int
    confidence: float  # mean of the highest probability; 0 where the bin is empty
    accuracy: float


@dataclass(frozen=True)
class Metrics:
    """The figures of one set of rows. ``str()`` is the table to print.

    Attributes:
        accuracy: share of rows whose most probable class is right.
        macro_f1: mean of the classes' F1, whether a class occurs or not.
        loss: mean of ``-log`` of the right class's probability, nats.
        calibration_error: expected calibration error over 15 bins of equal width.
        majority: share of the rows that are of the most frequent class.
        majority_label: its name.
        classes: one score a class.
        confusion: ``confusion[i][j]`` rows of class i were taken for class j.
        bins: the calibration curve.
    """

    accuracy: float
    macro_f1: float
    loss: float
    calibration_error: float
    majority: float
    majority_label: str
    classes: tuple[ClassScore, ...]
    confusion: tuple[tuple[int, ...], ...]
    bins: tuple[Bin, ...]

    @property
    def n_rows(self) -> int:
        """Count the rows."""
        return sum(score.support for score in self.classes)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as what JSON can hold."""
        classes = [score._asdict() for score in self.classes]
        bins = [own._asdict() for own in self.bins]
        return {**asdict(self), "n_rows": self.n_rows, "classes": classes, "bins": bins}

    def __str__(self) -> str:
        width = max(5, *(len(score.label) for score in self.classes))
        lines = [f"{'class':<{width}}  precision  recall     f1    rows"]
        for label, precision, recall, f1, support in self.classes:
            lines.append(
                f"{label:<{width}}  {precision:9.3f}  {recall:6.3f}  {f1:5.3f}  {support:6}"
            )
        return "\n".join(lines)


def classification_metrics(
    probabilities: Tensor,  # (n, c)
    truth: Tensor,  # (n,) integers
    labels: Sequence[str],
) -> Metrics:
    """Measure predictions against the truth.

    Args:
        probabilities: rows that sum to 1.
        truth: the right class of each row.
        labels: names of the c classes.

    Returns:
        All figures, as plain numbers.

    Raises:
        ValueError: if there is no row, or the shapes do not fit each other.

    Numerics: counts are exact; means are taken in float64. A right class with probability 0 counts
        as the smallest positive number of the dtype.
    Source: Guo et al. (2017), On calibration of modern neural networks, for the calibration error.

    >>> p = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3]])
    >>> classification_metrics(p, torch.tensor([0, 1, 1]), ["no", "yes"]).confusion
    ((1, 0), (1, 1))
    """
    _check(probabilities, truth, labels)
    n_rows, n_classes = probabilities.shape
    truth = truth.cpu().long()
    confidence, predicted = (x.cpu() for x in probabilities.max(dim=1))
    confusion = _confusion(truth, predicted, n_classes)
    classes = _class_scores(confusion, labels)
    own = probabilities.cpu().gather(1, truth[:, None])[:, 0]
    tiny = torch.finfo(own.dtype).tiny
    bins = _bins(confidence.double(), predicted == truth)
    support = confusion.sum(1)
    return Metrics(
        accuracy=int(confusion.diagonal().sum()) / n_rows,
        macro_f1=sum(score.f1 for score in classes) / n_classes,
        loss=float(-own.clamp(min=tiny).double().log().mean()),
        calibration_error=sum(b.n * abs(b.accuracy - b.confidence) for b in bins) / n_rows,
        majority=int(support.max()) / n_rows,
        majority_label=labels[int(support.argmax())],
        classes=classes,
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        bins=bins,
    )


def _check(probabilities: Tensor, truth: Tensor, labels: Sequence[str]) -> None:
    _checks.check_float("probabilities", probabilities)
    _checks.check_axes("probabilities", probabilities, "n c")
    _checks.check_integers("truth", truth)
    _checks.check_axes("truth", truth, "n")
    if len(truth) == 0:
        raise ValueError(must("truth", "have at least one row", tuple(truth.shape)))
    _checks.check_same_batch("probabilities", probabilities, "truth", truth)
    if len(labels) != probabilities.shape[1]:
        rule = f"name the {probabilities.shape[1]} classes"
        raise ValueError(must("labels", rule, f"{len(labels)} names"))


def _confusion(truth: Tensor, predicted: Tensor, n_classes: int) -> Tensor:  # (c, c)
    counts = torch.bincount(truth * n_classes + predicted, minlength=n_classes * n_classes)
    return counts.view(n_classes, n_classes)


def _class_scores(confusion: Tensor, labels: Sequence[str]) -> tuple[ClassScore, ...]:
    right = confusion.diagonal().tolist()
    found, support = confusion.sum(0).tolist(), confusion.sum(1).tolist()
    return tuple(
        ClassScore(label, _share(r, f), _share(r, s), _share(2 * r, f + s), s)
        for label, r, f, s in zip(labels, right, found, support, strict=True)
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _bins(confidence: Tensor, is_right: Tensor) -> tuple[Bin, ...]:
    edges = torch.arange(N_BINS + 1, dtype=torch.float64) / N_BINS
    place = torch.bucketize(confidence, edges[1:-1])  # right edge included
    n = torch.bincount(place, minlength=N_BINS)
    sums = torch.bincount(place, confidence, minlength=N_BINS)
    right = torch.bincount(place, is_right.double(), minlength=N_BINS)
    return tuple(
        Bin(i / N_BINS, (i + 1) / N_BINS, count, total / max(count, 1), hits / max(count, 1))
        for i, (count, total, hits) in enumerate(
            zip(n.tolist(), sums.tolist(), right.tolist(), strict=True)
        )
    )
