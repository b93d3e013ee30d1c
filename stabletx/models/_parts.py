"""What all models share: how a token enters, what a layer sees, norms, heads, how weights start."""

from __future__ import annotations

from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from stabletx.layers.attention import MultiHeadAttention, Rotation
from stabletx.layers.blocks import DecoderBlock, EncoderBlock
from stabletx.layers.embeddings import RelativeBias, RotaryEmbedding, TokenEmbedding
from stabletx.layers.feed_forward import FeedForward
from stabletx.layers.heads import LanguageHead
from stabletx.layers.normalization import LayerNorm, RMSNorm, make_norm
from stabletx.masks import Mask
from stabletx.models import _model_checks
from stabletx.models.config import TransformerConfig
from stabletx.packing import Plan


@final
class Stem(nn.Module):
    """Embed tokens: look up, norm where the model does, bring to the model's width."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        n_positions = config.max_seq_len if config.position == "learned" else None
        self.max_seq_len = n_positions
        width = config.d_model if config.d_embedding is None else config.d_embedding
        self.embedding = TokenEmbedding(
            config.vocab_size,
            width,
            n_positions=n_positions,
            n_types=config.n_token_types,
            is_sinusoidal=config.position == "sinusoidal",
            scale=config.embedding_scale,
            dropout_p=config.dropout_p,
        )
        self.norm = make_norm(config.norm_settings, width) if config.has_embedding_norm else None
        self.widen = None if config.d_embedding is None else nn.Linear(width, config.d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the map to the model's width anew; it keeps a vector's length."""
        if self.widen is not None:
            nn.init.normal_(self.widen.weight, std=self.widen.out_features**-0.5)
            nn.init.zeros_(self.widen.bias)

    def forward(self, ids: Tensor, positions: Tensor, types: Tensor | None = None) -> Tensor:
        """Embed ``ids`` (...) of some ``types`` (...) that stand at ``positions``."""
        x: Tensor = self.embedding(ids, positions, types)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.widen is None else self.widen(x)

    def check_length(self, n_tokens: int) -> None:
        """Refuse more tokens than there are learned positions."""
        if self.max_seq_len is not None:
            _model_checks.check_seq_len(n_tokens, self.max_seq_len)


class View(NamedTuple):
    """What a layer may see, and what it knows of the places of tokens."""

    mask: Mask | None
    bias: Tensor | None
    rotation: Rotation | None


@final
class Places(nn.Module):
    """Work out from positions, once in a forward pass, what every layer sees of them."""

    def __init__(self, config: TransformerConfig, *, is_causal: bool = False) -> None:
        super().__init__()
        self.is_windowed = config.is_windowed
        self.window = config.window
        is_rotary, base = config.position == "rotary", config.rotary_base
        self.rotary = RotaryEmbedding(config.head_dim, base=base) if is_rotary else None
        base = base if config.window_rotary_base is None else config.window_rotary_base
        self.window_rotary = RotaryEmbedding(config.head_dim, base=base) if is_rotary else None
        self.relative = (
            RelativeBias(
                config.n_heads,
                n_buckets=config.relative_buckets,
                max_distance=config.relative_max_distance,
                is_causal=is_causal,
            )
            if config.relative_buckets
            else None
        )

    def forward(
        self,
        positions: Tensor,  # (n,) or (b, n), or (n_tokens,) with a plan
        *,
        keys: Tensor | None = None,  # (s,) or (b, s), where earlier tokens are remembered
        mask: Mask | None = None,
        plan: Plan | None = None,
    ) -> tuple[View, View]:
        """Give the view of a layer that sees all and of one with a window."""
        places = positions
        if plan is not None:
            places = torch.arange(plan.max_length, device=positions.device)
        keys = places if keys is None else keys
        bias = None if self.relative is None else self.relative(places, keys)
        rotation, near_rotation = self.rotations(positions)
        whole = View(mask, bias, rotation)
        if self.window is None:
            return whole, whole
        near = _near(places, keys, self.window)
        return whole, View(near if mask is None else near & mask, bias, near_rotation)

    def rotations(self, positions: Tensor) -> tuple[Rotation | None, Rotation | None]:
        """Give the rotation of a layer that sees all and of one with a window."""
        if self.rotary is None or self.window_rotary is None:
            return None, None
        whole: Rotation = self.rotary(positions)
        same = self.window is None or self.window_rotary.base == self.rotary.base
        return whole, whole if same else self.window_rotary(positions)


def _near(queries: Tensor, keys: Tensor, window: int) -> Mask:
    """Let a token see those at most ``window`` real tokens away."""
    if queries.ndim == 1 and keys.ndim == 1:
        return Mask.window(window, window)
    distance = keys[..., None, :] - queries[..., :, None]
    return Mask.dense((distance.abs() <= window)[:, None])


def encoder_blocks(config: TransformerConfig) -> nn.ModuleList:
    """Build the blocks of an encoder that have weights of their own."""
    settings = _block_settings(config)
    n_blocks = config.n_distinct_layers or config.n_layers
    blocks = [EncoderBlock(config.d_model, config.n_heads, **settings) for _ in range(n_blocks)]
    return _begun(nn.ModuleList(blocks), config)


def decoder_blocks(config: TransformerConfig, *, has_context: bool) -> nn.ModuleList:
    """Build the blocks of a decoder that have weights of their own."""
    settings = {"has_context": has_context, **_block_settings(config)}
    n_blocks = config.n_distinct_layers or config.n_layers_of_decoder
    blocks = [DecoderBlock(config.d_model, config.n_heads, **settings) for _ in range(n_blocks)]
    return _begun(nn.ModuleList(blocks), config)


def _block_settings(config: TransformerConfig) -> dict[str, Any]:
    names = (
        "n_kv_heads", "d_head", "d_ff", "norm_position", "activation", "qk_norm", "use_bias",
        "attention_scale", "dropout_p", "attention_dropout_p",
        "recompute_feed_forward",
    )  # fmt: skip
    return {"norm": config.norm_settings, **{name: getattr(config, name) for name in names}}


def _begun(blocks: nn.ModuleList, config: TransformerConfig) -> nn.ModuleList:
    """Take the first norm away where the embeddings come normed already, as in ModernBERT."""
    first = blocks[0]
    assert isinstance(first, EncoderBlock | DecoderBlock)
    if config.norm_position == "pre" and config.has_embedding_norm:
        first.attention_shortcut.norm_in = None
    return blocks


def last_norm(config: TransformerConfig) -> LayerNorm | RMSNorm | None:
    """Build the norm after the last block; a post-norm block ends with its own."""
    if config.norm_position == "post":
        return None
    return make_norm(config.norm_settings, config.d_model)


def language_head(config: TransformerConfig) -> LanguageHead:
    """Build what scores the vocabulary."""
    return LanguageHead(
        config.d_model,
        config.vocab_size,
        d_embedding=config.d_embedding,
        activation=config.head_activation,
        norm=config.norm_settings if config.head_norm else None,
        use_bias=config.use_bias,
        is_tied=config.tie_head,
        has_bias=config.head_bias,
        scale=config.logit_scale,
    )


def reset_model(model: nn.Module, n_layers: int) -> None:
    """Draw every weight anew, and scale the ``2 n_layers`` branches that join the stream.

    Source: Radford et al. (2019), section 2.3: a branch starts ``1 / sqrt(2 n_layers)`` as large,
        so that the stream's variance does not grow with depth.
    """
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if module is not model and not isinstance(module, nn.Linear | nn.Embedding) and reset:
            reset()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MultiHeadAttention | FeedForward):
                module.out.weight.mul_((2 * n_layers) ** -0.5)
