"""From a token id and its place to a vector."""

from __future__ import annotations

import math
from typing import final

import torch
from einops import rearrange
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
    """Look up a vector for each token, and add those of its position and its type.

    Args:
        vocab_size: token ids are below it.
        d_model: size of a vector.
        n_positions: how many positions have a vector of their own; None: none has.
        n_types: how many types of token have a vector; 0: none has.
        is_sinusoidal: add fixed waves for the position, sines in the first half of the vector.
        scale: factor on the tokens' vectors.
        dropout_p: probability in [0, 1) that an entry is dropped while training.

    Raises:
        ValueError: for a size that is not positive, or an odd one with waves.

    Numerics: vectors start as a normal of standard deviation ``d_model ** -0.5``, so that each has
        length 1 and scores against the same table (tied logits) start close to even. The phases
        of waves are float64.
    Source: Vaswani et al. (2017), section 3.5, for the waves.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        *,
        n_positions: int | None = None,
        n_types: int = 0,
        is_sinusoidal: bool = False,
        scale: float = 1.0,
        dropout_p: float = 0.0,
    ) -> None:
        super().__init__()
        _checks.check_positive("vocab_size", vocab_size)
        _checks.check_positive("d_model", d_model)
        _checks.check_probability("dropout_p", dropout_p)
        if is_sinusoidal:
            _layer_checks.check_even("d_model", d_model)
        self.is_sinusoidal, self.scale, self.dropout_p = is_sinusoidal, scale, dropout_p
        self.tokens = nn.Embedding(vocab_size, d_model)
        self.positions = None if n_positions is None else nn.Embedding(n_positions, d_model)
        self.types = nn.Embedding(n_types, d_model) if n_types else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the vectors anew."""
        for table in (self.tokens, self.positions, self.types):
            if table is not None:
                nn.init.normal_(table.weight, std=table.embedding_dim**-0.5)

    def forward(self, ids: Tensor, positions: Tensor, types: Tensor | None = None) -> Tensor:
        """Look up ``ids`` (...) at ``positions``, whose shape broadcasts to theirs.

        Args:
            ids: token ids.
            positions: of each token.
            types: the type of each token, in the shape of ``ids``; None takes type 0 for all.

        Raises:
            ValueError: if an id is outside the vocabulary (on the CPU; elsewhere the device says),
                or types are given where none has a vector.
        """
        x = _layer_checks.looked_up("input_ids", ids, self.tokens)
        if self.scale != 1.0:
            x = x * self.scale
        if self.types is not None:
            x = x + (
                self.types.weight[0]
                if types is None
                else _layer_checks.looked_up("token_type_ids", types, self.types)
            )
        elif types is not None:
            _layer_checks.refuse_types()
        if self.positions is not None:
            x = x + self.positions(positions)
        if self.is_sinusoidal:
            cos, sin = rotary_tables(positions, self.tokens.embedding_dim)
            x = x + torch.cat([sin, cos], dim=-1).to(x.dtype)
        if self.dropout_p > 0 and self.training:
            x = nn.functional.dropout(x, self.dropout_p)
        return x


@final
class RelativeBias(nn.Module):
    """Add to each score what the distance between the two tokens is worth, head by head.

    Near distances have a bucket each; farther ones share buckets that widen by a constant factor.

    Args:
        n_heads: query heads.
        n_buckets: learned values per head; where a token sees both sides, half for each.
        max_distance: tokens; from here on all distances share the last bucket.
        is_causal: count only distances to earlier tokens.

    Raises:
        ValueError: for a size that is not positive.

    Numerics: starts at 0. The buckets' edges are taken in float32, as trained weights expect.
    Source: Raffel et al. (2020), section 2.1.

    >>> RelativeBias(4)(torch.arange(3), torch.arange(5)).shape
    torch.Size([1, 4, 3, 5])
    """

    def __init__(
        self,
        n_heads: int,
        *,
        n_buckets: int = 32,
        max_distance: int = 128,
        is_causal: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"n_heads": n_heads, "n_buckets": n_buckets, "max_distance": max_distance}
        for name, size in sizes.items():
            _checks.check_positive(name, size)
        self.n_buckets = n_buckets if is_causal else n_buckets // 2
        _layer_checks.check_buckets(n_buckets, self.n_buckets, max_distance)
        self.max_distance, self.is_causal = max_distance, is_causal
        self.table = nn.Embedding(n_buckets, n_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with no preference."""
        nn.init.zeros_(self.table.weight)

    def forward(
        self,
        queries: Tensor,  # (t,) or (b, t)
        keys: Tensor,  # (s,) or (b, s)
    ) -> Tensor:  # (b|1, h, t, s)
        """Give the bias of queries at some positions for keys at others."""
        bias: Tensor = self.table(self._buckets(keys[..., None, :] - queries[..., :, None]))
        return rearrange(bias if bias.ndim == 4 else bias[None], "b t s h -> b h t s")

    def _buckets(self, ahead: Tensor) -> Tensor:  # integers, key minus query
        far = (-ahead).clamp(min=0) if self.is_causal else ahead.abs()
        n_exact = self.n_buckets // 2
        ratio = torch.log(far.clamp(min=1).float() / n_exact) / math.log(
            self.max_distance / n_exact
        )
        wide = n_exact + (ratio * (self.n_buckets - n_exact)).long()
        bucket = torch.where(far < n_exact, far, wide.clamp(max=self.n_buckets - 1))
        return bucket if self.is_causal else bucket + (ahead > 0) * self.n_buckets

    def extra_repr(self) -> str:
        """Say the farthest distance."""
        return f"max_distance={self.max_distance}"
