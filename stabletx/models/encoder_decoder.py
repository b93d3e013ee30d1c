"""The encoder-decoder: reads one sequence and writes another."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from stabletx import _checks
from stabletx.models import _model_checks
from stabletx.models._decoder_stack import IGNORED, DecoderStack
from stabletx.models._generation import DecoderCache, write_tokens
from stabletx.models._inputs import Inputs, as_index, read_inputs
from stabletx.models._parts import reset_model
from stabletx.models._storage import StoredModel
from stabletx.models.config import TransformerConfig
from stabletx.models.encoder import Encoder
from stabletx.models.outputs import DecoderOutput


@final
class EncoderDecoder(StoredModel):
    """Score the next token of a target, given a source; write targets.

    Raises:
        ValueError: if the configuration names no ``bos_id``, which begins every target.

    >>> config = TransformerConfig(100, 32, 2, 4, bos_id=1, eos_id=2)
    >>> EncoderDecoder(config).generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4).shape[0]
    1
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.bos_id = _model_checks.check_has_bos(config.bos_id)
        self.encoder = Encoder(config, has_pooler=False)
        self.stack = DecoderStack(config, has_context=True)
        if config.share_embeddings:
            self.stack.stem.embedding.tokens = self.encoder.stem.embedding.tokens
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, as after ``to_empty``."""
        reset_model(self, self.config.n_layers)

    def forward(
        self,
        input_ids: Tensor,  # (b, s)
        attention_mask: Tensor | None = None,  # (b, s), bool or 0 and 1; 1 = a real token
        labels: Tensor | None = None,  # (b, t)
        decoder_input_ids: Tensor | None = None,  # (b, t)
    ) -> DecoderOutput:
        """Score each token of a target.

        Args:
            input_ids: the source.
            attention_mask: marks the real tokens of the source.
            labels: the target, without ``bos_id``; -100 fills its end and is left out of the loss.
            decoder_input_ids: what the decoder reads; None takes ``bos_id`` and then the labels,
                but the last.

        Returns:
            ``logits`` (b, t, vocab_size); ``loss`` where labels are given.

        Raises:
            ValueError: if neither labels nor decoder ids are given, or for a wrong shape.
        """
        context, source = self._read(input_ids, attention_mask)
        if decoder_input_ids is None:
            decoder_input_ids = self._shifted(_model_checks.given("labels", labels))
        _checks.check_same_batch("decoder_input_ids", decoder_input_ids, "input_ids", input_ids)
        inputs = read_inputs(decoder_input_ids, None)
        x = self.stack(inputs, context=context, context_mask=source.key_mask)
        logits = self.stack.scores(x)
        loss = None
        if labels is not None:
            shapes = (tuple(labels.shape), tuple(decoder_input_ids.shape))
            _checks.check_same("shape", "labels", shapes[0], "decoder_input_ids", shapes[1])
            loss = self.stack.loss(logits, labels)
        return DecoderOutput(loss=loss, logits=logits)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,  # (b, s)
        attention_mask: Tensor | None = None,  # (b, s), bool or 0 and 1; 1 = a real token
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # (b, at most max_new_tokens)
        """Write a target for each source; the arguments are those of :meth:`Decoder.generate`.

        Returns:
            The target without ``bos_id``; ``config.pad_id`` after ``config.eos_id``.

        Raises:
            ValueError: for an empty source, a wrong shape or setting.
        """
        _model_checks.check_sampling(max_new_tokens, temperature, top_p, generator)
        context, source = self._read(input_ids, attention_mask)
        b, s = input_ids.shape
        _checks.check_positive("input_ids.shape[1]", s)
        weight = self.stack.stem.embedding.tokens.weight
        cache = DecoderCache(self.config, b, max_new_tokens, like=weight, context_len=s)

        def advance(ids: Tensor) -> Tensor:
            x = self.stack(
                read_inputs(ids, None), cache=cache, context=context, context_mask=source.key_mask
            )
            return self.stack.last_scores(x, None)

        first = torch.full((b, 1), self.bos_id, device=input_ids.device)
        return write_tokens(
            advance(first), advance, self.config,
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
            generator=generator,
        )  # fmt: skip

    def _read(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Inputs]:
        _checks.check_axes("input_ids", input_ids, "b s")
        source = read_inputs(input_ids, attention_mask)
        return source.restore(self.encoder.encode(source)), source

    def _shifted(self, labels: Tensor) -> Tensor:  # (b, t) -> (b, t)
        _checks.check_integers("labels", labels)
        _checks.check_axes("labels", labels, "b t")
        begun = torch.nn.functional.pad(as_index(labels), (1, 0), value=self.bos_id)
        begun = begun[:, : labels.shape[1]]
        return torch.where(begun == IGNORED, self.config.pad_id, begun)
