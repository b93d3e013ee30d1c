"""The blocks of a decoder, alone or over a context, and what both do with labels."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from stabletx.functional.losses import cross_entropy
from stabletx.layers.blocks import DecoderBlock
from stabletx.masks import Mask
from stabletx.models._generation import DecoderCache
from stabletx.models._inputs import Inputs
from stabletx.models._parts import Stem, last_norm
from stabletx.models.config import TransformerConfig

IGNORED = -100  # a label that leaves its token out of the loss


@final
class DecoderStack(nn.Module):
    """Embed tokens, run them through causal blocks and score the next token.

    The scores are products with the embeddings themselves (tied logits).
    """

    def __init__(self, config: TransformerConfig, *, has_context: bool) -> None:
        super().__init__()
        self.stem = Stem(config)
        self.blocks = nn.ModuleList(
            DecoderBlock(
                config.d_model,
                config.n_heads,
                has_context=has_context,
                n_kv_heads=config.n_kv_heads,
                d_ff=config.d_ff,
                norm_position=config.norm_position,
                norm=config.norm,
                activation=config.activation,
                qk_norm=config.qk_norm,
                use_bias=config.use_bias,
                dropout_p=config.dropout_p,
                attention_dropout_p=config.attention_dropout_p,
            )
            for _ in range(config.n_layers)
        )
        self.norm = last_norm(config)

    def forward(
        self,
        inputs: Inputs,
        *,
        cache: DecoderCache | None = None,
        context: Tensor | None = None,
        context_mask: Mask | None = None,
    ) -> Tensor:  # (*inputs.ids.shape, m)
        """Run the blocks; with a cache, after the tokens that it remembers."""
        self.stem.check_length(inputs.width + (0 if cache is None else cache.length))
        positions, mask = inputs.positions, inputs.mask
        if cache is not None:
            positions, mask = cache.place(inputs.ids, inputs.keep)
        x, rotation = self.stem(inputs.ids, positions)
        for i, block in enumerate(self.blocks):
            x = block(
                x,
                mask=mask,
                rotation=rotation,
                cache=None if cache is None else cache.layers[i],
                plan=inputs.plan,
                context=context,
                context_mask=context_mask,
                context_cache=None if cache is None or context is None else cache.context[i],
            )
        out: Tensor = x if self.norm is None else self.norm(x)
        return out

    def scores(self, x: Tensor) -> Tensor:  # (..., m) -> (..., vocab_size)
        """Score the next token."""
        return nn.functional.linear(x, self.stem.embedding.tokens.weight)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Give the mean cross-entropy over the targets that count; shapes (..., v) and (...)."""
        return cross_entropy(logits, targets)

    def last_scores(self, x: Tensor, keep: Tensor | None) -> Tensor:  # (b, t, m) -> (b, v)
        """Score the token that follows the last real one of each row."""
        if keep is None:
            return self.scores(x[:, -1])
        last = keep.shape[1] - 1 - keep.flip(1).to(torch.uint8).argmax(1)
        return self.scores(x.take_along_dim(last[:, None, None], dim=1)[:, 0])


def next_labels(labels: Tensor, keep: Tensor | None) -> Tensor:  # (b, n) -> (b, n)
    """Give each real token the label of the next real token of its row, if there is one."""
    n = labels.shape[1]
    if keep is None:
        return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)[:, :n]
    slots = torch.arange(n, device=labels.device).expand(labels.shape)
    # The first real slot at or after each slot, then the one strictly after it; n: none.
    at = torch.where(keep, slots, n).flip(1).cummin(1).values.flip(1) if n else slots
    after = torch.nn.functional.pad(at[:, 1:], (0, 1), value=n)[:, :n]
    padded = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)
    return torch.where(keep, padded.gather(1, after), IGNORED)
