"""BERT and those built like it: norms after each branch, learned positions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from stabletx.interop.checkpoints import _messages
from stabletx.interop.checkpoints._conversion import (
    Change,
    Conversion,
    Ignored,
    Piece,
    without_rows,
)
from stabletx.interop.checkpoints._names import (
    activation,
    class_names,
    first_set,
    head_sizes,
    joined,
    pair,
    prefix_of,
    settings,
    size,
)
from stabletx.models import Encoder, MaskedLanguageModel, SequenceClassifier, TransformerConfig
from stabletx.models._storage import StoredModel

KEYS = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
}
DISTILBERT_KEYS = {
    "vocab_size": "vocab_size",
    "d_model": "dim",
    "n_layers": "n_layers",
    "n_heads": "n_heads",
    "d_ff": "hidden_dim",
    "max_seq_len": "max_position_embeddings",
}


@dataclass(frozen=True)
class _Layer:
    """What a family calls the parts of a layer; ``at`` is where layer ``i`` lies."""

    at: str
    qkv: tuple[str, str, str]
    out: str
    attention_norm: str
    widen: str = "intermediate.dense"
    narrow: str = "output.dense"
    last_norm: str = "output.LayerNorm"


_SELF = ("attention.self.query", "attention.self.key", "attention.self.value")
_BERT_LAYER = _Layer(
    "encoder.layer.{}", _SELF, "attention.output.dense", "attention.output.LayerNorm"
)
_MPNET_LAYER = _Layer(
    "encoder.layer.{}",
    ("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    "attention.attn.o",
    "attention.LayerNorm",
)
_ALBERT_LAYER = _Layer(
    "encoder.albert_layer_groups.{}.albert_layers.0",
    ("attention.query", "attention.key", "attention.value"),
    "attention.dense",
    "attention.LayerNorm",
    "ffn",
    "ffn_output",
    "full_layer_layer_norm",
)
_DISTILBERT_LAYER = _Layer(
    "transformer.layer.{}",
    ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    "attention.out_lin",
    "sa_layer_norm",
    "ffn.lin1",
    "ffn.lin2",
    "output_layer_norm",
)
_BUFFERS = (
    Ignored(r"(.*\.)?embeddings\.position_ids", "a buffer: positions are counted"),
    Ignored(r"(.*\.)?embeddings\.token_type_ids", "a buffer: type 0 is the default"),
)


@dataclass(frozen=True)
class _Family:
    """How a family names what stands around its layers."""

    name: str
    layer: _Layer
    pooler: str | None = None  # the linear map that follows the first token
    classifier_hidden: str = "pooler.dense"
    classifier_out: str = "classifier"
    classifier_activation: str = "tanh"
    lm_hidden: str = "lm_head.dense"
    lm_norm: str = "lm_head.layer_norm"
    lm_bias: str = "lm_head.bias"
    lm_table: str = "lm_head.decoder"
    lm_activation: str | None = "gelu"  # None: that of the layers
    widen: str | None = None  # the linear map from the embeddings' width
    relative: str | None = None
    heads: tuple[str, ...] = ()  # patterns of the names of every head

    @property
    def prefix(self) -> str:
        return f"{self.name}."


_BERT = _Family(
    "bert", _BERT_LAYER, "pooler.dense", "{body}pooler.dense", "classifier", "tanh",
    "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm",
    "cls.predictions.bias", "cls.predictions.decoder", None,
    heads=(r"cls\..*", r"classifier\..*"),
)  # fmt: skip
_ROBERTA = _Family(
    "roberta", _BERT_LAYER, "pooler.dense", "classifier.dense", "classifier.out_proj",
    heads=(r"lm_head\..*", r"classifier\..*"),
)  # fmt: skip
_ELECTRA = _Family(
    "electra", _BERT_LAYER, None, "classifier.dense", "classifier.out_proj", "gelu",
    "generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias",
    "generator_lm_head", widen="embeddings_project",
    heads=(r"generator_.*", r"discriminator_predictions\..*", r"classifier\..*"),
)  # fmt: skip
_MPNET = _Family(
    "mpnet", _MPNET_LAYER, "pooler.dense", "classifier.dense", "classifier.out_proj",
    relative="encoder.relative_attention_bias", heads=(r"lm_head\..*", r"classifier\..*"),
)  # fmt: skip
_ALBERT = _Family(
    "albert", _ALBERT_LAYER, "pooler", "{body}pooler", "classifier", "tanh",
    "predictions.dense", "predictions.LayerNorm", "predictions.bias", "predictions.decoder", None,
    widen="encoder.embedding_hidden_mapping_in",
    heads=(r"predictions\..*", r"sop_classifier\..*", r"classifier\..*"),
)  # fmt: skip
_DISTILBERT = _Family(
    "distilbert", _DISTILBERT_LAYER, None, "pre_classifier", "classifier", "relu",
    "vocab_transform", "vocab_layer_norm", "vocab_projector.bias", "vocab_projector", None,
    heads=(r"vocab_.*", r"(pre_)?classifier\..*"),
)  # fmt: skip


def convert_bert(
    config: Mapping[str, Any], names: Collection[str], model: type[StoredModel]
) -> Conversion:
    """Say how a BERT checkpoint becomes ``model``.

    Args:
        config: what ``config.json`` holds.
        names: of the tensors in the file.
        model: Encoder, SequenceClassifier or MaskedLanguageModel.

    Raises:
        ValueError: for a setting that our models cannot express.
    """
    return _convert(_BERT, config, names, model)


def convert_roberta(
    config: Mapping[str, Any], names: Collection[str], model: type[StoredModel]
) -> Conversion:
    """Say how a RoBERTa checkpoint becomes ``model``; as :func:`convert_bert`.

    Positions are counted from 0 here: the rows of the table before the first position are left
    out.
    """
    return _convert(_ROBERTA, config, names, model)


def convert_electra(
    config: Mapping[str, Any], names: Collection[str], model: type[StoredModel]
) -> Conversion:
    """Say how an ELECTRA checkpoint becomes ``model``; as :func:`convert_bert`."""
    return _convert(_ELECTRA, config, names, model)


def convert_albert(
    config: Mapping[str, Any], names: Collection[str], model: type[StoredModel]
) -> Conversion:
    """Say how an ALBERT checkpoint becomes ``model``; as :func:`convert_bert`."""
    _messages.check_setting(config, "inner_group_num", (1,))
    return _convert(_ALBERT, config, names, model)


def convert_mpnet(
    config: Mapping[str, Any], names: Collection[str], model: type[StoredModel]
) -> Conversion:
    """Say how an MPNet checkpoint becomes ``model``; as :func:`convert_roberta`."""
    return _convert(_MPNET, config, names, model)


def convert_distilbert(
    config: Mapping[str, Any], names: Collection[str], model: type[StoredModel]
) -> Conversion:
    """Say how a DistilBERT checkpoint becomes ``model``; as :func:`convert_bert`."""
    theirs = {**config, "layer_norm_eps": 1e-12, "type_vocab_size": 0}
    renamed = ("hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob")
    for new, old in zip(renamed, ("activation", "dropout", "attention_dropout"), strict=True):
        if old in config:
            theirs[new] = config[old]
    for ours, theirs_name in DISTILBERT_KEYS.items():
        theirs[KEYS[ours]] = _messages.needed(config, theirs_name)
    return _convert(_DISTILBERT, theirs, names, model)


def _convert(
    family: _Family, config: Mapping[str, Any], names: Collection[str], model: type[StoredModel]
) -> Conversion:
    _messages.check_setting(config, "position_embedding_type", ("absolute",))
    _messages.check_setting(config, "is_decoder", (False,))
    body = prefix_of(family.prefix, names)
    made = _config(family, config, names, model, body)
    ours = "" if model is Encoder else "encoder."
    pieces = [*_stem(family, made, ours, body, config), *_layers(family.layer, made, ours, body)]
    is_tied = bool(config.get("tie_word_embeddings", True))
    tied, heads = {}, tuple(Ignored(p, "of a head that is not asked for") for p in family.heads)
    if model is SequenceClassifier:
        hidden = family.classifier_hidden.format(body=body)
        pieces += [*pair("head.hidden.linear", hidden), *pair("head.out", family.classifier_out)]
    if model is MaskedLanguageModel:
        table = f"{family.lm_table}.weight"
        pieces += [*pair("head.hidden.linear", family.lm_hidden)]
        pieces += [*pair("head.hidden.norm", family.lm_norm)]
        pieces.append(Piece("head.bias", (family.lm_bias,)))
        tied = {f"{family.lm_table}.bias": family.lm_bias}
        if family.lm_bias in tied:
            del tied[family.lm_bias]
        if is_tied:
            tied[table] = f"{body}embeddings.word_embeddings.weight"
        else:
            pieces.append(Piece("head.weight", (table,)))
            made = replace(made, tie_head=False)
    if made.has_pooler and family.pooler is not None:
        pieces += pair("pooler.hidden.linear", body + family.pooler)
    elif family.pooler is not None:
        pooler = body.replace(".", r"\.") + family.pooler.replace(".", r"\.") + r"\..*"
        heads += (Ignored(pooler, "a pooler that is not asked for"),)
    return Conversion(
        family.name, model, made, tuple(pieces), tied, (*_BUFFERS, *heads), _notes(config)
    )


def _config(
    family: _Family, config: Mapping[str, Any], names: Collection[str],
    model: type[StoredModel], body: str,
) -> TransformerConfig:  # fmt: skip
    values = settings(config, KEYS)
    bent = activation("hidden_act", config.get("hidden_act", "gelu"))
    pad_id = first_set(config, "pad_token_id", default=1 if family in (_ROBERTA, _MPNET) else 0)
    if family in (_ROBERTA, _MPNET):
        values["max_seq_len"] -= _skipped(family, config)
    width = config.get("embedding_size", 128) if family in (_ALBERT, _ELECTRA) else None
    if family is _ELECTRA and width == values["d_model"]:
        width = None
    if family is _ALBERT:
        values["n_distinct_layers"] = config.get("num_hidden_groups", 1)
    if family is _MPNET:
        key = "relative_attention_num_buckets"
        values["relative_buckets"] = size(key, config.get(key, 32))
    n_types = 0 if family is _MPNET else config.get("type_vocab_size", 2)
    if model is SequenceClassifier:
        values |= class_names(config)
        values |= {"pooling": "first", "head_activation": family.classifier_activation}
    if model is MaskedLanguageModel:
        bent_head = bent if family.lm_activation is None else family.lm_activation
        values |= {"head_activation": bent_head, "head_norm": True, "head_bias": True}
    if model is Encoder and family.pooler is not None:
        values["has_pooler"] = f"{body}{family.pooler}.weight" in names
    return TransformerConfig(
        **values,
        activation=bent,  # type: ignore[arg-type]
        dropout_p=config.get("hidden_dropout_prob", 0.1),
        attention_dropout_p=config.get("attention_probs_dropout_prob", 0.1),
        norm_position="post",
        norm_eps=config.get("layer_norm_eps", 1e-12),
        qk_norm=False,
        position="learned",
        n_token_types=n_types,
        d_embedding=width,
        pad_id=pad_id,
    )


def _skipped(family: _Family, config: Mapping[str, Any]) -> int:
    """Count the rows of the position table that no real token reads."""
    if family is _ROBERTA:
        return size("pad_token_id", config.get("pad_token_id", 1), least=0) + 1
    return 2 if family is _MPNET else 0


def _stem(
    family: _Family, made: TransformerConfig, ours: str, body: str, config: Mapping[str, Any]
) -> Iterator[Piece]:
    table, at = f"{ours}stem.embedding", f"{body}embeddings"
    skipped = _skipped(family, config)
    change: Change | None = without_rows(skipped) if skipped else None
    yield Piece(f"{table}.tokens.weight", (f"{at}.word_embeddings.weight",))
    yield Piece(f"{table}.positions.weight", (f"{at}.position_embeddings.weight",), change=change)
    if made.n_token_types:
        yield Piece(f"{table}.types.weight", (f"{at}.token_type_embeddings.weight",))
    yield from pair(f"{ours}stem.norm", f"{at}.LayerNorm")
    if made.d_embedding is not None:
        yield from pair(f"{ours}stem.widen", f"{body}{family.widen}")
    if family.relative is not None:
        yield from pair(f"{ours}places.relative.table", body + family.relative, bias=False)


def _layers(layer: _Layer, made: TransformerConfig, ours: str, body: str) -> Iterator[Piece]:
    for i in range(made.n_distinct_layers or made.n_layers):
        at, block = f"{body}{layer.at.format(i)}.", f"{ours}blocks.{i}."
        qkv = [at + name for name in layer.qkv]
        yield from joined(f"{block}attention.qkv", qkv, head_sizes(made), bias=True)
        yield from pair(f"{block}attention.out", at + layer.out)
        yield from pair(f"{block}attention_shortcut.norm_out", at + layer.attention_norm)
        yield from pair(f"{block}feed_forward.widen", at + layer.widen)
        yield from pair(f"{block}feed_forward.out", at + layer.narrow)
        yield from pair(f"{block}feed_forward_shortcut.norm_out", at + layer.last_norm)


def _notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    notes = []
    dropout = first_set(
        config, "classifier_dropout", "classifier_dropout_prob", "seq_classif_dropout"
    )
    if dropout is not None and dropout != config.get("hidden_dropout_prob", 0.1):
        notes.append(f"the head's dropout of {dropout} is that of the layers here")
    if config.get("problem_type") not in (None, "single_label_classification"):
        notes.append(f"problem_type {config['problem_type']}: the loss here is the cross-entropy")
    return tuple(notes)
