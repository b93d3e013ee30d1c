"""ModernBERT: rotary positions, layers that see a window, gated feed-forward parts, no biases."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from stabletx.interop.checkpoints import _messages
from stabletx.interop.checkpoints._bert_like import KEYS
from stabletx.interop.checkpoints._conversion import Conversion, Ignored, Piece
from stabletx.interop.checkpoints._names import (
    activation,
    class_names,
    first_set,
    pair,
    prefix_of,
    rotary_base,
    settings,
    size,
)
from stabletx.models import Encoder, MaskedLanguageModel, SequenceClassifier, TransformerConfig
from stabletx.models._storage import StoredModel

_POOLING = {"cls": "first", "mean": "mean"}
_HEAD = Ignored(r"(head|classifier|decoder)\..*", "of a head that is not asked for")


def convert_modernbert(
    config: Mapping[str, Any], names: Collection[str], model: type[StoredModel]
) -> Conversion:
    """Say how a ModernBERT checkpoint becomes ``model``; as :func:`convert_bert`."""
    made = _config(config, model)
    body, ours = prefix_of("model.", names), "" if model is Encoder else "encoder."
    pieces = [*_body(made, ours, body)]
    tied, biases = {}, made.use_bias
    if model is not Encoder:
        pieces += pair("head.hidden.linear", "head.dense", bias=biases)
        pieces += pair("head.hidden.norm", "head.norm", bias=made.norm_bias)
    if model is SequenceClassifier:
        pieces += pair("head.out", "classifier")
    if model is MaskedLanguageModel:
        if made.head_bias:
            pieces.append(Piece("head.bias", ("decoder.bias",)))
        if made.tie_head:
            tied["decoder.weight"] = f"{body}embeddings.tok_embeddings.weight"
        else:
            pieces.append(Piece("head.weight", ("decoder.weight",)))
    return Conversion("modernbert", model, made, tuple(pieces), tied, (_HEAD,), _notes(config))


def _config(config: Mapping[str, Any], model: type[StoredModel]) -> TransformerConfig:
    values = settings(config, KEYS)
    use_bias = config.get("mlp_bias", False)
    for key in ("attention_bias", "classifier_bias"):
        if config.get(key, False) != use_bias:
            _messages.refuse_setting(key, config[key], f"be mlp_bias, {use_bias}")
    window = size("local_attention", config.get("local_attention", 128)) // 2
    every = _global_every(config, values["n_layers"])
    if every is not None:
        values |= {
            "window": window,
            "global_every": every,
            "window_rotary_base": rotary_base(config, "sliding_attention", "local_rope_theta"),
        }
    if model is SequenceClassifier:
        pooling = config.get("classifier_pooling", "cls")
        _messages.check_setting(config, "classifier_pooling", tuple(_POOLING))
        values |= {"pooling": _POOLING[pooling], **class_names(config)}
    if model is not Encoder:
        bent = activation("classifier_activation", config.get("classifier_activation", "gelu"))
        values |= {"head_activation": bent, "head_norm": True}
    if model is MaskedLanguageModel:
        values |= {
            "head_bias": config.get("decoder_bias", True),
            "tie_head": config.get("tie_word_embeddings", True),
        }
    key = "hidden_activation"
    return TransformerConfig(
        **values,
        activation=activation(key, config.get(key, "gelu"), is_gated=True),  # type: ignore[arg-type]
        use_bias=use_bias,
        dropout_p=config.get("mlp_dropout", 0.0),
        attention_dropout_p=config.get("attention_dropout", 0.0),
        norm_position="pre",
        embedding_norm=True,
        norm_eps=config.get("norm_eps", 1e-5),
        norm_bias=config.get("norm_bias", False),
        qk_norm=False,
        position="rotary",
        rotary_base=rotary_base(config, "full_attention", "global_rope_theta"),
        pad_id=first_set(config, "pad_token_id", default=0),
    )


def _global_every(config: Mapping[str, Any], n_layers: int) -> int | None:
    """Read how often a layer sees everything; None where all do."""
    types = config.get("layer_types")
    if types is None:
        every = int(config.get("global_attn_every_n_layers", 3))
        return None if every == 1 else every
    for every in range(1, n_layers + 1):
        expected = ["sliding_attention" if i % every else "full_attention" for i in range(n_layers)]
        if types == expected:
            return None if every == 1 else every
    return _messages.refuse_setting("layer_types", types, "be full at every n-th layer")


def _body(made: TransformerConfig, ours: str, body: str) -> Iterator[Piece]:
    tokens = (f"{body}embeddings.tok_embeddings.weight",)
    yield Piece(f"{ours}stem.embedding.tokens.weight", tokens)
    yield from pair(f"{ours}stem.norm", f"{body}embeddings.norm", bias=made.norm_bias)
    for i in range(made.n_layers):
        at, block = f"{body}layers.{i}.", f"{ours}blocks.{i}."
        if i:
            norm = f"{block}attention_shortcut.norm_in"
            yield from pair(norm, f"{at}attn_norm", bias=made.norm_bias)
        yield from pair(f"{block}attention.qkv", f"{at}attn.Wqkv", bias=made.use_bias)
        yield from pair(f"{block}attention.out", f"{at}attn.Wo", bias=made.use_bias)
        norm = f"{block}feed_forward_shortcut.norm_in"
        yield from pair(norm, f"{at}mlp_norm", bias=made.norm_bias)
        yield from pair(f"{block}feed_forward.widen", f"{at}mlp.Wi", bias=made.use_bias)
        yield from pair(f"{block}feed_forward.out", f"{at}mlp.Wo", bias=made.use_bias)
    yield from pair(f"{ours}norm", f"{body}final_norm", bias=made.norm_bias)


def _notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    mlp = config.get("mlp_dropout", 0.0)
    keys = ("embedding_dropout", "classifier_dropout")
    return tuple(
        f"{key} of {config[key]} is that of the layers here, {mlp}"
        for key in keys
        if config.get(key, mlp) != mlp
    )
