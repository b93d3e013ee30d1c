"""Masks as values: which query may attend to which key. True = may attend, everywhere.

A :class:`Mask` is a small immutable tree of rules. It is never a bare tensor inside the library,
so that its meaning cannot be mistaken and its structure (a band, a padding) stays visible to the
code that wants to do less work. ``_mask_rules.py`` holds the rules.
"""

from __future__ import annotations

from typing import final

import torch
from einops import rearrange
from torch import Tensor

from stabletx import _checks
from stabletx._mask_rules import (
    And,
    Band,
    Causal,
    Dense,
    Lengths,
    Not,
    Or,
    Padding,
    Rule,
    Segments,
    Window,
)


@final
class Mask:
    """Say which queries may attend to which keys; True = may attend.

    Build one with the constructors below and join them with ``&``, ``|`` and ``~``. Sizes are
    given when the mask is used, so one ``Mask.causal()`` serves every length.

    >>> (Mask.causal() & Mask.lengths(torch.tensor([2]))).to_dense(3, 3)
    tensor([[[[ True, False, False],
              [ True,  True, False],
              [ True,  True, False]]]])
    """

    __slots__ = ("_rule",)

    def __init__(self, rule: Rule) -> None:
        self._rule = rule

    @staticmethod
    def causal(offset: int | Tensor | None = None) -> Mask:
        """Let query ``i`` see key ``j`` where ``j <= i + offset``.

        Args:
            offset: tokens. None puts the last query on the last key (``n_keys - n_queries``) and
                refuses more queries than keys; an int or an integer tensor ``(b,)`` is taken as
                it is (0 is torch's ``is_causal=True``).

        Raises:
            TypeError: if ``offset`` is neither None, an int nor an integer tensor.
            ValueError: if a tensor ``offset`` does not have exactly one axis.

        >>> Mask.causal()
        Mask.causal()
        """
        _checks.check_offset(offset)
        return Mask(Causal(offset))

    @staticmethod
    def window(
        left: int | None = None, right: int | None = None, offset: int | Tensor | None = None
    ) -> Mask:
        """Let query ``i`` see ``left`` keys before and ``right`` keys after key ``i + offset``.

        Args:
            left: tokens before, the key at ``i + offset`` itself not counted; None: no limit.
            right: tokens after; None: no limit.
            offset: as in :meth:`causal`.

        Raises:
            TypeError: if a width is not an int or ``offset`` is of a wrong kind.
            ValueError: if a width is negative.

        >>> Mask.window(left=1, right=0).to_dense(3, 3)[0, 0].int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [0, 1, 1]], dtype=torch.int32)
        """
        _checks.check_width("left", left)
        _checks.check_width("right", right)
        _checks.check_offset(offset)
        return Mask(Window(left, right, offset))

    @staticmethod
    def lengths(key_lengths: Tensor) -> Mask:
        """Let every query of batch row ``b`` see its first ``key_lengths[b]`` keys.

        Args:
            key_lengths: (b,) integers, tokens. A length past the last key means every key; zero
                or less means none.

        Raises:
            TypeError: if ``key_lengths`` is not an integer tensor.
            ValueError: if it does not have exactly one axis.
        """
        _checks.check_integers("key_lengths", key_lengths)
        _checks.check_axes("key_lengths", key_lengths, "b", "Pass one length per batch row.")
        return Mask(Lengths(key_lengths))

    @staticmethod
    def padding(keep: Tensor) -> Mask:
        """Let every query see the keys that ``keep`` marks as real tokens.

        Args:
            keep: (b, s) bool, True = a real token.

        Raises:
            TypeError: if ``keep`` is not boolean.
            ValueError: if it does not have two axes.
        """
        instead = "For a 0/1 attention_mask use Mask.from_huggingface(attention_mask)."
        _checks.check_bool("keep", keep, instead)
        _checks.check_axes("keep", keep, "b s", "For a mask of pairs use Mask.dense.")
        return Mask(Padding(keep))

    @staticmethod
    def segments(query_ids: Tensor, key_ids: Tensor | None = None) -> Mask:
        """Let a query see the keys that carry its own segment id.

        Args:
            query_ids: (b, t) integers.
            key_ids: (b, s) integers; None takes ``query_ids``.

        Raises:
            TypeError: if the ids are not integers.
            ValueError: if they do not have two axes or their batch sizes differ.
        """
        key_ids = query_ids if key_ids is None else key_ids
        for name, ids in (("query_ids", query_ids), ("key_ids", key_ids)):
            _checks.check_integers(name, ids)
            _checks.check_axes(name, ids, "b n", "Pass one id per token.")
        _checks.check_same_batch("query_ids", query_ids, "key_ids", key_ids)
        return Mask(Segments(query_ids, key_ids))

    @staticmethod
    def dense(allowed: Tensor) -> Mask:
        """Take a mask of pairs as it is.

        Args:
            allowed: (b, h, t, s) bool, each axis full or 1; True = may attend.

        Raises:
            TypeError: if ``allowed`` is not boolean.
            ValueError: if it does not have four axes: ``(b, s)`` and ``(t, s)`` look alike.
        """
        _checks.check_allowed("allowed", allowed)
        return Mask(Dense(allowed))

    @staticmethod
    def from_mha(
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        *,
        n_heads: int | None = None,
    ) -> Mask:
        """Translate the masks of ``nn.MultiheadAttention``, where True = may **not** attend.

        Args:
            attn_mask: (t, s) or (b * n_heads, t, s); bool, or float with 0 and -inf alone.
            key_padding_mask: (b, s), likewise.
            n_heads: needed to read an ``attn_mask`` of three axes.

        Raises:
            ValueError: for other shapes, or a float mask with finite values (read once, here):
                those belong in ``bias``.

        >>> Mask.from_mha(key_padding_mask=torch.tensor([[False, True]])).to_dense(1, 2)
        tensor([[[[ True, False]]]])
        """
        mask: Mask | None = None
        if attn_mask is not None:
            allowed = _not_blocked("attn_mask", attn_mask)
            if allowed.ndim == 3:
                _checks.check_heads_given(n_heads, allowed.shape[0])
                allowed = rearrange(allowed, "(b h) t s -> b h t s", h=n_heads)
            elif allowed.ndim == 2:
                allowed = allowed[None, None]
            mask = Mask.dense(allowed)
        if key_padding_mask is not None:
            padding = Mask.padding(_not_blocked("key_padding_mask", key_padding_mask))
            mask = padding if mask is None else mask & padding
        return Mask.everything() if mask is None else mask

    @staticmethod
    def from_huggingface(attention_mask: Tensor) -> Mask:
        """Translate an ``attention_mask`` of Hugging Face, where 1 = a real token.

        Args:
            attention_mask: (b, s) of 0 and 1; or (b, h|1, t, s), bool with True = may attend, or
                float with 0 = may attend and a large negative number = blocked.

        Raises:
            ValueError: for another number of axes.
            TypeError: for integers of four axes, whose meaning is not settled.

        >>> Mask.from_huggingface(torch.tensor([[1, 1, 0]]))
        Mask.padding(keep of shape (1, 3))
        """
        _checks.check_tensor("attention_mask", attention_mask)
        if attention_mask.ndim == 2:
            return Mask.padding(attention_mask != 0)
        _checks.check_axes(
            "attention_mask", attention_mask, "b h t s", "Or pass (b, s) with 1 = a real token."
        )
        if attention_mask.dtype == torch.bool:
            return Mask.dense(attention_mask)
        _checks.check_float("attention_mask", attention_mask)
        return Mask.dense(attention_mask > torch.finfo(attention_mask.dtype).min / 2)

    @staticmethod
    def from_cu_seqlens(cu_q: Tensor, cu_k: Tensor | None = None) -> Mask:
        """Translate the cumulative lengths of a packed batch, as varlen kernels take them.

        Args:
            cu_q: (n + 1,) integers from 0, increasing, tokens: where each sequence starts.
            cu_k: the same for the keys; None takes ``cu_q``.

        Returns:
            The mask of one batch row, in which each sequence sees itself alone.

        >>> Mask.from_cu_seqlens(torch.tensor([0, 1, 3])).to_dense(3, 3)[0, 0].int()
        tensor([[1, 0, 0],
                [0, 1, 1],
                [0, 1, 1]], dtype=torch.int32)
        """
        cu_k = cu_q if cu_k is None else cu_k
        for name, cu in (("cu_q", cu_q), ("cu_k", cu_k)):
            _checks.check_integers(name, cu)
            _checks.check_axes(name, cu, "n+1", "Pass the starts and the total.")
        return Mask.segments(_segment_ids(cu_q), _segment_ids(cu_k))

    @staticmethod
    def everything() -> Mask:
        """Let every query see every key."""
        return Mask(Window(None, None, 0))

    def to_dense(
        self, n_queries: int, n_keys: int, device: torch.device | str | None = None
    ) -> Tensor:  # bool (b|1, h|1, t, s)
        """Write the mask out as a boolean tensor.

        Args:
            n_queries: tokens.
            n_keys: tokens.
            device: where; None takes the device of the mask's own tensors, or the CPU.

        Raises:
            ValueError: if a rule does not fit these sizes.
        """
        device = torch.device(device) if device is not None else self._rule.device()
        rows = torch.arange(n_queries, device=device)
        cols = torch.arange(n_keys, device=device)
        tile = self._rule.tile(rows, cols, n_queries, n_keys)
        return tile.expand(*tile.shape[:2], n_queries, n_keys)

    def tile(self, rows: Tensor, cols: Tensor, n_queries: int, n_keys: int) -> Tensor:
        """Write out the pairs of some queries ``rows`` and keys ``cols``, given as indices.

        Returns:
            Bool ``(b|1, h|1, r|1, c|1)``, to be broadcast.
        """
        return self._rule.tile(rows, cols, n_queries, n_keys)

    def sizes(self) -> tuple[int | None, int | None]:
        """Give the mask's own batch size and heads; None or 1 where it serves any."""
        return self._rule.sizes()

    def tensors(self) -> list[Tensor]:
        """List the tensors that the mask holds."""
        return self._rule.tensors()

    def devices(self) -> set[torch.device]:
        """Give the devices of the tensors that the mask holds."""
        return {x.device for x in self.tensors()}

    def band(self, n_queries: int, n_keys: int) -> Band | None:
        """Say the mask as one diagonal band and one set of keys, or None where it is not one."""
        return self._rule.band(n_queries, n_keys)

    def __and__(self, other: Mask) -> Mask:
        self._check_joins(other)
        return Mask(And(self._rule, other._rule))

    def __or__(self, other: Mask) -> Mask:
        self._check_joins(other)
        return Mask(Or(self._rule, other._rule))

    def __invert__(self) -> Mask:
        return Mask(Not(self._rule))

    def _check_joins(self, other: Mask) -> None:
        _checks.check_is_mask("other", other, Mask)
        for what, a, b in zip(("batch size", "heads"), self.sizes(), other.sizes(), strict=True):
            _checks.check_joinable(what, a, b)

    def __repr__(self) -> str:
        return repr(self._rule)


def _not_blocked(
    argument: str,
    blocked: Tensor,  # bool, True = blocked; or float, -inf = blocked
) -> Tensor:
    _checks.check_tensor(argument, blocked)
    if blocked.dtype == torch.bool:
        return ~blocked
    _checks.check_float(argument, blocked)
    allowed = blocked != -torch.inf
    if bool((allowed & (blocked != 0)).any()):
        raise ValueError(
            _checks.must(
                argument,
                "hold only 0 and -inf where it is a float",
                "a tensor with other values",
                "Pass those values as bias=.",
            )
        )
    return allowed


def _segment_ids(cu: Tensor) -> Tensor:  # (n + 1,) -> (1, total)
    tokens = torch.arange(int(cu[-1]), device=cu.device)
    return torch.bucketize(tokens, cu[1:].to(torch.int64), right=True)[None]
