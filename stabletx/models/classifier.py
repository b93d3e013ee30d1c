"""The classifier: an encoder and a head."""

from __future__ import annotations

from typing import final

from torch import Tensor

from stabletx.functional.losses import cross_entropy
from stabletx.layers.heads import ClassificationHead
from stabletx.models import _model_checks
from stabletx.models._inputs import read_inputs
from stabletx.models._parts import reset_model
from stabletx.models._storage import StoredModel
from stabletx.models.config import TransformerConfig
from stabletx.models.encoder import Encoder
from stabletx.models.outputs import ClassifierOutput
from stabletx.packing import Packed


@final
class SequenceClassifier(StoredModel):
    """Score the classes of each sequence.

    Raises:
        ValueError: if the configuration names neither labels nor a number of classes.

    >>> config = TransformerConfig(100, 32, 2, 4, labels=("ham", "spam"))
    >>> SequenceClassifier(config)(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 2])
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        n_classes = _model_checks.checked_n_classes(config.n_classes)
        self.encoder = Encoder(config, has_pooler=False)
        self.head = ClassificationHead(
            config.d_model,
            n_classes,
            pooling=config.pooling,
            activation=config.head_activation,
            norm=config.norm_settings if config.head_norm else None,
            use_bias=config.use_bias,
            dropout_p=config.dropout_p,
        )

    def reset_parameters(self) -> None:
        """Draw the weights anew, as after ``to_empty``."""
        reset_model(self, self.config.n_layers)

    def forward(
        self,
        input_ids: Tensor | Packed,  # (b, n)
        attention_mask: Tensor | None = None,  # (b, n), bool or 0 and 1; 1 = a real token
        labels: Tensor | None = None,  # (b,)
        *,
        token_type_ids: Tensor | None = None,  # as input_ids
    ) -> ClassifierOutput:
        """Classify.

        Args:
            input_ids: token ids, or a packed batch of them.
            attention_mask: marks the real tokens, as for :class:`Encoder`.
            labels: the right classes; -100 leaves a sequence out of the loss.
            token_type_ids: for a model with types of tokens; None takes type 0 for all.

        Returns:
            ``logits`` (b, c), finite for an empty sequence too; ``loss`` where labels are given.

        Raises:
            TypeError: if ids are not integers.
            ValueError: for a wrong shape or an id outside the vocabulary.
        """
        inputs = read_inputs(input_ids, attention_mask, token_type_ids=token_type_ids)
        tokens = self.encoder.encode(inputs)
        if inputs.plan is not None:
            logits = self.head.of_plan(tokens, inputs.plan)
        else:
            logits = self.head(tokens, keep=inputs.keep)
        loss = None if labels is None else cross_entropy(logits, labels)
        return ClassifierOutput(loss=loss, logits=logits)
