"""What a model must be held against: the most frequent class, and words counted and weighed."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch

from stabletx._checks import must
from stabletx.data import Example
from stabletx.training.metrics import Metrics, classification_metrics

MAX_ROWS = 50_000
MAX_FEATURES = 50_000
_MAX_ITERATIONS = 300


class Baseline(NamedTuple):
    """A rival's figures on the test rows."""

    name: str
    metrics: Metrics
    seconds: float
    n_train: int  # train rows it saw; fewer than all where there are more than MAX_ROWS


def majority_baseline(test: Sequence[int], train: Sequence[int], labels: Sequence[str]) -> Baseline:
    """Answer every row with the most frequent class of the train rows.

    >>> majority_baseline([0, 1], [1, 1, 0], ["no", "yes"]).metrics.accuracy
    0.5
    """
    counts = torch.bincount(torch.tensor(list(train)), minlength=len(labels))
    probabilities = torch.zeros(len(test), len(labels))
    probabilities[:, int(counts.argmax())] = 1.0
    metrics = classification_metrics(probabilities, torch.tensor(list(test)), labels)
    return Baseline("majority class", metrics, 0.0, len(train))


def tfidf_baseline(
    train: Iterable[Example], test: Iterable[Example], labels: Sequence[str]
) -> Baseline:
    """Weigh words and pairs of words by TF-IDF, and fit a logistic regression to them.

    Args:
        train: read once, up to 50,000 rows; texts are not kept.
        test: read once.
        labels: the class names.

    Returns:
        The figures on the test rows, empty texts left out as in training.

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    _need_sklearn()
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    started = time.perf_counter()
    words: Any = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), max_features=MAX_FEATURES)
    places = {label: place for place, label in enumerate(labels)}
    train_truth: list[int] = []
    features = words.fit_transform(_texts(islice(_full(train), MAX_ROWS), train_truth, places))
    model: Any = LogisticRegression(C=10.0, max_iter=_MAX_ITERATIONS)
    model.fit(features, train_truth)
    truth: list[int] = []
    found = torch.from_numpy(
        model.predict_proba(words.transform(_texts(_full(test), truth, places)))
    )
    probabilities = torch.zeros(len(truth), len(labels), dtype=found.dtype)
    probabilities[:, torch.from_numpy(model.classes_).long()] = found
    metrics = classification_metrics(probabilities, torch.tensor(truth), labels)
    seconds = time.perf_counter() - started
    return Baseline("TF-IDF + logistic regression", metrics, seconds, len(train_truth))


def _need_sklearn() -> None:
    try:
        importlib.import_module("sklearn")
    except ImportError as error:
        instead = 'Install it with: pip install "stabletx[train]".'
        got = f"no such package ({error})"
        raise ImportError(must("scikit-learn", "be installed", got, instead)) from error


def _full(examples: Iterable[Example]) -> Iterator[Example]:
    return (example for example in examples if example.text.strip())


def _texts(examples: Iterable[Example], truth: list[int], places: dict[str, int]) -> Iterator[str]:
    """Yield texts, and note their classes on the way."""
    for text, label in examples:
        truth.append(places[label])
        yield text
