"""Encoder-decoders: T5 and Marian."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from stabletx.interop.checkpoints import _messages
from stabletx.interop.checkpoints._conversion import FLATTENED, Conversion, Ignored, Piece
from stabletx.interop.checkpoints._names import (
    activation,
    first_set,
    head_sizes,
    joined,
    pair,
    settings,
    size,
)
from stabletx.models import TransformerConfig
from stabletx.models._storage import StoredModel

T5_KEYS = {
    "vocab_size": "vocab_size",
    "d_model": "d_model",
    "n_layers": "num_layers",
    "n_heads": "num_heads",
    "d_ff": "d_ff",
    "d_head": "d_kv",
}
MARIAN_KEYS = {
    "vocab_size": "vocab_size",
    "d_model": "d_model",
    "n_layers": "encoder_layers",
    "n_heads": "encoder_attention_heads",
    "d_ff": "encoder_ffn_dim",
    "max_seq_len": "max_position_embeddings",
}
_TOKENS, _RELATIVE = "stem.embedding.tokens.weight", "places.relative.table.weight"
_WAVES = Ignored(r"model\.(en|de)coder\.embed_positions\.weight", "fixed waves: computed here")
_CROSS_BIAS = Ignored(
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    "a table that its model does not read",
)


def convert_t5(
    config: Mapping[str, Any], names: Collection[str], model: type[StoredModel]
) -> Conversion:
    """Say how a T5 checkpoint becomes an EncoderDecoder; as :func:`convert_bert`."""
    made = _t5_config(config, names)
    shared = "shared.weight"
    pieces = [Piece(f"encoder.{_TOKENS}", (shared,))]
    tied = {f"{side}.embed_tokens.weight": shared for side in ("encoder", "decoder")}
    for ours, theirs in (("encoder", "encoder"), ("stack", "decoder")):
        first = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        pieces.append(Piece(f"{ours}.{_RELATIVE}", (first,)))
        is_decoder = theirs == "decoder"
        for i in range(made.n_layers_of_decoder if is_decoder else made.n_layers):
            at, block = f"{theirs}.block.{i}.layer.", f"{ours}.blocks.{i}."
            pieces += _t5_layer(made, at, block, is_decoder=is_decoder)
        pieces += pair(f"{ours}.norm", f"{theirs}.final_layer_norm", bias=False)
    if made.tie_head:
        tied["lm_head.weight"] = shared
    else:
        pieces.append(Piece("stack.head.weight", ("lm_head.weight",)))
    return Conversion("t5", model, made, tuple(pieces), tied, (_CROSS_BIAS,))


def _t5_config(config: Mapping[str, Any], names: Collection[str]) -> TransformerConfig:
    act = config.get("feed_forward_proj", "relu")
    if not isinstance(act, str):
        _messages.refuse_setting("feed_forward_proj", act, "be the name of an activation")
    name = {"gated-gelu": "gelu_new"}.get(act, act.removeprefix("gated-"))
    bent = activation("feed_forward_proj", name, is_gated=act.startswith("gated-"))
    # The first T5 ties its head and scales the scores; 1.1 does neither, and newer writers of its
    # settings call the head tied all the same and leave out one that is.
    scales = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))
    values, buckets = settings(config, T5_KEYS), "relative_attention_num_buckets"
    return TransformerConfig(
        **values,
        n_decoder_layers=config.get("num_decoder_layers"),
        activation=bent,  # type: ignore[arg-type]
        use_bias=False,
        dropout_p=config.get("dropout_rate", 0.1),
        attention_dropout_p=config.get("dropout_rate", 0.1),
        norm="rms",
        norm_eps=config.get("layer_norm_epsilon", 1e-6),
        qk_norm=False,
        position="none",
        relative_buckets=size(buckets, config.get(buckets, 32)),
        relative_max_distance=config.get("relative_attention_max_distance", 128),
        attention_scale=1.0,
        share_embeddings=True,
        tie_head=bool(scales) or "lm_head.weight" not in names,
        logit_scale=values["d_model"] ** -0.5 if scales else 1.0,
        pad_id=first_set(config, "pad_token_id", default=0),
        bos_id=first_set(config, "decoder_start_token_id", "pad_token_id", default=0),
        eos_id=config.get("eos_token_id", 1),
    )


def _t5_layer(made: TransformerConfig, at: str, block: str, *, is_decoder: bool) -> Iterator[Piece]:
    parts = [("attention", f"{at}0", "SelfAttention")]
    if is_decoder:
        parts.append(("cross_attention", f"{at}1", "EncDecAttention"))
    for ours, layer, attention in parts:
        qkv = [f"{layer}.{attention}.{x}" for x in "qkv"]
        yield from joined(f"{block}{ours}.qkv", qkv, head_sizes(made), bias=False)
        yield from pair(f"{block}{ours}.out", f"{layer}.{attention}.o", bias=False)
        yield from pair(f"{block}{ours}_shortcut.norm_in", f"{layer}.layer_norm", bias=False)
    last, d_ff = f"{at}{len(parts)}", made.d_ff
    assert d_ff is not None
    widen = [f"{last}.DenseReluDense.{x}" for x in ("wi_0", "wi_1")]
    if made.activation in ("geglu", "geglu_tanh", "swiglu"):
        yield from joined(f"{block}feed_forward.widen", widen, (d_ff, d_ff), bias=False)
    else:
        yield from pair(f"{block}feed_forward.widen", f"{last}.DenseReluDense.wi", bias=False)
    yield from pair(f"{block}feed_forward.out", f"{last}.DenseReluDense.wo", bias=False)
    yield from pair(f"{block}feed_forward_shortcut.norm_in", f"{last}.layer_norm", bias=False)


def convert_marian(
    config: Mapping[str, Any], names: Collection[str], model: type[StoredModel]
) -> Conversion:
    """Say how a Marian checkpoint becomes an EncoderDecoder; as :func:`convert_bert`."""
    made = _marian_config(config, names)
    share = made.share_embeddings
    shared = "model.shared.weight" if share else "model.encoder.embed_tokens.weight"
    target = shared if share else "model.decoder.embed_tokens.weight"
    pieces = [Piece(f"encoder.{_TOKENS}", (shared,))]
    tied = {}
    if share:
        for side in ("encoder", "decoder"):
            tied[f"model.{side}.embed_tokens.weight"] = shared
    else:
        pieces.append(Piece(f"stack.{_TOKENS}", (target,)))
    for i in range(made.n_layers):
        at = f"model.encoder.layers.{i}."
        pieces += _marian_layer(made, at, f"encoder.blocks.{i}.", is_decoder=False)
    for i in range(made.n_layers_of_decoder):
        at = f"model.decoder.layers.{i}."
        pieces += _marian_layer(made, at, f"stack.blocks.{i}.", is_decoder=True)
    if made.tie_head:
        tied["lm_head.weight"] = target
    else:
        pieces.append(Piece("stack.head.weight", ("lm_head.weight",)))
    if made.head_bias:
        pieces.append(Piece("stack.head.bias", ("final_logits_bias",), change=FLATTENED))
    return Conversion("marian", model, made, tuple(pieces), tied, (_WAVES,))


def _marian_config(config: Mapping[str, Any], names: Collection[str]) -> TransformerConfig:
    values = settings(config, MARIAN_KEYS)
    _messages.check_setting(config, "decoder_attention_heads", (values["n_heads"],))
    _messages.check_setting(config, "decoder_ffn_dim", (values["d_ff"],))
    _messages.check_setting(config, "decoder_vocab_size", (None, values["vocab_size"]))
    for key in ("normalize_before", "normalize_embedding"):
        _messages.check_setting(config, key, (False,))
    pad_id = _messages.needed(config, "pad_token_id")
    key = "activation_function"
    return TransformerConfig(
        **values,
        n_decoder_layers=config.get("decoder_layers"),
        activation=activation(key, config.get(key, "gelu")),  # type: ignore[arg-type]
        dropout_p=config.get("dropout", 0.1),
        attention_dropout_p=config.get("attention_dropout", 0.0),
        norm_position="post",
        embedding_norm=False,
        qk_norm=False,
        position="sinusoidal",
        embedding_scale=values["d_model"] ** 0.5 if config.get("scale_embedding") else 1.0,
        share_embeddings=config.get("share_encoder_decoder_embeddings", True),
        tie_head=config.get("tie_word_embeddings", True),
        head_bias="final_logits_bias" in names,
        pad_id=pad_id,
        bos_id=first_set(config, "decoder_start_token_id", default=pad_id),
        eos_id=config.get("eos_token_id", 0),
    )


def _marian_layer(
    made: TransformerConfig, at: str, block: str, *, is_decoder: bool
) -> Iterator[Piece]:
    parts = [("attention", "self_attn")]
    if is_decoder:
        parts.append(("cross_attention", "encoder_attn"))
    for ours, theirs in parts:
        qkv = [f"{at}{theirs}.{x}_proj" for x in "qkv"]
        yield from joined(f"{block}{ours}.qkv", qkv, head_sizes(made), bias=True)
        yield from pair(f"{block}{ours}.out", f"{at}{theirs}.out_proj")
        yield from pair(f"{block}{ours}_shortcut.norm_out", f"{at}{theirs}_layer_norm")
    yield from pair(f"{block}feed_forward.widen", f"{at}fc1")
    yield from pair(f"{block}feed_forward.out", f"{at}fc2")
    yield from pair(f"{block}feed_forward_shortcut.norm_out", f"{at}final_layer_norm")
