"""The encoder: every token sees every token of its sequence."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from stabletx.layers.blocks import EncoderBlock
from stabletx.models._inputs import Inputs, read_inputs
from stabletx.models._parts import Stem, last_norm, reset_model
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

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.stem = Stem(config)
        self.blocks = nn.ModuleList(
            EncoderBlock(
                config.d_model,
                config.n_heads,
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
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, as after ``to_empty``."""
        reset_model(self, self.config.n_layers)

    def forward(
        self,
        input_ids: Tensor | Packed,  # (b, n)
        attention_mask: Tensor | None = None,  # (b, n), bool or 0 and 1; 1 = a real token
    ) -> EncoderOutput:
        """Encode.

        Args:
            input_ids: token ids, or a packed batch of them.
            attention_mask: marks the real tokens; padding may lie anywhere. On a GPU, keep it on
                the CPU: only there can it be read without waiting, and padding be left out.

        Returns:
            ``last_hidden_state`` (b, n, m), exactly 0 at padding; (n_tokens, m) if packed.

        Raises:
            TypeError: if ids are not integers.
            ValueError: for a wrong shape, an id outside the vocabulary, or too many tokens.
        """
        inputs = read_inputs(input_ids, attention_mask)
        return EncoderOutput(last_hidden_state=inputs.restore(self.encode(inputs)))

    def encode(self, inputs: Inputs) -> Tensor:  # (*inputs.ids.shape, m)
        """Encode without leaving the layout of ``inputs``."""
        self.stem.check_length(inputs.width)
        x, rotation = self.stem(inputs.ids, inputs.positions)
        mask = inputs.mask
        for block in self.blocks:
            x = block(x, mask=mask, rotation=rotation, plan=inputs.plan)
        out: Tensor = x if self.norm is None else self.norm(x)
        return out
