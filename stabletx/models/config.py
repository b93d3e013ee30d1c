"""What a model is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, FrozenInstanceError, asdict, dataclass, fields
from typing import Any, Literal, final

from stabletx import _checks
from stabletx.layers import _layer_checks
from stabletx.layers.blocks import NormPosition
from stabletx.layers.feed_forward import Activation
from stabletx.layers.heads import Pooling
from stabletx.layers.normalization import NormKind
from stabletx.models import _model_checks

Position = Literal["rotary", "learned", "none"]


@dataclass(frozen=True)
class _Fields:
    """Hold the fields of :class:`TransformerConfig`, checked, and let none of them change."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int | None = None
    d_ff: int | None = None
    max_seq_len: int = 512
    dropout_p: float = 0.0
    attention_dropout_p: float = 0.0
    norm_position: NormPosition = "pre"
    norm: NormKind = "layer"
    qk_norm: bool = True
    activation: Activation = "gelu"
    use_bias: bool = True
    position: Position = "rotary"
    rotary_base: float = 10000.0
    pooling: Pooling = "mean"
    labels: tuple[str, ...] = ()
    n_classes: int | None = None
    pad_id: int = 0
    bos_id: int | None = None
    eos_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "max_seq_len"):
            _checks.check_positive(name, getattr(self, name))
        for name in ("n_kv_heads", "d_ff", "n_classes"):
            if getattr(self, name) is not None:
                _checks.check_positive(name, getattr(self, name))
        _checks.check_divides("n_heads", self.n_heads, "d_model", self.d_model)
        if self.n_kv_heads is not None:
            _checks.check_divides("n_kv_heads", self.n_kv_heads, "n_heads", self.n_heads)
        for name in ("dropout_p", "attention_dropout_p"):
            _checks.check_probability(name, getattr(self, name))
        for name in ("qk_norm", "use_bias"):
            _model_checks.check_flag(name, getattr(self, name))
        _model_checks.check_above_zero("rotary_base", self.rotary_base)
        for name, choices in _CHOICES.items():
            _checks.check_one_of(name, getattr(self, name), choices)
        if self.position == "rotary":
            _layer_checks.check_even("d_model / n_heads", self.d_model // self.n_heads)
        for name in ("pad_id", "bos_id", "eos_id"):
            _model_checks.check_token_id(name, getattr(self, name), self.vocab_size)
        labels = _model_checks.checked_labels(self.labels, self.n_classes)
        object.__setattr__(self, "labels", labels)
        if labels:
            object.__setattr__(self, "n_classes", len(labels))


@final
class TransformerConfig(_Fields):
    """Describe a model; checked when made, written to and read from ``config.json``.

    Args:
        vocab_size: token ids are below it.
        d_model: size of a token; a multiple of ``n_heads``.
        n_layers: blocks; in an encoder-decoder, of each of the two.
        n_heads: query heads.
        n_kv_heads: key/value heads, a divisor of ``n_heads``; None takes ``n_heads``.
        d_ff: size within the feed-forward part; None: see :class:`stabletx.FeedForward`.
        max_seq_len: tokens; learned positions end there, others go on.
        dropout_p: probability for embeddings, branches and the pooled vector, while training.
        attention_dropout_p: probability for attention weights; leaves the fused kernel.
        norm_position: "pre" (with a last norm), "post" (embeddings normed instead) or "peri"
            (both).
        norm: "layer" or "rms".
        qk_norm: normalize queries and keys per head.
        activation: "gelu" or "swiglu".
        use_bias: whether linear maps within blocks have one.
        position: "rotary", "learned" or "none". A position counts the real tokens before it.
        rotary_base: the longest rotary wavelength is ``2 pi`` times this, tokens.
        pooling: how a classifier pools: "mean", "first" or "attention".
        labels: names of a classifier's classes.
        n_classes: of a classifier; None takes the number of labels.
        pad_id: fills what is not a token.
        bos_id: begins what an encoder-decoder writes.
        eos_id: ends what a decoder writes.

    Raises:
        TypeError: for a value of a wrong kind.
        ValueError: for a number out of range, heads that do not divide, an unknown choice.

    >>> TransformerConfig(100, 32, 2, 4, labels=("no", "yes")).n_classes
    2
    """

    def __setattr__(self, name: str, value: object) -> None:
        # Hugging Face's Trainer leaves this one note on the configuration of any model.
        if name != "use_cache":
            raise FrozenInstanceError(f"cannot assign to field {name!r}")
        object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Give every field as what JSON can hold."""
        return {**asdict(self), "labels": list(self.labels)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TransformerConfig:
        """Read what :meth:`to_dict` gave.

        Raises:
            ValueError: naming keys that are unknown or missing.
        """
        known = {field.name for field in fields(TransformerConfig)}
        needed = {field.name for field in fields(TransformerConfig) if field.default is MISSING}
        _model_checks.check_keys("config", set(values), known, needed)
        return TransformerConfig(**values)


_CHOICES = {
    "norm_position": ("pre", "post", "peri"),
    "norm": ("layer", "rms"),
    "activation": ("gelu", "swiglu"),
    "position": ("rotary", "learned", "none"),
    "pooling": ("mean", "first", "attention"),
}
