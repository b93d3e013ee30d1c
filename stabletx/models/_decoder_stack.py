"""The blocks of a decoder, alone or over a context, and what both do with labels."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from stabletx.functional.losses import cross_entropy
from stabletx.masks import Mask
from stabletx.models._generation import DecoderCache
from stabletx.models._inputs import Inputs
from stabletx.models._parts import Places, Stem, decoder_blocks, language_head, last_norm
from stabletx.models.config import TransformerConfig

IGNORED = -100  # a label that leaves its token out of the loss


@final
class DecoderStack(nn.Module):
    """Embed tokens, run them through causal blocks and score the next token.

    The scores are products with the embeddings themselves (tied logits) unless the configuration
    says otherwise.
    """

    def __init__(self, config: TransformerConfig, *, has_context: bool) -> None:
        super().__init__()
        self.n_layers, self.is_windowed = config.n_layers_of_decoder, config.is_windowed
        self.stem = Stem(config)
        self.places = Places(config, is_causal=True)
        self.blocks = decoder_blocks(config, has_context=has_context)
        self.norm = last_norm(config)
        self.head = language_head(config)

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
        positions, keys, mask = inputs.positions, None, inputs.mask
        if cache is not None:
            positions, keys, mask = cache.place(inputs.ids, inputs.keep)
        x = self.stem(inputs.ids, positions)
        whole, near = self.places(positions, keys=keys, mask=mask, plan=inputs.plan)
        for i in range(self.n_layers):
            view = near if self.is_windowed(i) else whole
            x = self.block(i)(
                x,
                **view._asdict(),
                cache=None if cache is None else cache.layers[i],
                plan=inputs.plan,
                context=context,
                context_mask=context_mask,
                context_cache=None if cache is None or context is None else cache.context[i],
            )
        out: Tensor = x if self.norm is None else self.norm(x)
        return out

    def block(self, layer: int) -> nn.Module:
        """Give the block of a layer, which several may share."""
        return self.blocks[layer * len(self.blocks) // self.n_layers]

    def scores(self, x: Tensor) -> Tensor:  # (..., m) -> (..., vocab_size)
        """Score the next token."""
        scores: Tensor = self.head(x, self.stem.embedding.tokens.weight)
        return scores

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
