"""How a run goes unless told otherwise: every default of ``fit`` and ``stabletx train``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

from stabletx import _checks
from stabletx._checks import must
from stabletx.models import TransformerConfig
from stabletx.training.schedule import DECAYS, Decay

Precision = Literal["auto", "float32", "bfloat16"]
Monitor = Literal["macro_f1", "loss"]
ClassWeights = Literal["none", "balanced"]
_RUN_TOKENS = 1_000_000  # about half a minute on one core with the default model


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Say how to train; checked when made.

    Args:
        seed: for weights drawn by the caller's program, the order of batches and dropout.
        epochs: times through the train rows at most; None picks 3 to 10, fewer where there are
            more tokens: see ``for_tokens``.
        max_seconds: wall-clock limit for ``fit``, seconds; the learning rate then follows the
            clock where that is ahead of the epochs, and the run is not repeatable to the bit.
        batch_tokens: real tokens a batch at most, never below the longest row; None picks 256 to
            1024, fewer where an epoch would be only few steps.
        lr: highest learning rate.
        weight_decay: of matrices; norms and biases have none. As in ``torch.optim.AdamW``.
        warmup: share of the run in which the learning rate rises, in [0, 1).
        decay: how the learning rate falls afterwards: "cosine", "linear" or "none".
        clip_norm: largest norm of a gradient.
        label_smoothing: probability in [0, 1) spread over all classes.
        class_weights: "balanced" weighs each class by the reverse of its share of the train rows.
        token_dropout: probability in [0, 1) that a token but the first becomes the unknown one.
        monitor: the validation figure by which the best epoch is chosen.
        patience: validations without a better figure after which to stop; None never does.
        precision: "auto" is bfloat16 autocast on a GPU that has it, float32 elsewhere.
        save_seconds: time between two checkpoints in mid-epoch, seconds.

    Raises:
        ValueError: for a number out of its range or an unknown choice.
    """

    seed: int = 0
    epochs: int | None = None
    max_seconds: float | None = None
    batch_tokens: int | None = None
    lr: float = 3e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    decay: Decay = "linear"
    clip_norm: float = 1.0
    label_smoothing: float = 0.0
    class_weights: ClassWeights = "none"
    token_dropout: float = 0.1
    monitor: Monitor = "macro_f1"
    patience: int | None = None
    precision: Precision = "auto"
    save_seconds: float = 30.0

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(must("seed", "be an int of at least 0", repr(self.seed)))
        for name in ("epochs", "batch_tokens", "patience"):
            if getattr(self, name) is not None:
                _checks.check_positive(name, getattr(self, name))
        for name in ("lr", "clip_norm", "save_seconds", "max_seconds"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not 0 < value < math.inf:
                raise ValueError(must(name, "be positive and finite", value))
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(must("weight_decay", "be at least 0 and finite", self.weight_decay))
        for name in ("warmup", "label_smoothing", "token_dropout"):
            _checks.check_probability(name, getattr(self, name))
        _checks.check_one_of("decay", self.decay, DECAYS)
        _checks.check_one_of("class_weights", self.class_weights, ("none", "balanced"))
        _checks.check_one_of("monitor", self.monitor, ("macro_f1", "loss"))
        _checks.check_one_of("precision", self.precision, ("auto", "float32", "bfloat16"))

    def for_tokens(self, n_tokens: int) -> TrainingConfig:
        """Return the same with every choice that hangs on the size of the data made.

        Args:
            n_tokens: of the train rows together.

        >>> TrainingConfig().for_tokens(50_000).epochs
        10
        >>> TrainingConfig(epochs=4).for_tokens(50_000).epochs
        4
        """
        epochs = min(max(round(_RUN_TOKENS / max(n_tokens, 1)), 3), 10)
        batch_tokens = min(max(n_tokens // 40, 256), 1024)
        return dataclasses.replace(
            self,
            epochs=self.epochs or epochs,
            batch_tokens=self.batch_tokens or batch_tokens,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return every field as what JSON can hold."""
        return dataclasses.asdict(self)


def default_model(
    vocab_size: int,
    labels: Sequence[str],
    *,
    max_seq_len: int = 256,
    pad_id: int = 0,
    d_model: int = 128,
    dropout_p: float = 0.5,
) -> TransformerConfig:
    """Describe the classifier that ``stabletx train`` trains from nothing.

    >>> default_model(8000, ["ham", "spam"]).n_classes
    2
    """
    return TransformerConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        d_ff=d_model,
        n_layers=1,
        n_heads=4,
        max_seq_len=max_seq_len,
        dropout_p=dropout_p,
        qk_norm=False,
        position="learned",
        labels=tuple(labels),
        pad_id=pad_id,
    )
