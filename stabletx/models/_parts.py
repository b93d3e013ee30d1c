"""What all models share: how a token enters, the last norm, and how weights start."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from stabletx.layers.attention import MultiHeadAttention, Rotation
from stabletx.layers.embeddings import RotaryEmbedding, TokenEmbedding
from stabletx.layers.feed_forward import FeedForward
from stabletx.layers.normalization import LayerNorm, RMSNorm, make_norm
from stabletx.models import _model_checks
from stabletx.models.config import TransformerConfig


@final
class Stem(nn.Module):
    """Embed tokens, and make the rotary tables for their positions."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        n_positions = config.max_seq_len if config.position == "learned" else None
        self.max_seq_len = n_positions
        self.embedding = TokenEmbedding(
            config.vocab_size, config.d_model, n_positions=n_positions, dropout_p=config.dropout_p
        )
        head_dim, base = config.d_model // config.n_heads, config.rotary_base
        is_rotary = config.position == "rotary"
        self.rotary = RotaryEmbedding(head_dim, base=base) if is_rotary else None
        self.norm = (
            None if config.norm_position == "pre" else make_norm(config.norm, config.d_model)
        )

    def forward(
        self, ids: Tensor, positions: Tensor
    ) -> tuple[Tensor, Rotation | None]:  # (..., m), tables
        """Embed ``ids`` (...) that stand at ``positions``."""
        x = self.embedding(ids, positions)
        rotation = None if self.rotary is None else self.rotary(positions)
        return x if self.norm is None else self.norm(x), rotation

    def check_length(self, n_tokens: int) -> None:
        """Refuse more tokens than there are learned positions."""
        if self.max_seq_len is not None:
            _model_checks.check_seq_len(n_tokens, self.max_seq_len)


def last_norm(config: TransformerConfig) -> LayerNorm | RMSNorm | None:
    """Build the norm after the last block; a post-norm block ends with its own."""
    if config.norm_position == "post":
        return None
    return make_norm(config.norm, config.d_model)


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
