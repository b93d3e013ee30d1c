"""Kernels without their guards, and what tells afterwards whether a guard was needed."""

from __future__ import annotations

from itertools import starmap
from typing import NamedTuple, final

import torch
from torch import Tensor

from stabletx.functional._one_query import attend_unguarded, finite_or_inf, is_safe
from stabletx.functional.normalization import LARGEST_LENGTH, are_ordinary
from stabletx.layers.cache import KeyValueCache
from stabletx.layers.normalization import LayerNorm, RMSNorm


class Norm(NamedTuple):
    """What a norm holds, read once: a module is slow to ask."""

    is_rms: bool
    weight: Tensor
    bias: Tensor | None
    eps: float

    @staticmethod
    def of(norm: LayerNorm | RMSNorm | None) -> Norm | None:
        """Read a norm, if there is one."""
        if norm is None:
            return None
        bias = None if isinstance(norm, RMSNorm) else norm.bias
        return Norm(isinstance(norm, RMSNorm), norm.weight, bias, norm.eps)


@final
class Watched:
    """Takes the kernels of one step, and keeps a few numbers of what they were given."""

    def __init__(self) -> None:
        self._moments: list[Tensor] = []  # mean and 1 / deviation of each layer norm, (n, 1) each
        self._eps = 0.0
        self._lengths: list[Tensor] = []  # of what root mean squares were taken of
        self._heads: list[Tensor] = []  # each (b, h + 2 g, d)
        self._kept: list[tuple[KeyValueCache, float]] = []

    def norm(self, norm: Norm | None, x: Tensor) -> Tensor:  # (n, ..., m)
        """Normalize rows, where there is a norm."""
        if norm is None:
            return x
        if norm.is_rms:
            self._lengths.append(torch.linalg.vector_norm(x, dim=-1).flatten())
            return torch.nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)
        out, *moments = torch.native_layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
        self._moments += moments
        self._eps = max(self._eps, norm.eps)
        return out

    def attend(
        self,
        heads: Tensor,  # (b, h + 2 g, d): queries, keys and values of one token a row
        kept: KeyValueCache,
        *,
        window: int | None,
        added: Tensor | None,  # (b, 1, 1, s), to the scores
        scale: float,
    ) -> Tensor:  # (b, h * d)
        """Remember the keys and values, and attend to all that are remembered."""
        self._heads.append(heads)
        self._kept.append((kept, scale))
        b, n, _ = heads.shape
        n_heads = n - 2 * kept.n_kv_heads
        k, v = kept.append_one(heads[:, n_heads:])
        if window is not None:
            k, v = k[:, :, -1 - window :], v[:, :, -1 - window :]
        if added is not None:
            added = added.expand(b, n_heads, 1, -1)
        q = heads[:, :n_heads, None]
        return attend_unguarded(q, k, v, added=added, scale=scale).reshape(b, -1)

    def needed_no_guard(self) -> bool:
        """Tell whether every kernel was given what it is right for; false for NaN."""
        if self._lengths and not bool((torch.cat(self._lengths) <= LARGEST_LENGTH).all()):
            return False
        b = self._heads[0].shape[0]  # the rows after these are the same again
        if self._moments and not are_ordinary(torch.stack(self._moments)[:, :b], self._eps):
            return False
        lengths = torch.linalg.vector_norm(torch.stack(self._heads), dim=-1)
        longest = lengths.amax(1).tolist()  # a row of heads for each layer
        return all(starmap(_is_safe, zip(self._kept, longest, strict=True)))


def _is_safe(read: tuple[KeyValueCache, float], lengths: list[float]) -> bool:
    kept, scale = read
    g = kept.n_kv_heads
    query, key, value = (
        max(map(finite_or_inf, part))
        for part in (lengths[: -2 * g], lengths[-2 * g : -g], lengths[-g:])
    )
    kept.measured(key, value)
    return is_safe(query, *kept.longest(), scale)
