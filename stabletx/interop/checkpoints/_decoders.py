"""Decoders: GPT-2, and Llama with those built like it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from stabletx.interop.checkpoints import _messages
from stabletx.interop.checkpoints._bert_like import KEYS
from stabletx.interop.checkpoints._conversion import TRANSPOSED, Conversion, Ignored, Piece
from stabletx.interop.checkpoints._names import (
    activation,
    first_set,
    head_sizes,
    joined,
    pair,
    prefix_of,
    rotary_base,
    settings,
    size,
)
from stabletx.models import TransformerConfig
from stabletx.models._storage import StoredModel

GPT2_KEYS = {
    "vocab_size": "vocab_size",
    "d_model": "n_embd",
    "n_layers": "n_layer",
    "n_heads": "n_head",
    "max_seq_len": "n_positions",
}
_GPT2_BUFFERS = Ignored(r"(.*\.)?attn\.(masked_)?bias", "a buffer: the causal mask is a rule")
_PHASES = Ignored(r"(.*\.)?rotary_emb\.inv_freq", "a buffer: phases are computed")


def convert_gpt2(
    config: Mapping[str, Any], names: Collection[str], model: type[StoredModel]
) -> Conversion:
    """Say how a GPT-2 checkpoint becomes a Decoder; as :func:`convert_bert`.

    Its linear maps are stored the other way round, and are transposed.
    """
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        _messages.check_setting(config, key, (False,))
    _messages.check_setting(config, "scale_attn_weights", (True,))
    key, values = "activation_function", settings(config, GPT2_KEYS)
    made = TransformerConfig(
        **values,
        d_ff=first_set(config, "n_inner", default=4 * values["d_model"]),
        activation=activation(key, config.get(key, "gelu_new")),  # type: ignore[arg-type]
        dropout_p=config.get("resid_pdrop", 0.1),
        attention_dropout_p=config.get("attn_pdrop", 0.1),
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        qk_norm=False,
        position="learned",
        **_ids(config, values["vocab_size"]),
        tie_head=config.get("tie_word_embeddings", True),
    )
    body = prefix_of("transformer.", names)
    pieces = [
        Piece("stack.stem.embedding.tokens.weight", (f"{body}wte.weight",)),
        Piece("stack.stem.embedding.positions.weight", (f"{body}wpe.weight",)),
    ]
    for i in range(made.n_layers):
        at, block = f"{body}h.{i}.", f"stack.blocks.{i}."
        pieces += pair(f"{block}attention_shortcut.norm_in", f"{at}ln_1")
        pieces += pair(f"{block}attention.qkv", f"{at}attn.c_attn", change=TRANSPOSED)
        pieces += pair(f"{block}attention.out", f"{at}attn.c_proj", change=TRANSPOSED)
        pieces += pair(f"{block}feed_forward_shortcut.norm_in", f"{at}ln_2")
        pieces += pair(f"{block}feed_forward.widen", f"{at}mlp.c_fc", change=TRANSPOSED)
        pieces += pair(f"{block}feed_forward.out", f"{at}mlp.c_proj", change=TRANSPOSED)
    pieces += pair("stack.norm", f"{body}ln_f")
    tied = _head(pieces, made, f"{body}wte.weight")
    return Conversion("gpt2", model, made, tuple(pieces), tied, (_GPT2_BUFFERS,))


def convert_llama(
    config: Mapping[str, Any], names: Collection[str], model: type[StoredModel]
) -> Conversion:
    """Say how a Llama checkpoint becomes a Decoder; as :func:`convert_bert`."""
    return _llama("llama", config, names, model, window=None)


def convert_mistral(
    config: Mapping[str, Any], names: Collection[str], model: type[StoredModel]
) -> Conversion:
    """Say how a Mistral checkpoint becomes a Decoder; as :func:`convert_bert`."""
    width = config.get("sliding_window")  # counts the token itself
    _messages.check_setting(config, "layer_types", (None,))
    window = None if width is None else size("sliding_window", width) - 1
    return _llama("mistral", config, names, model, window=window)


def _llama(
    family: str, config: Mapping[str, Any], names: Collection[str], model: type[StoredModel],
    *, window: int | None,
) -> Conversion:  # fmt: skip
    use_bias = config.get("attention_bias", False)
    _messages.check_setting(config, "mlp_bias", (use_bias,))
    values = settings(config, KEYS)
    d_head = config.get("head_dim")
    made = TransformerConfig(
        **values,
        n_kv_heads=config.get("num_key_value_heads"),
        d_head=None if d_head == values["d_model"] / values["n_heads"] else d_head,
        activation=activation("hidden_act", config.get("hidden_act", "silu"), is_gated=True),  # type: ignore[arg-type]
        use_bias=use_bias,
        attention_dropout_p=config.get("attention_dropout", 0.0),
        norm="rms",
        norm_eps=config.get("rms_norm_eps", 1e-6),
        qk_norm=False,
        rotary_base=rotary_base(config),
        window=window,
        **_ids(config, values["vocab_size"]),
        tie_head=config.get("tie_word_embeddings", False),
    )
    body = prefix_of("model.", names)
    pieces = [Piece("stack.stem.embedding.tokens.weight", (f"{body}embed_tokens.weight",))]
    for i in range(made.n_layers):
        pieces += _llama_layer(made, f"{body}layers.{i}.", f"stack.blocks.{i}.")
    pieces += pair("stack.norm", f"{body}norm", bias=False)
    tied = _head(pieces, made, f"{body}embed_tokens.weight")
    return Conversion(family, model, made, tuple(pieces), tied, (_PHASES,))


def _llama_layer(made: TransformerConfig, at: str, block: str) -> Iterator[Piece]:
    bias, d_ff = made.use_bias, made.d_ff
    assert d_ff is not None
    yield from pair(f"{block}attention_shortcut.norm_in", f"{at}input_layernorm", bias=False)
    qkv = [f"{at}self_attn.{x}_proj" for x in "qkv"]
    yield from joined(f"{block}attention.qkv", qkv, head_sizes(made), bias=bias)
    yield from pair(f"{block}attention.out", f"{at}self_attn.o_proj", bias=bias)
    norm = f"{at}post_attention_layernorm"
    yield from pair(f"{block}feed_forward_shortcut.norm_in", norm, bias=False)
    widen = (f"{at}mlp.gate_proj", f"{at}mlp.up_proj")
    yield from joined(f"{block}feed_forward.widen", widen, (d_ff, d_ff), bias=bias)
    yield from pair(f"{block}feed_forward.out", f"{at}mlp.down_proj", bias=bias)


def _head(pieces: list[Piece], made: TransformerConfig, table: str) -> dict[str, str]:
    """Add an untied head's piece, or say what a tied one repeats."""
    if made.tie_head:
        return {"lm_head.weight": table}
    pieces.append(Piece("stack.head.weight", ("lm_head.weight",)))
    return {}


def _ids(config: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Read the ids that begin, end and fill; of several that end, the first."""
    found = {}
    for name in ("bos", "eos", "pad"):
        value = config.get(f"{name}_token_id")
        value = value[0] if isinstance(value, list) and value else value
        # Tiny models keep the ids of a large vocabulary, which can never occur in them.
        is_id = isinstance(value, int) and 0 <= value < vocab_size
        found[f"{name}_id"] = value if is_id else (0 if name == "pad" else None)
    return found
