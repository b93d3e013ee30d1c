"""What a model is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, FrozenInstanceError, asdict, dataclass, fields
from typing import Any, Literal, final, get_args

from stabletx import _checks
from stabletx.layers import _layer_checks
from stabletx.layers.blocks import NormPosition
from stabletx.layers.feed_forward import Activation
from stabletx.layers.heads import HeadActivation, Pooling
from stabletx.layers.normalization import NormKind, NormSettings
from stabletx.models import _model_checks

Position = Literal["rotary", "learned", "sinusoidal", "none"]


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
    recompute_feed_forward: bool = False
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
    d_head: int | None = None
    attention_scale: float | None = None
    norm_eps: float | None = None
    norm_bias: bool = True
    d_embedding: int | None = None
    embedding_norm: bool | None = None
    embedding_scale: float = 1.0
    n_token_types: int = 0
    relative_buckets: int = 0
    relative_max_distance: int = 128
    window: int | None = None
    global_every: int | None = None
    window_rotary_base: float | None = None
    n_distinct_layers: int | None = None
    n_decoder_layers: int | None = None
    share_embeddings: bool = False
    has_pooler: bool = False
    head_activation: HeadActivation | None = None
    head_norm: bool = False
    head_bias: bool = False
    tie_head: bool = True
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "max_seq_len"):
            _checks.check_positive(name, getattr(self, name))
        for name in _POSITIVE_OR_NONE:
            if getattr(self, name) is not None:
                _checks.check_positive(name, getattr(self, name))
        for name in ("n_token_types", "relative_buckets"):
            _checks.check_width(name, getattr(self, name))
        if self.d_head is None:
            _checks.check_divides("n_heads", self.n_heads, "d_model", self.d_model)
        if self.n_kv_heads is not None:
            _checks.check_divides("n_kv_heads", self.n_kv_heads, "n_heads", self.n_heads)
        if self.n_distinct_layers is not None:
            distinct = self.n_distinct_layers
            _checks.check_divides("n_distinct_layers", distinct, "n_layers", self.n_layers)
        for name in ("dropout_p", "attention_dropout_p"):
            _checks.check_probability(name, getattr(self, name))
        for name in _FLAGS:
            _model_checks.check_flag(name, getattr(self, name))
        if self.embedding_norm is not None:
            _model_checks.check_flag("embedding_norm", self.embedding_norm)
        for name in _NUMBERS:
            if getattr(self, name) is not None:
                _model_checks.check_above_zero(name, getattr(self, name))
        for name, choices in _CHOICES.items():
            _checks.check_one_of(name, getattr(self, name), choices)
        if self.head_activation is not None:
            choices = get_args(HeadActivation)
            _checks.check_one_of("head_activation", self.head_activation, choices)
        if self.position == "rotary":
            _layer_checks.check_even("d_model / n_heads", self.head_dim)
        _model_checks.check_has_window(self.window, self.global_every, self.window_rotary_base)
        for name in ("pad_id", "bos_id", "eos_id"):
            _model_checks.check_token_id(name, getattr(self, name), self.vocab_size)
        labels = _model_checks.checked_labels(self.labels, self.n_classes)
        object.__setattr__(self, "labels", labels)
        if labels:
            object.__setattr__(self, "n_classes", len(labels))

    @property
    def head_dim(self) -> int:
        """Give the size of a head."""
        return self.d_model // self.n_heads if self.d_head is None else self.d_head

    @property
    def n_layers_of_decoder(self) -> int:
        """Give the number of a decoder's layers."""
        return self.n_layers if self.n_decoder_layers is None else self.n_decoder_layers

    @property
    def norm_settings(self) -> NormSettings:
        """Give the norm that every part of the model uses."""
        return NormSettings(self.norm, self.norm_eps, self.norm_bias)

    @property
    def has_embedding_norm(self) -> bool:
        """Say whether embeddings are normed."""
        return self.norm_position != "pre" if self.embedding_norm is None else self.embedding_norm

    def is_windowed(self, layer: int) -> bool:
        """Say whether a layer sees only its window."""
        return self.window is not None and (
            self.global_every is None or layer % self.global_every != 0
        )


@final
class TransformerConfig(_Fields):
    """Describe a model; checked when made, written to and read from ``config.json``.

    Args:
        vocab_size: token ids are below it.
        d_model: size of a token; a multiple of ``n_heads`` unless ``d_head`` is given.
        n_layers: blocks; in an encoder-decoder, of each of the two.
        n_heads: query heads.
        n_kv_heads: key/value heads, a divisor of ``n_heads``; None takes ``n_heads``.
        d_ff: size within the feed-forward part; None: see :class:`stabletx.FeedForward`.
        max_seq_len: tokens; learned positions end there, others go on.
        dropout_p: probability for embeddings, branches and the pooled vector, while training.
        attention_dropout_p: probability for attention weights; slower beyond 256 tokens.
        recompute_feed_forward: while training, work out the wide activations again in the backward
            pass instead of keeping them: less memory, about a tenth more time.
        norm_position: "pre" (with a last norm), "post" (embeddings normed instead) or "peri"
            (both).
        norm: "layer" or "rms".
        qk_norm: normalize queries and keys per head.
        activation: "gelu", "gelu_tanh", "relu", "silu"; with a gate "swiglu", "geglu",
            "geglu_tanh".
        use_bias: whether linear maps within blocks have one.
        position: "rotary", "learned", "sinusoidal" or "none". A position counts the real tokens
            before it.
        rotary_base: the longest rotary wavelength is ``2 pi`` times this, tokens.
        pooling: how a classifier pools: "mean", "first" or "attention".
        labels: names of a classifier's classes.
        n_classes: of a classifier; None takes the number of labels.
        pad_id: fills what is not a token.
        bos_id: begins what an encoder-decoder writes.
        eos_id: ends what a decoder writes.
        d_head: size of a head; None takes ``d_model / n_heads``.
        attention_scale: factor on the products of queries and keys; None takes ``d_head ** -0.5``.
        norm_eps: added within every norm; None takes 1e-5 for "layer" and 1e-6 for "rms".
        norm_bias: whether a "layer" norm has an offset.
        d_embedding: size of an embedding, which a linear map brings to ``d_model``; None: no map.
        embedding_norm: norm the embeddings; None does unless ``norm_position`` is "pre". With
            "pre" the first attention then has no norm of its own.
        embedding_scale: factor on the tokens' vectors.
        n_token_types: types of token with a vector each (``token_type_ids``); 0: none.
        relative_buckets: values of a bias for the distance of two tokens; 0: no such bias.
        relative_max_distance: tokens; from here on all distances share a bucket.
        window: tokens to either side that a layer sees; None: all.
        global_every: every layer of so many, beginning with the first, sees all; None: none does.
        window_rotary_base: as ``rotary_base``, for layers with a window; None: the same.
        n_distinct_layers: blocks with weights of their own, a divisor of ``n_layers``: each
            serves as many layers in a row. None: every layer has its own.
        n_decoder_layers: blocks of an encoder-decoder's decoder; None takes ``n_layers``.
        share_embeddings: let an encoder-decoder embed source and target alike.
        has_pooler: let an :class:`Encoder` also make one vector of each sequence.
        head_activation: of a hidden layer before the scores: "tanh", "relu", "gelu", "gelu_tanh"
            or "silu"; None: there is none.
        head_norm: norm that layer's result.
        head_bias: add a learned offset to the scores of the vocabulary.
        tie_head: score the vocabulary with the embeddings themselves.
        logit_scale: factor on the scores of the vocabulary, before the offset.

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

    def to_json_string(self) -> str:
        """Give every field as a JSON text, under the name by which Hugging Face's loggers ask."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

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
    "activation": get_args(Activation),
    "position": get_args(Position),
    "pooling": ("mean", "first", "attention"),
}
_POSITIVE_OR_NONE = (
    "n_kv_heads", "d_ff", "n_classes", "d_head", "d_embedding", "window", "global_every",
    "n_distinct_layers", "n_decoder_layers", "relative_max_distance",
)  # fmt: skip
_FLAGS = (
    "qk_norm", "use_bias", "norm_bias", "share_embeddings", "has_pooler", "head_norm", "head_bias",
    "tie_head", "recompute_feed_forward",
)  # fmt: skip
_NUMBERS = (
    "rotary_base", "window_rotary_base", "attention_scale", "norm_eps", "embedding_scale",
    "logit_scale",
)  # fmt: skip
