"""The decoder: every token sees itself and the tokens before it."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from stabletx import _checks
from stabletx.models import _model_checks
from stabletx.models._decoder_stack import DecoderStack, next_labels
from stabletx.models._generation import DecoderCache, write_tokens
from stabletx.models._inputs import Inputs, as_index, read_inputs
from stabletx.models._one_token import OneToken
from stabletx.models._parts import reset_model
from stabletx.models._storage import StoredModel
from stabletx.models.config import TransformerConfig
from stabletx.models.outputs import DecoderOutput
from stabletx.packing import Packed


@final
class Decoder(StoredModel):
    """Score the next token at every token, and write new ones.

    >>> config = TransformerConfig(vocab_size=100, d_model=32, n_layers=2, n_heads=4)
    >>> Decoder(config).generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5).shape
    torch.Size([1, 5])
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.stack = DecoderStack(config, has_context=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, as after ``to_empty``."""
        reset_model(self, self.config.n_layers)

    def new_cache(self, batch_size: int, capacity: int) -> DecoderCache:
        """Make room for ``capacity`` tokens of ``batch_size`` sequences."""
        weight = self.stack.stem.embedding.tokens.weight
        return DecoderCache(self.config, batch_size, capacity, like=weight)

    def forward(
        self,
        input_ids: Tensor | Packed,  # (b, n)
        attention_mask: Tensor | None = None,  # (b, n), bool or 0 and 1; 1 = a real token
        labels: Tensor | None = None,  # (b, n)
        cache: DecoderCache | None = None,
    ) -> DecoderOutput:
        """Score the next token at every token.

        Args:
            input_ids: token ids, or a packed batch of them.
            attention_mask: marks the real tokens; padding may lie anywhere.
            labels: usually the ids themselves: each real token is asked for the label of the next
                real token. -100 is left out of the loss.
            cache: from :meth:`new_cache`; ids and mask are then those of the new tokens alone.

        Returns:
            ``logits`` (b, n, vocab_size), 0 at padding; ``loss`` where labels are given.

        Raises:
            TypeError: if ids are not integers.
            ValueError: for a wrong shape, an id outside the vocabulary, a full cache or one of
                another model.
        """
        inputs = read_inputs(input_ids, attention_mask, may_pack=cache is None)
        if cache is not None:
            _model_checks.check_kind("cache", cache, DecoderCache)
            n_layers = self.stack.n_layers
            _checks.check_same("number of layers", "cache", len(cache.layers), "model", n_layers)
            _checks.check_all_none({"packed ids": inputs.plan}, "cache", "Pass padded ids.")
        logits = self.stack.scores(self.stack(inputs, cache=cache))
        loss = None
        if labels is not None:
            targets = _targets(labels, input_ids, inputs)
            loss = self.stack.loss(logits, targets)
        return DecoderOutput(loss=loss, logits=inputs.restore(logits))

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,  # (b, n)
        attention_mask: Tensor | None = None,  # (b, n), bool or 0 and 1; 1 = a real token
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # (b, at most max_new_tokens)
        """Write on after each prompt.

        Args:
            input_ids: prompts; padding may lie anywhere.
            attention_mask: marks their real tokens.
            max_new_tokens: tokens.
            temperature: 0 takes the best token; else the scores are divided by it and one is
                drawn.
            top_p: probability in (0, 1]; draw from the fewest best tokens that reach it.
            generator: makes the draw repeatable.

        Returns:
            The new tokens alone; ``config.pad_id`` after ``config.eos_id``.

        Raises:
            ValueError: for an empty prompt, a wrong shape or setting.
        """
        _model_checks.check_sampling(max_new_tokens, temperature, top_p, generator)
        _checks.check_axes("input_ids", input_ids, "b n", "Add a batch axis: input_ids[None].")
        inputs = read_inputs(input_ids, attention_mask, may_pack=False)
        b, n = inputs.ids.shape
        _checks.check_positive("input_ids.shape[1]", n)
        cache = self.new_cache(b, n + max_new_tokens)
        logits = self.stack.last_scores(self.stack(inputs, cache=cache), inputs.keep)

        one_token = OneToken.of(self.stack, cache)

        def advance(ids: Tensor) -> Tensor:
            nonlocal one_token
            scores = None if one_token is None else one_token(ids)
            if scores is None:
                one_token = None  # whatever asked for a guard is likely to ask again
                scores = self.stack.last_scores(
                    self.stack(read_inputs(ids, None), cache=cache), None
                )
            return scores

        return write_tokens(
            logits, advance, self.config,
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
            generator=generator,
        )  # fmt: skip


def _targets(labels: Tensor, input_ids: Tensor | Packed, inputs: Inputs) -> Tensor:
    """Bring the label of the next token to each token, in the layout of ``inputs``."""
    ids = input_ids.tokens if isinstance(input_ids, Packed) else input_ids
    _checks.check_integers("labels", labels)
    _checks.check_same("shape", "labels", tuple(labels.shape), "input_ids", tuple(ids.shape))
    labels = as_index(labels)
    if not isinstance(input_ids, Packed):
        targets = next_labels(labels, inputs.keep)
        return targets if inputs.plan is None else inputs.plan.pack(targets)
    assert inputs.plan is not None
    following = torch.nn.functional.pad(inputs.plan.pack(labels)[1:], (0, 1), value=-100)
    is_last = torch.nn.functional.pad(inputs.plan.positions[1:] == 0, (0, 1), value=True)
    return torch.where(is_last, -100, following)[: labels.shape[0]]
