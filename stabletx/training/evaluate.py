"""From a model and encoded rows to probabilities, figures and predictions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from stabletx._checks import must
from stabletx.data import Batch, Tokenizer, bucketed, collate
from stabletx.functional.softmax import softmax
from stabletx.training.metrics import Metrics, classification_metrics

_BATCH_TOKENS = 8192


class Encoded(Protocol):
    """Rows of token ids with labels, such as :class:`stabletx.data.EncodedSet`."""

    @property
    def lengths(self) -> list[int]:
        """Give the tokens of each row."""

    @property
    def labels(self) -> Sequence[int]:
        """Give the class of each row."""

    def __len__(self) -> int: ...

    def batch(self, rows: Sequence[int], *, pad_id: int = 0) -> Batch:
        """Give some rows as tensors."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model says about rows, and what that is worth."""

    probabilities: Tensor  # (n, c) float32, in the order of the rows
    truth: Tensor  # (n,)
    metrics: Metrics


class Prediction(NamedTuple):
    """The most probable label of a text."""

    label: str
    probability: float
    probabilities: dict[str, float]
    was_cut: bool  # the text was longer than the model reads


def evaluate(model: nn.Module, examples: Encoded) -> Evaluation:
    """Measure a classifier on rows.

    Args:
        model: called as ``model(input_ids, attention_mask).logits``; put into eval mode meanwhile.
        examples: encoded rows with labels.

    Raises:
        ValueError: if there is no row.

    Numerics: probabilities in at least float32.
    """
    if len(examples) == 0:
        raise ValueError(must("examples", "hold at least one row", "none"))
    lengths = examples.lengths
    batches = bucketed(lengths, max_tokens=max(_BATCH_TOKENS, *lengths))
    parts = [_probabilities(model, examples.batch(rows)) for rows in batches]
    places = torch.tensor([row for rows in batches for row in rows])
    together = torch.cat(parts)
    probabilities = torch.empty_like(together).index_copy_(0, places, together)
    truth = torch.tensor(list(examples.labels))
    names = label_names(model, probabilities.shape[1])
    return Evaluation(probabilities, truth, classification_metrics(probabilities, truth, names))


def predict(
    model: nn.Module, tokenizer: Tokenizer, texts: Iterable[str], *, at_once: int = 256
) -> Iterator[Prediction]:
    """Label texts as they stream in, in their order.

    Args:
        model: a classifier whose ``config`` names its labels and ``max_seq_len``.
        tokenizer: the one it was trained with.
        texts: any length; an empty one is judged as a text without words.
        at_once: texts in memory at a time; 1 answers each before the next is read.

    Returns:
        One prediction for each text.

    >>> from stabletx.models import SequenceClassifier, TransformerConfig
    >>> tokenizer = Tokenizer.train(["a good film", "a bad film"])
    >>> config = TransformerConfig(tokenizer.vocab_size, 16, 1, 2, labels=("bad", "good"))
    >>> [p.was_cut for p in predict(SequenceClassifier(config), tokenizer, ["a film", ""])]
    [False, False]
    """
    config: Any = model.config
    stream = iter(texts)
    while chunk := list(islice(stream, at_once)):
        ids = tokenizer.encode_batch(chunk, config.max_seq_len + 1).ids
        cut = [row[: config.max_seq_len] for row in ids]
        lengths = [len(row) for row in cut]
        found: dict[int, list[float]] = {}
        for rows in bucketed(lengths, max_tokens=max(_BATCH_TOKENS, *lengths)):
            batch = collate([cut[row] for row in rows], pad_id=config.pad_id)
            found.update(zip(rows, _probabilities(model, batch).tolist(), strict=True))
        names = label_names(model, len(found[0]))
        for row in range(len(chunk)):
            shares = dict(zip(names, found[row], strict=True))
            label = max(shares, key=shares.__getitem__)
            was_cut = len(ids[row]) > config.max_seq_len
            yield Prediction(label, shares[label], shares, was_cut)


def label_names(model: nn.Module, n_classes: int) -> tuple[str, ...]:
    """Return the names of a model's classes, or their numbers where it has none."""
    names = getattr(getattr(model, "config", None), "labels", ())
    return tuple(names) or tuple(str(i) for i in range(n_classes))


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's first parameter lies."""
    return next(model.parameters()).device


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and back to what it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _probabilities(model: nn.Module, batch: Batch) -> Tensor:  # (b, c) on the CPU
    with eval_mode(model), torch.inference_mode():
        # The mask stays on the CPU: there the model can read it without making a GPU wait.
        logits = model(batch.input_ids.to(device_of(model)), batch.attention_mask).logits
        return softmax(logits.to(torch.promote_types(logits.dtype, torch.float32))).cpu()
