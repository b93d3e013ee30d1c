"""From what a caller passes to what the blocks work on, once in a forward pass."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stabletx import _checks
from stabletx.masks import Mask
from stabletx.packing import FULL_ENOUGH, Packed, Plan


@dataclass(frozen=True, eq=False)
class Inputs:
    """Token ids with their positions; packed where there is a plan, else padded."""

    ids: Tensor  # (b, n), or (n_tokens,) with a plan
    positions: Tensor  # (n,) or (b, n), or (n_tokens,) with a plan
    keep: Tensor | None  # (b, n) bool, True = a real token; None: all are
    plan: Plan | None
    token_types: Tensor | None = None  # as ids

    @property
    def mask(self) -> Mask | None:
        """Say which keys are real; None where all are, or packing says so already."""
        return None if self.keep is None or self.plan is not None else Mask.padding(self.keep)

    @property
    def width(self) -> int:
        """Give the tokens of a padded row, or of the longest packed sequence."""
        if self.plan is None:
            return self.ids.shape[1]
        return self.plan.shape[1] if len(self.plan.shape) == 2 else self.plan.max_length

    @property
    def key_mask(self) -> Mask | None:
        """Say which keys are real in the padded layout, for those who attend to a context."""
        return None if self.keep is None else Mask.padding(self.keep)

    def arrange(self, x: Tensor, *, fill: int) -> Tensor:  # the caller's layout -> (*ids.shape)
        """Bring one value for each token into the blocks' layout, with ``fill`` at padding."""
        if self.plan is not None:
            return self.plan.pack(x)
        return x if self.keep is None else torch.where(self.keep, x, fill)

    def restore(self, x: Tensor) -> Tensor:  # (*ids.shape, ...) -> the caller's layout
        """Bring the blocks' result into the caller's layout, with 0 at padding."""
        if self.plan is not None:
            return self.plan.unpack(x)
        return x if self.keep is None else torch.where(self.keep[..., None], x, 0.0)


def read_inputs(
    input_ids: Tensor | Packed,  # (b, n)
    attention_mask: Tensor | None,  # (b, n), bool or 0 and 1; 1 = a real token
    *,
    token_type_ids: Tensor | None = None,  # as input_ids
    may_pack: bool = True,
) -> Inputs:
    """Check ids, mask and types, and plan a packed pass; see :func:`_read`."""
    inputs = _read(input_ids, attention_mask, may_pack=may_pack)
    if token_type_ids is None:
        return inputs
    ids = input_ids.tokens if isinstance(input_ids, Packed) else input_ids
    _checks.check_integers("token_type_ids", token_type_ids)
    shapes = (tuple(token_type_ids.shape), tuple(ids.shape))
    _checks.check_same("shape", "token_type_ids", shapes[0], "input_ids", shapes[1])
    token_type_ids = as_index(token_type_ids)
    types = token_type_ids if inputs.plan is None else inputs.plan.pack(token_type_ids)
    return replace(inputs, token_types=types)


def _read(input_ids: Tensor | Packed, attention_mask: Tensor | None, *, may_pack: bool) -> Inputs:
    """Check ids and mask, and plan a packed pass where padding would cost more.

    A plan needs the mask's values, so it is made where the mask lies on the CPU (the ids may lie
    elsewhere) and nothing is being traced.
    """
    if isinstance(input_ids, Packed):
        _checks.check_all_none({"attention_mask": attention_mask}, "packed ids", "Lengths say it.")
        _checks.check_integers("input_ids.tokens", input_ids.tokens)
        _checks.check_axes("input_ids.tokens", input_ids.tokens, "n_tokens")
        _checks.check_lengths(input_ids.lengths, input_ids.tokens)  # may have been written to
        plan = Plan.of_lengths(input_ids.lengths, input_ids.tokens.device)
        return Inputs(plan.pack(as_index(input_ids.tokens)), plan.positions, None, plan)
    _checks.check_integers("input_ids", input_ids)
    _checks.check_axes("input_ids", input_ids, "b n", "Add a batch axis: input_ids[None].")
    input_ids = as_index(input_ids)
    if attention_mask is None:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return Inputs(input_ids, positions, None, None)
    keep = _as_keep(attention_mask, input_ids)
    if keep.device.type == "cpu" and _values_may_be_read():
        fill = float(keep.sum()) / max(keep.numel(), 1)
        if fill == 1.0:
            return _read(input_ids, None, may_pack=may_pack)
        if may_pack and fill <= FULL_ENOUGH:
            plan = Plan.of_padding(keep, input_ids.device)
            return Inputs(plan.pack(input_ids), plan.positions, keep.to(input_ids.device), plan)
    keep = keep.to(input_ids.device)
    return Inputs(input_ids, count_before(keep), keep, None)


def as_index(ids: Tensor) -> Tensor:
    """Give ids in a dtype that torch looks up by; files often hold 8 or 16 bits."""
    return ids if ids.dtype in (torch.int64, torch.int32) else ids.long()


def count_before(keep: Tensor) -> Tensor:  # (b, n) bool -> (b, n)
    """Count the real tokens before each slot: the position of a token, wherever padding lies."""
    return (keep.cumsum(1) - 1).clamp(min=0)


def _as_keep(attention_mask: Tensor, input_ids: Tensor) -> Tensor:
    _checks.check_tensor("attention_mask", attention_mask)
    _checks.check_same(
        "shape", "attention_mask", tuple(attention_mask.shape), "input_ids", tuple(input_ids.shape)
    )
    if attention_mask.dtype == torch.bool:
        return attention_mask
    if attention_mask.device.type == "cpu" and _values_may_be_read():
        _checks.check_zeros_and_ones("attention_mask", attention_mask)
    return attention_mask != 0


def _values_may_be_read() -> bool:
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
