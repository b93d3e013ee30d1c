"""Decoding one token at a time: what is remembered, and how the next token is picked."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from stabletx import _checks
from stabletx.functional.softmax import softmax
from stabletx.layers import _layer_checks
from stabletx.layers.cache import KeyValueCache
from stabletx.masks import Mask
from stabletx.models._inputs import count_before
from stabletx.models.config import TransformerConfig


@final
class DecoderCache:
    """What a decoder remembers of a batch: every layer's keys and values, and which are real.

    Args:
        config: of the model.
        batch_size: sequences decoded together.
        capacity: tokens that fit, prompt, padding and context apart.
        context_len: tokens of the context, for an encoder-decoder.
        like: a weight of the model, for dtype and device.
    """

    def __init__(
        self,
        config: TransformerConfig,
        batch_size: int,
        capacity: int,
        *,
        like: Tensor,
        context_len: int = 0,
    ) -> None:
        _layer_checks.check_batch_size(batch_size)
        device = like.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else like.dtype

        def make(n_tokens: int) -> list[KeyValueCache]:
            n_kv_heads = config.n_heads if config.n_kv_heads is None else config.n_kv_heads
            sizes = (batch_size, n_kv_heads, n_tokens, config.head_dim)
            layers = range(config.n_layers_of_decoder)
            return [KeyValueCache(*sizes, dtype=dtype, device=like.device) for _ in layers]

        self.layers = make(capacity)
        self.context = make(context_len) if context_len else []
        self._keep = torch.ones(batch_size, capacity, dtype=torch.bool, device=like.device)
        self._has_padding = False

    @property
    def length(self) -> int:
        """Give the number of tokens that went through all layers, padding included."""
        return self.layers[-1].length

    @property
    def batch_size(self) -> int:
        """Give the number of sequences."""
        return self._keep.shape[0]

    def known(self, end: int) -> Tensor | None:  # (b, end) bool
        """Tell which of the first tokens are real; None where all are."""
        return self._keep[:, :end] if self._has_padding else None

    def place(self, ids: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Mask | None]:
        """Take note of new tokens; give their positions and what they may see.

        Args:
            ids: (b, t), the new tokens.
            keep: (b, t) bool, which of them are real; None: all.

        Returns:
            Positions (b, t), or (t,) where no token so far is padding; those of all keys; the
            mask of all keys.

        Raises:
            ValueError: for another batch size, or more tokens than there is room for.
            RuntimeError: outside of inference mode where the cache was made in it.
        """
        batch_size, capacity = self._keep.shape
        start, end = self.length, self.length + ids.shape[1]
        _checks.check_same("batch size", "input_ids", ids.shape[0], "cache", batch_size)
        _layer_checks.check_cache_has_room(end, capacity)
        _layer_checks.check_may_be_written("cache", self._keep)
        for layer in self.layers:  # a pass that was cut short left tokens in the first ones
            layer.take_back(start)
        self._has_padding = self._has_padding or keep is not None
        known = self.known(end)
        if known is None:
            keys = torch.arange(end, device=ids.device)
            return keys[start:], keys, None
        known[:, start:] = True if keep is None else keep
        keys = count_before(known)
        return keys[:, start:], keys, Mask.padding(known)

    def __repr__(self) -> str:
        return f"DecoderCache({len(self.layers)} layers, {self.layers[0]!r})"


def write_tokens(
    logits: Tensor,  # (b, vocab_size), for the first new token
    advance: Callable[[Tensor], Tensor],  # (b, 1) ids -> (b, vocab_size)
    config: TransformerConfig,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    generator: torch.Generator | None,
) -> Tensor:  # (b, at most max_new_tokens)
    """Pick tokens, by settings that were checked, until every row has ended; then ``pad_id``."""
    ended = torch.zeros(logits.shape[0], dtype=torch.bool, device=logits.device)
    written: list[Tensor] = []
    while True:
        picked = _pick(logits, temperature, top_p, generator)
        picked = torch.where(ended, config.pad_id, picked)
        written.append(picked)
        if config.eos_id is not None:
            ended = ended | (picked == config.eos_id)
        # The one place that waits for a GPU, and only where an end is known.
        if len(written) == max_new_tokens or (config.eos_id is not None and bool(ended.all())):
            return torch.stack(written, dim=1)
        logits = advance(picked[:, None])


def _pick(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> Tensor:  # (b, vocab_size) -> (b,)
    if temperature == 0 or 0 in logits.shape:
        return logits.argmax(-1)
    # From the best score down, and not below a float's least: no quotient is then inf or NaN.
    scores = logits.float()
    below = scores - scores.amax(-1, keepdim=True)
    least = torch.finfo(below.dtype).tiny
    weights, ids = softmax(below / max(temperature, least)).sort(dim=-1, descending=True)
    if top_p < 1:
        # A token stays while those before it have not reached top_p: the first always does.
        top_p = max(top_p, torch.finfo(weights.dtype).tiny)
        weights = torch.where(weights.cumsum(-1) - weights < top_p, weights, 0.0)
    drawn = torch.multinomial(weights, 1, generator=generator)
    return ids.gather(-1, drawn)[:, 0]
