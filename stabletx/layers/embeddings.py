"""From a token id and its place to a vector."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from stabletx import _checks
from stabletx.functional.positions import rotary_tables
from stabletx.layers import _layer_checks


@final
class RotaryEmbedding(nn.Module):
    """Turn positions into the cosines and sines by which queries and keys are rotated.

    It holds no parameter and no buffer: the tables come from the positions, once in a forward
    pass, so no cast, checkpoint or autocast can spoil them, and no length is the last one.

    Args:
        head_dim: even; the size of a head.
        base: the longest wavelength is ``2 pi base`` tokens.

    Raises:
        ValueError: if ``head_dim`` is odd or not positive.

    Numerics: angles in float64, tables in float32, whatever the dtype of the model.
    Source: Su et al. (2021), section 3.4.2.

    >>> cos, sin = RotaryEmbedding(4)(torch.arange(3))
    >>> cos.shape, cos.dtype
    (torch.Size([3, 2]), torch.float32)
    """

    def __init__(self, head_dim: int, *, base: float = 10000.0) -> None:
        super().__init__()
        _checks.check_positive("head_dim", head_dim)
        _layer_checks.check_even("head_dim", head_dim)
        self.head_dim = head_dim
        self.base = base

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Give (cos, sin), each (*positions.shape, head_dim / 2), float32."""
        return rotary_tables(positions, self.head_dim, base=self.base)

    def extra_repr(self) -> str:
        """Say the size."""
        return f"{self.head_dim}, base={self.base}"


@final
class TokenEmbedding(nn.Module):
    """Look up a vector for each token, and one for its position where those are learned.

    Args:
        vocab_size: token ids are below it.
        d_model: size of a vector.
        n_positions: how many positions have a vector of their own; None: none has.
        dropout_p: probability in [0, 1) that an entry is dropped while training.

    Numerics: vectors start as a normal of standard deviation ``d_model ** -0.5``, so that each has
        length 1 and scores against the same table (tied logits) start close to even.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        *,
        n_positions: int | None = None,
        dropout_p: float = 0.0,
    ) -> None:
        super().__init__()
        _checks.check_positive("vocab_size", vocab_size)
        _checks.check_positive("d_model", d_model)
        _checks.check_probability("dropout_p", dropout_p)
        self.dropout_p = dropout_p
        self.tokens = nn.Embedding(vocab_size, d_model)
        self.positions = None if n_positions is None else nn.Embedding(n_positions, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the vectors anew."""
        for table in (self.tokens, self.positions):
            if table is not None:
                nn.init.normal_(table.weight, std=table.embedding_dim**-0.5)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Look up ``ids`` (...) at ``positions``, whose shape broadcasts to theirs.

        Raises:
            ValueError: if an id is outside the vocabulary (on the CPU; elsewhere the device says).
        """
        try:
            x: Tensor = self.tokens(ids)
        except IndexError as error:
            raise _layer_checks.ids_out_of_range(ids, self.tokens.num_embeddings) from error
        if self.positions is not None:
            x = x + self.positions(positions)
        if self.dropout_p > 0 and self.training:
            x = nn.functional.dropout(x, self.dropout_p)
        return x
