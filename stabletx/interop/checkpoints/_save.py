"""From a model of ours to a folder that Hugging Face reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from stabletx.interop.checkpoints import _messages
from stabletx.interop.checkpoints._bert_like import DISTILBERT_KEYS, KEYS
from stabletx.interop.checkpoints._conversion import Conversion
from stabletx.interop.checkpoints._decoders import GPT2_KEYS
from stabletx.interop.checkpoints._encoder_decoders import MARIAN_KEYS, T5_KEYS
from stabletx.interop.checkpoints._families import FAMILIES, convert
from stabletx.models import (
    Decoder,
    Encoder,
    EncoderDecoder,
    SequenceClassifier,
    TransformerConfig,
    _model_checks,
)
from stabletx.models._storage import CONFIG, WEIGHTS, StoredModel, own_state, replace_files

_Settings = Callable[[TransformerConfig], dict[str, Any]]
_ACTIVATIONS = {
    "gelu_tanh": "gelu_new", "geglu": "gelu", "geglu_tanh": "gelu_new", "swiglu": "silu"
}  # fmt: skip


def save(model: StoredModel, folder: str | Path, *, family: str | None = None) -> None:
    """Write a model as a Hugging Face checkpoint, which ``transformers`` loads.

    Args:
        model: an Encoder, a SequenceClassifier or a MaskedLanguageModel that is built like one of
            the families; a Decoder built like GPT-2, Llama or Mistral; an EncoderDecoder built
            like T5 or Marian.
        folder: made if need be; its ``config.json`` and ``model.safetensors`` are replaced once
            both new ones are written.
        family: as in ``model_type``; None takes the first that expresses the model exactly. A
            bare RoBERTa encoder is also a BERT, so name it.

    Raises:
        TypeError: if it is not a model.
        ValueError: if no family, or not the one named, can express it.
        OSError: if the folder cannot be written.
    """
    from safetensors.torch import save_file

    _model_checks.check_kind("model", model, StoredModel)
    config, conversion = _described(model, family)
    state = own_state(model)
    tensors: dict[str, Tensor] = {}
    for piece in conversion.pieces:
        parts = piece.split(state[piece.ours].detach()).items()
        tensors |= {name: x.contiguous().clone() for name, x in parts}
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    replace_files(
        {
            path / WEIGHTS: lambda new: save_file(tensors, new, metadata={"format": "pt"}),
            path / CONFIG: lambda new: new.write_text(text, encoding="utf-8"),
        }
    )


def _described(model: StoredModel, family: str | None) -> tuple[dict[str, Any], Conversion]:
    """Find a family whose settings, read back, describe this very model."""
    if family is not None:
        _messages.check_family(family, _SETTINGS)
    differing = ""
    for name in _SETTINGS if family is None else (family,):
        classes = [x for x, kind in FAMILIES[name].models.items() if kind is type(model)]
        if not classes:
            differing = differing or f"a {type(model).__name__}"
            continue
        config = {**_SETTINGS[name](model.config), "model_type": name, "architectures": classes[:1]}
        names = _body_names(name, model)
        try:
            conversion = convert(config, names)
        except (ValueError, TypeError) as error:
            differing = differing or str(error)
            continue
        ours, back = (_read(c, type(model)) for c in (model.config, conversion.config))
        wrong = [key for key in ours if ours[key] != back.get(key)]
        if not wrong:
            config["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
            return config, conversion
        differing = differing or ", ".join(f"{key}={ours[key]!r}" for key in wrong)
    raise ValueError(_messages.cannot_save(tuple(_SETTINGS), f"one with {differing}"))


def _read(config: TransformerConfig, model: type[StoredModel]) -> dict[str, Any]:
    """Give the settings that a model of this class reads, with defaults written out."""
    values = asdict(config)
    unread = [] if model in (Decoder, EncoderDecoder) else ["bos_id", "eos_id"]
    if model is not SequenceClassifier:
        unread += ["labels", "n_classes", "pooling"]
    if model is Encoder:
        unread += ["head_activation", "head_norm", "head_bias", "tie_head", "logit_scale"]
    else:
        unread += ["has_pooler"]
    if config.position != "rotary":
        unread += ["rotary_base", "window_rotary_base"]
    if not config.relative_buckets:
        unread += ["relative_max_distance"]
    for name in unread:
        del values[name]
    values["d_ff"] = config.d_ff or 4 * config.d_model
    values["n_kv_heads"] = config.n_kv_heads or config.n_heads
    values["d_head"] = config.head_dim
    values["n_decoder_layers"] = config.n_layers_of_decoder
    values["embedding_norm"] = config.has_embedding_norm
    values["norm_eps"] = config.norm_eps or {"layer": 1e-5, "rms": 1e-6}[config.norm]
    return values


def _body_names(family: str, model: StoredModel) -> set[str]:
    """Give just those names that decide how the settings are read."""
    if type(model) is Decoder:
        return {"transformer.", "model."}
    if type(model) is EncoderDecoder:
        config = model.config
        bias = {"final_logits_bias"} if config.head_bias else set()
        return bias | (set() if config.tie_head else {"lm_head.weight"})
    pooler = {"albert": "pooler"}.get(family, "pooler.dense")
    prefix = "model." if family == "modernbert" else f"{family}."
    if type(model) is not Encoder:
        return {prefix}
    return {f"{pooler}.weight"} if model.config.has_pooler else set()


def _shared(config: TransformerConfig, keys: Mapping[str, str]) -> dict[str, Any]:
    values = {theirs: getattr(config, ours) for ours, theirs in keys.items()}
    if "d_ff" in keys:
        values[keys["d_ff"]] = config.d_ff or 4 * config.d_model
    values["pad_token_id"] = config.pad_id
    values["tie_word_embeddings"] = config.tie_head
    if config.labels:
        values["id2label"] = {str(i): name for i, name in enumerate(config.labels)}
        values["label2id"] = {name: i for i, name in enumerate(config.labels)}
    elif config.n_classes is not None:
        values["num_labels"] = config.n_classes
    return values


def _bert(config: TransformerConfig) -> dict[str, Any]:
    return {
        **_shared(config, KEYS),
        "hidden_act": _ACTIVATIONS.get(config.activation, config.activation),
        "hidden_dropout_prob": config.dropout_p,
        "attention_probs_dropout_prob": config.attention_dropout_p,
        "layer_norm_eps": 1e-5 if config.norm_eps is None else config.norm_eps,
        "type_vocab_size": config.n_token_types,
    }


def _roberta(config: TransformerConfig) -> dict[str, Any]:
    return {**_bert(config), "max_position_embeddings": config.max_seq_len + config.pad_id + 1}


def _mpnet(config: TransformerConfig) -> dict[str, Any]:
    buckets = {"relative_attention_num_buckets": config.relative_buckets}
    return {**_bert(config), "max_position_embeddings": config.max_seq_len + 2, **buckets}


def _electra(config: TransformerConfig) -> dict[str, Any]:
    return {**_bert(config), "embedding_size": config.d_embedding or config.d_model}


def _albert(config: TransformerConfig) -> dict[str, Any]:
    return {
        **_bert(config),
        "embedding_size": config.d_embedding,
        "num_hidden_groups": config.n_distinct_layers or config.n_layers,
        "inner_group_num": 1,
    }


def _distilbert(config: TransformerConfig) -> dict[str, Any]:
    return {
        **_shared(config, DISTILBERT_KEYS),
        "activation": _ACTIVATIONS.get(config.activation, config.activation),
        "dropout": config.dropout_p,
        "attention_dropout": config.attention_dropout_p,
    }


def _modernbert(config: TransformerConfig) -> dict[str, Any]:
    every, base = config.global_every or 1, config.window_rotary_base or config.rotary_base
    types = ["sliding_attention" if i % every else "full_attention" for i in range(config.n_layers)]
    bases = {"full_attention": config.rotary_base, "sliding_attention": base}
    phases = {name: {"rope_type": "default", "rope_theta": x} for name, x in bases.items()}
    pooling = {"first": "cls", "mean": "mean"}.get(config.pooling)
    special = dict.fromkeys(
        ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), config.pad_id
    )
    return {
        **special,
        **_shared(config, KEYS),
        "hidden_activation": _ACTIVATIONS.get(config.activation, config.activation),
        "classifier_activation": _ACTIVATIONS.get(
            config.head_activation or "gelu", config.head_activation or "gelu"
        ),
        "classifier_pooling": pooling,
        **{f"{x}_bias": config.use_bias for x in ("attention", "mlp", "classifier")},
        **{f"{x}_dropout": config.dropout_p for x in ("embedding", "mlp", "classifier")},
        "attention_dropout": config.attention_dropout_p,
        "decoder_bias": config.head_bias,
        "norm_eps": 1e-5 if config.norm_eps is None else config.norm_eps,
        "norm_bias": config.norm_bias,
        "local_attention": 2 * (config.window or 0),
        "layer_types": types,
        "rope_parameters": phases,
    }


def _ids(config: TransformerConfig) -> dict[str, Any]:
    return {"bos_token_id": config.bos_id, "eos_token_id": config.eos_id}


def _gpt2(config: TransformerConfig) -> dict[str, Any]:
    return {
        **_shared(config, GPT2_KEYS),
        **_ids(config),
        "n_inner": config.d_ff or 4 * config.d_model,
        "activation_function": _ACTIVATIONS.get(config.activation, config.activation),
        **{f"{x}_pdrop": config.dropout_p for x in ("resid", "embd")},
        "attn_pdrop": config.attention_dropout_p,
        "layer_norm_epsilon": 1e-5 if config.norm_eps is None else config.norm_eps,
    }


def _llama(config: TransformerConfig) -> dict[str, Any]:
    return {
        **_shared(config, KEYS),
        **_ids(config),
        "num_key_value_heads": config.n_kv_heads or config.n_heads,
        "head_dim": config.head_dim,
        "hidden_act": _ACTIVATIONS.get(config.activation, config.activation),
        "attention_bias": config.use_bias,
        "mlp_bias": config.use_bias,
        "attention_dropout": config.attention_dropout_p,
        "rms_norm_eps": 1e-6 if config.norm_eps is None else config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
    }


def _mistral(config: TransformerConfig) -> dict[str, Any]:
    return {
        **_llama(config),
        "sliding_window": None if config.window is None else config.window + 1,
    }


def _t5(config: TransformerConfig) -> dict[str, Any]:
    plain = {"relu": "relu", "gelu": "gelu", "silu": "silu", "gelu_tanh": "gelu_new"}
    gated = {"geglu_tanh": "gated-gelu", "swiglu": "gated-silu"}
    scales = config.logit_scale != 1.0
    return {
        **_shared(config, T5_KEYS),
        **_ids(config),
        "d_kv": config.head_dim,
        "num_decoder_layers": config.n_layers_of_decoder,
        "feed_forward_proj": {**plain, **gated}.get(config.activation),
        "dropout_rate": config.dropout_p,
        "layer_norm_epsilon": 1e-6 if config.norm_eps is None else config.norm_eps,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "decoder_start_token_id": config.bos_id,
        "tie_word_embeddings": scales,
        "scale_decoder_outputs": scales,
    }


def _marian(config: TransformerConfig) -> dict[str, Any]:
    sizes = _shared(config, MARIAN_KEYS)
    act = {"silu": "swish", "gelu_tanh": "gelu_new"}.get(config.activation, config.activation)
    return {
        **sizes,
        **_ids(config),
        "decoder_layers": config.n_layers_of_decoder,
        "decoder_attention_heads": config.n_heads,
        "decoder_ffn_dim": sizes["encoder_ffn_dim"],
        "decoder_vocab_size": config.vocab_size,
        "activation_function": act,
        "dropout": config.dropout_p,
        "attention_dropout": config.attention_dropout_p,
        "scale_embedding": config.embedding_scale != 1.0,
        "share_encoder_decoder_embeddings": config.share_embeddings,
        "decoder_start_token_id": config.bos_id,
    }


_SETTINGS: dict[str, _Settings] = {
    "bert": _bert,
    "roberta": _roberta,
    "distilbert": _distilbert,
    "electra": _electra,
    "albert": _albert,
    "mpnet": _mpnet,
    "modernbert": _modernbert,
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _mistral,
    "t5": _t5,
    "marian": _marian,
}
