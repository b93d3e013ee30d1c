"""One set of random weights, in every library's own form.

The weights are drawn in stabletx's names and copied by the small mappings below, so that all
contestants compute the same function and can be held to the same answer. x-transformers has no
biases in attention and in its norms, so those are 0 here; the other biases and all gains are drawn.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stabletx import Decoder, Encoder, TransformerConfig

Weights = dict[str, Tensor]
EPS = 1e-5


class Sizes(NamedTuple):
    """Sizes of a model; a head has d_model / n_heads features, the feed-forward part 4 d_model."""

    d_model: int
    n_layers: int
    n_heads: int
    max_seq_len: int
    vocab_size: int = 8000

    @property
    def weights_of_a_layer(self) -> int:
        """Count them, biases and norms apart."""
        return 12 * self.d_model**2

    def flops(self, lengths: list[int]) -> float:
        """Count what a forward pass over sequences of these lengths needs, embeddings apart."""
        linear = 2.0 * self.weights_of_a_layer * sum(lengths)
        return self.n_layers * (linear + 4.0 * self.d_model * sum(n * n for n in lengths))


def encoder(sizes: Sizes) -> Encoder:
    """Build stabletx's encoder, post-norm and with learned positions as BERT has them."""
    return _drawn(Encoder(_config(sizes, "post")))


def decoder(sizes: Sizes) -> Decoder:
    """Build stabletx's decoder, pre-norm and with learned positions as GPT-2 has them."""
    return _drawn(Decoder(_config(sizes, "pre")))


def _config(sizes: Sizes, norm_position: Any) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=sizes.vocab_size,
        d_model=sizes.d_model,
        n_layers=sizes.n_layers,
        n_heads=sizes.n_heads,
        d_ff=4 * sizes.d_model,
        max_seq_len=sizes.max_seq_len,
        norm_position=norm_position,
        position="learned",
        qk_norm=False,
    )


def _drawn(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)

    def noise(x: Tensor, deviation: float) -> Tensor:
        return torch.randn(x.shape, generator=generator) * deviation

    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.ndim > 1:
                table = "embedding" in name
                x.copy_(noise(x, 0.05 if table else x.shape[1] ** -0.5))
            elif "feed_forward." in name:
                x.copy_(noise(x, 0.1))
            else:
                x.copy_(1.0 + noise(x, 0.1) if name.endswith("weight") else torch.zeros_like(x))
    return model.eval()


def of(model: nn.Module) -> Weights:
    """Give a model's weights by name, those of a decoder named as those of an encoder."""
    return {name.removeprefix("stack."): x.detach() for name, x in model.state_dict().items()}


class Block(NamedTuple):
    """The weights of one block, each a (weight, bias) pair."""

    qkv: tuple[Tensor, Tensor]
    attention_out: tuple[Tensor, Tensor]
    attention_norm: tuple[Tensor, Tensor]
    widen: tuple[Tensor, Tensor]
    narrow: tuple[Tensor, Tensor]
    feed_forward_norm: tuple[Tensor, Tensor]


def blocks(weights: Weights) -> list[Block]:
    """Give the weights of every block, the first one first."""

    def pair(name: str) -> tuple[Tensor, Tensor]:
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    norm = "norm_out" if "stem.norm.weight" in weights else "norm_in"
    found, i = [], 0
    while f"blocks.{i}.attention.qkv.weight" in weights:
        parts = (
            "attention.qkv", "attention.out", f"attention_shortcut.{norm}",
            "feed_forward.widen", "feed_forward.out", f"feed_forward_shortcut.{norm}",
        )  # fmt: skip
        found.append(Block(*(pair(f"blocks.{i}.{part}") for part in parts)))
        i += 1
    return found


def _transformers() -> Any:
    """Import transformers without its advice on padding, which is none here.

    Raises:
        ImportError: where it is not installed.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


def _copy(pairs: list[tuple[Tensor | nn.Parameter, Tensor]]) -> None:
    with torch.no_grad():
        for target, source in pairs:
            target.copy_(source)


class TorchModel(nn.Module):
    """The same model out of torch's own layers: a peer, and in float64 the judge of all.

    Post-norm with a norm after the embeddings where the weights have one, else pre-norm with a
    last norm, causal, and with scores for the next token.
    """

    def __init__(self, weights: Weights, n_heads: int) -> None:
        super().__init__()
        tokens, positions = (weights[f"stem.embedding.{x}.weight"] for x in ("tokens", "positions"))
        d = tokens.shape[1]
        self.is_decoder = "norm.weight" in weights
        self.tokens = nn.Embedding.from_pretrained(tokens.clone(), freeze=False)
        self.positions = nn.Embedding.from_pretrained(positions.clone(), freeze=False)
        self.norm = nn.LayerNorm(d, eps=EPS)
        name = "norm" if self.is_decoder else "stem.norm"
        _copy([(getattr(self.norm, x), weights[f"{name}.{x}"]) for x in ("weight", "bias")])
        layer = nn.TransformerEncoderLayer(
            d, n_heads, 4 * d, dropout=0.0, activation="gelu", layer_norm_eps=EPS,
            batch_first=True, norm_first=self.is_decoder,
        )  # fmt: skip
        all_blocks = blocks(weights)
        self.stack = nn.TransformerEncoder(
            layer, len(all_blocks), enable_nested_tensor=not self.is_decoder
        )
        for own, block in zip(self.stack.layers, all_blocks, strict=True):
            attention = own.self_attn
            pairs = [
                (attention.in_proj_weight, block.qkv[0]),
                (attention.in_proj_bias, block.qkv[1]),
            ]
            for part, source in (
                (attention.out_proj, block.attention_out), (own.norm1, block.attention_norm),
                (own.linear1, block.widen), (own.linear2, block.narrow),
                (own.norm2, block.feed_forward_norm),
            ):  # fmt: skip
                pairs += [(part.weight, source[0]), (part.bias, source[1])]
            _copy(pairs)
        self.eval()

    def forward(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
        """Encode ids (b, n), or score the next token; ``padding`` is True where there is none."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        if not self.is_decoder:
            return self.stack(self.norm(x), src_key_padding_mask=padding)
        causal = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], ids.device, x.dtype)
        return self.norm(self.stack(x, mask=causal, is_causal=True)) @ self.tokens.weight.mT


def bert(weights: Weights, n_heads: int, attention: str = "sdpa") -> Any:
    """Build Hugging Face's BertModel."""
    library = _transformers()
    tokens, positions = (weights[f"stem.embedding.{x}.weight"] for x in ("tokens", "positions"))
    d, all_blocks = tokens.shape[1], blocks(weights)
    config = library.BertConfig(
        vocab_size=len(tokens), hidden_size=d, num_hidden_layers=len(all_blocks),
        num_attention_heads=n_heads, intermediate_size=4 * d, hidden_act="gelu",
        max_position_embeddings=len(positions), layer_norm_eps=EPS, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, attn_implementation=attention,
    )  # fmt: skip
    model = library.BertModel(config).eval()
    own = model.embeddings
    pairs = [
        (own.word_embeddings.weight, tokens), (own.position_embeddings.weight, positions),
        (own.token_type_embeddings.weight, torch.zeros(2, d)),
        (own.LayerNorm.weight, weights["stem.norm.weight"]),
        (own.LayerNorm.bias, weights["stem.norm.bias"]),
    ]  # fmt: skip
    for layer, block in zip(model.encoder.layer, all_blocks, strict=True):
        attention_part = layer.attention.self
        for i, part in enumerate((attention_part.query, attention_part.key, attention_part.value)):
            rows = slice(i * d, (i + 1) * d)
            pairs += [(part.weight, block.qkv[0][rows]), (part.bias, block.qkv[1][rows])]
        for part, source in (
            (layer.attention.output.dense, block.attention_out),
            (layer.attention.output.LayerNorm, block.attention_norm),
            (layer.intermediate.dense, block.widen), (layer.output.dense, block.narrow),
            (layer.output.LayerNorm, block.feed_forward_norm),
        ):  # fmt: skip
            pairs += [(part.weight, source[0]), (part.bias, source[1])]
    _copy(pairs)
    return model


def gpt2(weights: Weights, n_heads: int) -> Any:
    """Build Hugging Face's GPT2LMHeadModel; its maps are stored transposed."""
    library = _transformers()
    tokens, positions = (weights[f"stem.embedding.{x}.weight"] for x in ("tokens", "positions"))
    d, all_blocks = tokens.shape[1], blocks(weights)
    config = library.GPT2Config(
        vocab_size=len(tokens), n_embd=d, n_layer=len(all_blocks), n_head=n_heads,
        n_positions=len(positions), n_inner=4 * d, activation_function="gelu",
        layer_norm_epsilon=EPS, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        attn_implementation="sdpa", bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = library.GPT2LMHeadModel(config).eval()
    own = model.transformer
    pairs = [
        (own.wte.weight, tokens), (own.wpe.weight, positions),
        (own.ln_f.weight, weights["norm.weight"]), (own.ln_f.bias, weights["norm.bias"]),
    ]  # fmt: skip
    for layer, block in zip(own.h, all_blocks, strict=True):
        for part, source in (
            (layer.attn.c_attn, block.qkv), (layer.attn.c_proj, block.attention_out),
            (layer.mlp.c_fc, block.widen), (layer.mlp.c_proj, block.narrow),
        ):  # fmt: skip
            pairs += [(part.weight, source[0].mT), (part.bias, source[1])]
        for part, source in (
            (layer.ln_1, block.attention_norm), (layer.ln_2, block.feed_forward_norm),
        ):  # fmt: skip
            pairs += [(part.weight, source[0]), (part.bias, source[1])]
    _copy(pairs)
    return model


def x_transformer(weights: Weights, n_heads: int) -> Any:
    """Build x-transformers' model: an encoder, or a decoder with tied scores."""
    import x_transformers

    tokens, positions = (weights[f"stem.embedding.{x}.weight"] for x in ("tokens", "positions"))
    d, all_blocks, is_decoder = tokens.shape[1], blocks(weights), "norm.weight" in weights
    kind = x_transformers.Decoder if is_decoder else x_transformers.Encoder
    layers = kind(
        dim=d, depth=len(all_blocks), heads=n_heads, attn_dim_head=d // n_heads, attn_flash=True,
        pre_norm=is_decoder, verbose=False,
    )  # fmt: skip
    model = x_transformers.TransformerWrapper(
        num_tokens=len(tokens), max_seq_len=len(positions), attn_layers=layers,
        post_emb_norm=not is_decoder, tie_embedding=is_decoder, tie_embedding_scale=1.0,
    )  # fmt: skip
    pairs: list[tuple[Any, Tensor]] = [
        (model.token_emb.emb.weight, tokens),
        (model.pos_emb.emb.weight, positions / model.pos_emb.scale),
    ]
    last = layers.final_norm if is_decoder else model.post_emb_norm
    gain = weights["norm.weight" if is_decoder else "stem.norm.weight"]
    pairs.append((last.gamma, gain - float(last.unit_offset)))
    for i, block in enumerate(all_blocks):
        (norms, attention, _), (other_norms, feed_forward, _) = layers.layers[2 * i : 2 * i + 2]
        slot = 0 if is_decoder else 2
        for own, source in (
            (norms[slot], block.attention_norm), (other_norms[slot], block.feed_forward_norm),
        ):  # fmt: skip
            pairs.append((own.gamma, source[0] - float(own.unit_offset)))
        parts = (attention.to_q, attention.to_k, attention.to_v)
        pairs += [(x.weight, y) for x, y in zip(parts, block.qkv[0].chunk(3), strict=True)]
        widen, narrow = feed_forward.ff[0][0], feed_forward.ff[2]
        pairs += [
            (attention.to_out.weight, block.attention_out[0]),
            (widen.weight, block.widen[0]), (widen.bias, block.widen[1]),
            (narrow.weight, block.narrow[0]), (narrow.bias, block.narrow[1]),
        ]  # fmt: skip
    _copy(pairs)
    return model.eval()
