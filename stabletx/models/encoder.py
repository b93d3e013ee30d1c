"""The encoder: every token sees every token of its sequence."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from stabletx.layers._from_torch import fill
from stabletx.layers.heads import Pooler
from stabletx.models._from_torch import read_encoder
from stabletx.models._inputs import Inputs, read_inputs
from stabletx.models._parts import Places, Stem, encoder_blocks, last_norm, reset_model
from stabletx.models._storage import StoredModel
from stabletx.models.config import TransformerConfig
from stabletx.models.outputs import EncoderOutput
from stabletx.packing import Packed


@final
class Encoder(StoredModel):
    """Turn token ids into vectors that know their sequence.

    A ragged batch runs without its padding where that saves work, with the same result.

    >>> config = TransformerConfig(vocab_size=100, d_model=32, n_layers=2, n_heads=4)
    >>> Encoder(config)(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
    torch.Size([1, 3, 32])
    """

    # A model that makes another use of the tokens builds its encoder without the pooler.
    def __init__(self, config: TransformerConfig, *, has_pooler: bool = True) -> None:
        super().__init__(config)
        self.stem = Stem(config)
        self.places = Places(config)
        self.blocks = encoder_blocks(config)
        self.norm = last_norm(config)
        self.pooler = Pooler(config.d_model) if config.has_pooler and has_pooler else None
        self.reset_parameters()

    @classmethod
    def from_torch(
        cls,
        encoder: nn.TransformerEncoder,
        *,
        embedding: nn.Embedding,
        positions: Tensor | None = None,  # (n, m)
        embedding_scale: float = 1.0,
    ) -> Encoder:
        """Convert torch's encoder, which takes vectors, with the tables that made them from ids.

        Args:
            encoder: its layers, and its last norm where ``norm_first`` is True.
            embedding: a vector for each token.
            positions: a vector for each position, learned or waves; None adds none.
            embedding_scale: factor on the tokens' vectors, such as ``d_model ** 0.5``.

        Returns:
            An encoder with copies of all weights. Training differs in one place: the dropout
            within torch's feed-forward part is left out.

        Raises:
            TypeError: for another kind of module.
            ValueError: for layers that differ, or that have no counterpart here. Convert those
                that have with :meth:`EncoderBlock.from_torch`.

        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        >>> ours = Encoder.from_torch(stack, embedding=nn.Embedding(10, 8))
        >>> ours(torch.tensor([[1, 2]])).last_hidden_state.shape
        torch.Size([1, 2, 8])
        """
        config, weights = read_encoder(encoder, embedding, positions, embedding_scale)
        return fill(cls(config), weights, encoder)

    def reset_parameters(self) -> None:
        """Draw the weights anew, as after ``to_empty``."""
        reset_model(self, self.config.n_layers)

    def forward(
        self,
        input_ids: Tensor | Packed,  # (b, n)
        attention_mask: Tensor | None = None,  # (b, n), bool or 0 and 1; 1 = a real token
        *,
        token_type_ids: Tensor | None = None,  # as input_ids
    ) -> EncoderOutput:
        """Encode.

        Args:
            input_ids: token ids, or a packed batch of them.
            attention_mask: marks the real tokens; padding may lie anywhere. On a GPU, keep it on
                the CPU: only there can it be read without waiting, and padding be left out.
            token_type_ids: for a model with types of tokens; None takes type 0 for all.

        Returns:
            ``last_hidden_state`` (b, n, m), exactly 0 at padding; (n_tokens, m) if packed.
            ``pooler_output`` (b, m) where the configuration has a pooler.

        Raises:
            TypeError: if ids are not integers.
            ValueError: for a wrong shape, an id outside the vocabulary, or too many tokens.
        """
        inputs = read_inputs(input_ids, attention_mask, token_type_ids=token_type_ids)
        x = self.encode(inputs)
        pooled = None
        if self.pooler is not None and inputs.plan is not None:
            pooled = self.pooler.of_plan(x, inputs.plan)
        elif self.pooler is not None:
            pooled = self.pooler(x, keep=inputs.keep)
        return EncoderOutput(last_hidden_state=inputs.restore(x), pooler_output=pooled)

    def encode(self, inputs: Inputs) -> Tensor:  # (*inputs.ids.shape, m)
        """Encode without leaving the layout of ``inputs``."""
        config = self.config
        self.stem.check_length(inputs.width)
        x: Tensor = self.stem(inputs.ids, inputs.positions, inputs.token_types)
        whole, near = self.places(inputs.positions, mask=inputs.mask, plan=inputs.plan)
        for i in range(config.n_layers):
            view = near if config.is_windowed(i) else whole
            block = self.blocks[i * len(self.blocks) // config.n_layers]
            x = block(x, **view._asdict(), plan=inputs.plan)
        return x if self.norm is None else self.norm(x)
