"""What a decoder remembers of earlier tokens."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from stabletx import _checks
from stabletx.functional._one_query import longest_rows
from stabletx.layers import _layer_checks


@final
class KeyValueCache:
    """Keep the keys and values of one attention layer, in memory that is taken once.

    Args:
        batch_size: sequences decoded together.
        n_kv_heads: key/value heads.
        capacity: tokens that fit, prompt and padding included.
        head_dim: size of a head.
        dtype: of keys and values; None takes torch's default.
        device: where; None takes torch's default.

    Raises:
        ValueError: for a size that is not positive.

    >>> cache = KeyValueCache(1, 2, 8, 4)
    >>> k, v = cache.append(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    >>> k.shape, cache
    (torch.Size([1, 2, 3, 4]), KeyValueCache(3 of 8 tokens, batch size 1))
    """

    def __init__(
        self,
        batch_size: int,
        n_kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        _layer_checks.check_batch_size(batch_size)
        for name, size in (("n_kv_heads", n_kv_heads), ("head_dim", head_dim)):
            _checks.check_positive(name, size)
        _checks.check_positive("capacity", capacity)
        shape = (2, batch_size, n_kv_heads, capacity, head_dim)
        # Never read before it is written, so that old memory cannot matter.
        self._both = torch.empty(shape, dtype=dtype, device=device)
        self.length = self._n_seen = 0
        self._longest = (0.0, 0.0)

    @property
    def n_kv_heads(self) -> int:
        """Give the number of key/value heads."""
        return self._both.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """Give the dtype of keys and values."""
        return self._both.dtype

    @property
    def capacity(self) -> int:
        """Give the number of tokens that fit."""
        return self._both.shape[3]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens, and give all so far as views.

        Args:
            k: (b, g, t, d).
            v: (b, g, t, d).

        Returns:
            Keys and values (b, g, length, d); no copy.

        Raises:
            ValueError: if the batch size, heads or device differ, or the cache is full.
            TypeError: if the dtype differs.
            RuntimeError: if they want a gradient, which a cache cannot carry, or outside of
                inference mode where the cache was made in it.
        """
        if not (k.shape == v.shape and self._fits(k) and self._fits(v)):
            self._refuse(k, v)
        if k.requires_grad or v.requires_grad:
            _layer_checks.check_no_gradient("a KeyValueCache")
        end = self.length + k.shape[2]
        _layer_checks.check_cache_has_room(end, self.capacity)
        _layer_checks.check_may_be_written("cache", self._both)
        with torch.no_grad():
            self._both[0, :, :, self.length : end] = k
            self._both[1, :, :, self.length : end] = v
        self.length = end
        return self.read()

    def append_one(self, kv: Tensor) -> tuple[Tensor, Tensor]:  # (b, 2 g, d)
        """Add one token a row, the heads of keys before those of values, where all fits.

        Nothing but the room is checked; see :meth:`append` for the rest.
        """
        _, b, g, capacity, d = self._both.shape
        end = self.length + 1
        _layer_checks.check_cache_has_room(end, capacity)
        self._both.select(3, self.length).copy_(kv.view(b, 2, g, d).transpose(0, 1))
        self.length = end
        return self.read()

    def take_back(self, length: int) -> None:
        """Forget the tokens beyond the first ``length``."""
        self.length = min(self.length, length)
        self._n_seen = min(self._n_seen, self.length)

    def _fits(self, x: Tensor) -> bool:
        kept = self._both
        return (
            x.ndim == 4
            and x.shape[:2] == kept.shape[1:3]
            and x.shape[3] == kept.shape[4]
            and x.dtype == kept.dtype
            and x.device == kept.device
        )

    def _refuse(self, k: Tensor, v: Tensor) -> None:
        _, b, g, _, d = self._both.shape
        for name, x in (("k", k), ("v", v)):
            _checks.check_axes(name, x, "b g t d")
            _checks.check_same("batch size", name, x.shape[0], "cache", b)
            _checks.check_same("number of heads", name, x.shape[1], "cache", g)
            _checks.check_same("head dim", name, x.shape[3], "cache", d)
            _checks.check_same("dtype", name, x.dtype, "cache", self.dtype)
            _checks.check_same("device", name, x.device, "cache", self._both.device)
        _checks.check_same("number of tokens", "v", v.shape[2], "k", k.shape[2])

    def read(self) -> tuple[Tensor, Tensor]:
        """Give the keys and values so far, as views."""
        k, v = self._both.narrow(3, 0, self.length).unbind(0)
        return k, v

    def longest(self) -> tuple[float, float]:
        """Give the largest norm of a key and of a value so far; inf where one is not finite.

        Each token is looked at once, so write to the memory through :meth:`append` alone.
        """
        if self._n_seen < self.length:
            new = self._both[:, :, :, self._n_seen : self.length]
            found = longest_rows(new) if new.numel() else [0.0, 0.0]
            self.measured(*found)
        return self._longest

    def measured(self, longest_key: float, longest_value: float) -> None:
        """Take over the largest norms of all tokens since the last look, instead of looking."""
        self._longest = (max(self._longest[0], longest_key), max(self._longest[1], longest_value))
        self._n_seen = self.length

    def reset(self) -> None:
        """Forget everything; the memory is kept."""
        self.length = self._n_seen = 0
        self._longest = (0.0, 0.0)

    def __repr__(self) -> str:
        held = f"{self.length} of {self.capacity} tokens"
        return f"KeyValueCache({held}, batch size {self._both.shape[1]})"
