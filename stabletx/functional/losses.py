"""Losses that no ignored row can poison, and that are 0 where there is nothing to learn from."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from stabletx import _checks
from stabletx._precision import compute_dtype
from stabletx.functional.softmax import logsumexp

Reduction = Literal["mean", "sum", "none"]


def cross_entropy(
    logits: Tensor,  # (..., c)
    labels: Tensor,  # (...), integers
    *,
    ignore_label: int = -100,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,  # (c,)
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:  # (), or (...) for "none"
    """Measure how far the softmax of the logits is from the labels.

    With ``p`` the softmax of a row's logits, ``y`` its label, ``w`` the class weights and ``S`` the
    classes whose logit is not -inf, the loss of a row is::

        (1 - label_smoothing) * w[y] * -log p[y]
        + label_smoothing * mean over c in S of (w[c] * -log p[c])
        + z_loss * w[y] * logsumexp(logits) ** 2

    Args:
        logits: scores of the classes, unit-free, classes last. -inf rules a class out.
        labels: class of each row, in [0, c), or ``ignore_label``.
        ignore_label: rows with this label are absent, whatever their logits hold.
        label_smoothing: probability in [0, 1) that is spread evenly over the classes in ``S``.
        class_weights: non-negative weight of each class; a row whose label has weight 0 is absent.
        z_loss: coefficient that holds the normalizer near 0; 1e-4 is usual.
        reduction: ``"mean"`` divides the sum of the rows by the sum of ``w[y]`` (their number
            without class weights), ``"sum"`` adds them, ``"none"`` keeps them.

    Returns:
        The loss, nats, float32 (float64 for float64); 0 with gradient 0 where no row is present.

    Raises:
        TypeError: if ``logits`` are not floating point or ``labels`` not integers.
        ValueError: if shapes do not fit, or a number is out of its range.

    Numerics: computed in float32 (float64 for float64) and returned so, since a loss of 16 bits
    moves in steps of a percent. Absent rows get gradient exactly 0. A present row that holds NaN or
    +inf, or nothing but -inf, makes the loss NaN; a label whose logit is -inf makes it +inf. Labels
    are not read beforehand: one outside [0, c) is an error of torch's indexing, on a GPU one that
    ends the process.
    Source: Szegedy et al. (2016), arXiv 1512.00567, section 7 (smoothing); Chowdhery et al. (2022),
    arXiv 2204.02311, section 5 (z-loss).

    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([1, -100]))
    tensor(1.3863)
    """
    _check(logits, labels, ignore_label, class_weights)
    _checks.check_probability("label_smoothing", label_smoothing)
    _checks.check_between("z_loss", z_loss, 0.0, 1.0)
    _checks.check_one_of("reduction", reduction, get_args(Reduction))
    work = compute_dtype(logits.dtype)
    labels = labels.long()
    present = labels != ignore_label
    labels = torch.where(present, labels, 0)
    row_weight = present.to(work)
    if class_weights is not None:
        class_weights = class_weights.to(work)
        row_weight = torch.where(present, class_weights[labels], 0.0)
        present = row_weight != 0
    logits = torch.where(present[..., None], logits.to(work), 0.0)

    log_p = torch.log_softmax(logits, -1)
    loss = row_weight * -log_p.gather(-1, labels[..., None])[..., 0]
    if label_smoothing > 0:
        possible = logits != -torch.inf
        each = torch.where(possible, -log_p, 0.0)
        each = each if class_weights is None else each * class_weights
        even = torch.where(present, each.sum(-1) / possible.sum(-1), 0.0)
        loss = (1 - label_smoothing) * loss + label_smoothing * even
    if z_loss > 0:
        loss = loss + z_loss * row_weight * logsumexp(logits).square()

    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    total = row_weight.sum()
    return (loss / torch.where(total == 0, 1.0, total)).sum()


def _check(logits: Tensor, labels: Tensor, ignore_label: int, class_weights: Tensor | None) -> None:
    _checks.check_float("logits", logits)
    _checks.check_labels(labels, logits)
    _checks.check_vector("class_weights", class_weights, logits.shape[-1], logits)
    if isinstance(ignore_label, bool) or not isinstance(ignore_label, int):
        raise TypeError(_checks.must("ignore_label", "be an int", repr(ignore_label)))
