"""A text classifier with the manners of scikit-learn: fit and predict on lists of strings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

try:
    import numpy as np
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted
except ImportError as error:
    raise ImportError(
        f"scikit-learn must be installed, got: {error}. "
        'Install it with: pip install "stabletx[train]".'
    ) from error

from stabletx._checks import check_positive, must
from stabletx.data import EncodedSet, Example, Tokenizer, assign
from stabletx.data.splits import arrange
from stabletx.models import SequenceClassifier
from stabletx.training import TrainingConfig, default_model, fit, predict
from stabletx.training.run import pick_device


class TextClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Train the classifier of ``stabletx train`` on lists of strings.

    Works in ``cross_val_score``, ``GridSearchCV`` and as the last step of a ``Pipeline``. A fitted
    one can be pickled, so ``joblib.dump`` keeps it; a pickle can run any code when read, so where
    others may have touched the file, keep ``model_.save_pretrained(folder)`` and
    ``tokenizer_.save(folder)`` instead, which ``stabletx predict`` reads too.

    Args:
        max_len: tokens read of a text.
        vocab_size: tokens of the tokenizer at most.
        validation: share of the rows, in (0, 1), by which the best epoch is chosen.
        epochs: times through the rows at most; None picks 3 to 10 by their number.
        max_seconds: wall-clock limit, seconds; None for none.
        lr: highest learning rate.
        dropout_p: probability in [0, 1) for embeddings, branches and the pooled vector.
        class_weights: "balanced" lets rare classes count more; "none" does not.
        device: "auto", "cpu", "cuda" or "cuda:N".
        random_state: a seed; the same gives the same model on one machine.

    Attributes:
        classes_: (c,) the classes, sorted.
        model_: the :class:`stabletx.SequenceClassifier`.
        tokenizer_: trained on the same texts.
        history_: events of the run, as ``stabletx.training.fit`` reports them.

    Numerics: probabilities are float32 and sum to 1.

    >>> texts = [f"{word} film {i}" for i in range(20) for word in ("good", "bad")]
    >>> own = TextClassifier(epochs=2, max_len=8).fit(texts, ["pos", "neg"] * 20)
    >>> own.predict_proba(["a good film", ""]).shape
    (2, 2)
    """

    # More than eight arguments: scikit-learn searches over what the constructor names.
    def __init__(
        self,
        *,
        max_len: int = 256,
        vocab_size: int = 8000,
        validation: float = 0.1,
        epochs: int | None = None,
        max_seconds: float | None = None,
        lr: float = 3e-3,
        dropout_p: float = 0.5,
        class_weights: str = "none",
        device: str = "auto",
        random_state: int = 0,
    ) -> None:
        self.max_len = max_len
        self.vocab_size = vocab_size
        self.validation = validation
        self.epochs = epochs
        self.max_seconds = max_seconds
        self.lr = lr
        self.dropout_p = dropout_p
        self.class_weights = class_weights
        self.device = device
        self.random_state = random_state

    def fit(self, texts: Sequence[str], y: Sequence[Any]) -> TextClassifier:
        """Train on texts and their classes.

        Args:
            texts: any sequence of strings, such as a list, an array or a column of a table. Rows
                without a visible character are left out, and copies of a text are trained on once.
            y: (n,) the classes: strings, integers or booleans.

        Raises:
            TypeError: if an entry is not a string.
            ValueError: if there are not as many texts as classes, fewer than two classes, or a
                parameter is out of its range.
            TrainingError: if the numbers of the run are no longer finite.
        """
        # Searches draw from numpy, whose numbers are not Python's.
        own = {
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in self.get_params().items()
        }
        check_positive("max_len", own["max_len"])
        config = TrainingConfig(
            seed=own["random_state"],
            epochs=own["epochs"],
            max_seconds=own["max_seconds"],
            lr=own["lr"],
            class_weights=own["class_weights"],
        )
        rows = _texts(texts)
        truth = np.asarray(y)
        if truth.shape != (len(rows),):
            rule = f"have one class for each of the {len(rows)} texts"
            raise ValueError(must("y", rule, f"shape {truth.shape}"))
        check_classification_targets(truth)
        classes, codes = np.unique(truth, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(must("y", "hold at least two classes", f"{len(classes)} class"))
        names = [str(label) for label in classes]
        examples = [Example(text, names[code]) for text, code in zip(rows, codes, strict=True)]
        train, held = _divided(examples, own["validation"], own["random_state"])
        tokenizer = Tokenizer.train([example.text for example in train], own["vocab_size"])
        description = default_model(
            tokenizer.vocab_size,
            names,
            max_seq_len=own["max_len"],
            pad_id=tokenizer.pad_id,
            dropout_p=own["dropout_p"],
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(own["random_state"])
            model = SequenceClassifier(description).to(pick_device(own["device"]))
        encoded = (EncodedSet.encode(x, tokenizer, names, own["max_len"]) for x in (train, held))
        self.history_ = fit(model, *encoded, config=config).history
        self.classes_, self.tokenizer_, self.model_ = classes, tokenizer, model
        return self

    def predict_proba(self, texts: Sequence[str]) -> np.ndarray:  # (n, c) float32
        """Give the probability of each class, in the order of ``classes_``.

        Raises:
            NotFittedError: before ``fit``.
            TypeError: if an entry is not a string.
        """
        check_is_fitted(self)
        found = predict(self.model_, self.tokenizer_, _texts(texts))
        shares = [list(own.probabilities.values()) for own in found]
        return np.asarray(shares, dtype=np.float32).reshape(-1, len(self.classes_))

    def predict(self, texts: Sequence[str]) -> np.ndarray:  # (n,) of the classes' own dtype
        """Give the most probable class of each text.

        Raises:
            NotFittedError: before ``fit``.
            TypeError: if an entry is not a string.
        """
        check_is_fitted(self)
        found: np.ndarray = self.classes_[self.predict_proba(texts).argmax(1)]
        return found

    def __sklearn_tags__(self) -> Any:
        """Say that rows are strings, not numbers."""
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        return tags


def _texts(texts: Any) -> list[str]:
    rule = "be a sequence of strings"
    if isinstance(texts, str):
        raise TypeError(must("texts", rule, "one string", "Pass [text]."))
    if not isinstance(texts, Iterable) or isinstance(texts, Mapping):
        raise TypeError(must("texts", rule, f"a {type(texts).__name__}"))
    n_axes = getattr(texts, "ndim", 1)
    if n_axes != 1:  # a table would be read as the names of its columns
        raise TypeError(must("texts", rule, f"a {type(texts).__name__} of {n_axes} axes"))
    rows = list(texts)
    for i, text in enumerate(rows):
        if not isinstance(text, str):
            raise TypeError(must(f"texts[{i}]", "be a string", type(text).__name__))
    return rows


def _divided(
    examples: Sequence[Example], validation: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Put a share of the rows of each class aside, as ``stabletx train`` does."""
    if isinstance(validation, bool) or not isinstance(validation, float) or not 0 < validation < 1:
        raise ValueError(must("validation", "be a share in (0, 1)", repr(validation)))
    train, held, _ = arrange(examples, assign(examples, validation=validation, test=0, seed=seed))
    return train, held
