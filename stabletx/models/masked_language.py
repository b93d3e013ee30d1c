"""The masked language model: an encoder that scores the vocabulary at every token."""

from __future__ import annotations

from typing import final

from torch import Tensor

from stabletx import _checks
from stabletx.functional.losses import cross_entropy
from stabletx.models._inputs import as_index, read_inputs
from stabletx.models._parts import language_head, reset_model
from stabletx.models._storage import StoredModel
from stabletx.models.config import TransformerConfig
from stabletx.models.encoder import Encoder
from stabletx.models.outputs import MaskedLanguageOutput
from stabletx.packing import Packed


@final
class MaskedLanguageModel(StoredModel):
    """Say which token belongs at each place.

    >>> config = TransformerConfig(vocab_size=100, d_model=32, n_layers=2, n_heads=4)
    >>> MaskedLanguageModel(config)(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 100])
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config, has_pooler=False)
        self.head = language_head(config)

    def reset_parameters(self) -> None:
        """Draw the weights anew, as after ``to_empty``."""
        reset_model(self, self.config.n_layers)

    def forward(
        self,
        input_ids: Tensor | Packed,  # (b, n)
        attention_mask: Tensor | None = None,  # (b, n), bool or 0 and 1; 1 = a real token
        labels: Tensor | None = None,  # (b, n)
        *,
        token_type_ids: Tensor | None = None,  # as input_ids
    ) -> MaskedLanguageOutput:
        """Score the vocabulary at every token.

        Args:
            input_ids: token ids, or a packed batch of them.
            attention_mask: marks the real tokens, as for :class:`Encoder`.
            labels: the right token of each place; -100, and padding, are left out of the loss.
            token_type_ids: for a model with types of tokens; None takes type 0 for all.

        Returns:
            ``logits`` (b, n, vocab_size), 0 at padding; ``loss`` where labels are given.

        Raises:
            TypeError: if ids are not integers.
            ValueError: for a wrong shape or an id outside the vocabulary.
        """
        inputs = read_inputs(input_ids, attention_mask, token_type_ids=token_type_ids)
        tokens = self.encoder.encode(inputs)
        logits = self.head(tokens, self.encoder.stem.embedding.tokens.weight)
        loss = None
        if labels is not None:
            ids = input_ids.tokens if isinstance(input_ids, Packed) else input_ids
            _checks.check_integers("labels", labels)
            shapes = (tuple(labels.shape), tuple(ids.shape))
            _checks.check_same("shape", "labels", shapes[0], "input_ids", shapes[1])
            loss = cross_entropy(logits, inputs.arrange(as_index(labels), fill=-100))
        return MaskedLanguageOutput(loss=loss, logits=inputs.restore(logits))
