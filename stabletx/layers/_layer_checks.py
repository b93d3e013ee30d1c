"""Checks of what layers are made of and given, with the messages they give."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stabletx._checks import must
from stabletx.masks import Mask


def check_cache_has_room(n_tokens: int, capacity: int) -> None:
    """Refuse to put more tokens into a cache than it can hold."""
    if n_tokens > capacity:
        raise ValueError(
            f"cache must have room for {n_tokens} tokens, got cache with capacity={capacity}. "
            "Make it with a larger capacity, or reset it."
        )


def check_batch_size(batch_size: int) -> None:
    """Refuse anything but an int of at least zero."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(must("batch_size", "be an int", repr(batch_size)))
    if batch_size < 0:
        raise ValueError(must("batch_size", "be at least 0", batch_size))


def check_may_be_written(argument: str, value: Tensor) -> None:
    """Refuse, outside of inference mode, memory that was taken in it and cannot be written to."""
    if not torch.is_inference_mode_enabled() and value.is_inference():
        raise RuntimeError(
            f"{argument} must be used in torch.inference_mode(), in which it was made, got "
            "torch.is_inference_mode_enabled()=False. Make it outside, or wrap the call."
        )


def check_no_gradient(what: str) -> None:
    """Refuse to record a gradient through what does not carry one."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{what} must be used without gradient, got torch.is_grad_enabled()=True. "
            "Wrap the call in torch.no_grad() or torch.inference_mode()."
        )


def check_context(wants_context: bool, has_context: bool) -> None:
    """Refuse a context where the block has no place for it, and its absence where it has."""
    if wants_context and not has_context:
        raise ValueError(must("context", "be given to a block made with has_context=True", None))
    if has_context and not wants_context:
        instead = "Make the block with has_context=True."
        raise ValueError(must("context", "be None", "a tensor", instead))


def rule_on_places(mask: Mask | Tensor | None) -> Mask | None:
    """Give a mask that fits any sequence; refuse, beside a plan, one that is made for a batch."""
    if isinstance(mask, Tensor) or (mask is not None and mask.sizes() != (None, None)):
        instead = "A packed batch knows its sequences; Mask.window and Mask.causal fit any."
        raise ValueError(must("mask", "be a rule on places beside plan", repr(mask), instead))
    return mask


def check_even(argument: str, value: int) -> None:
    """Refuse an odd number."""
    if value % 2:
        raise ValueError(must(argument, "be even, as rotary positions turn pairs", value))


def looked_up(argument: str, ids: Tensor, table: nn.Embedding) -> Tensor:
    """Look up ids in a table; refuse those outside of it, once the lookup has failed on them."""
    try:
        found: Tensor = table(ids)
    except IndexError as error:
        name = "vocab_size" if argument == "input_ids" else "n_token_types"
        instead = "Use the tokenizer that the model was made with."
        got = f"ids from {int(ids.min())} to {int(ids.max())}"
        rule = f"be in [0, {name}={table.num_embeddings})"
        raise ValueError(must(argument, rule, got, instead)) from error
    return found


def refuse_types() -> None:
    """Refuse types of tokens where none has a vector."""
    instead = "Leave them out: the model has n_token_types=0."
    raise ValueError(must("token_type_ids", "be None", "a tensor", instead))


def check_buckets(n_buckets: int, n_each: int, max_distance: int) -> None:
    """Refuse so few buckets that none is left for far distances, or none far enough."""
    if n_each < 2:
        raise ValueError(must("n_buckets", "give at least 2 to each side", n_buckets))
    if max_distance <= n_each // 2:
        raise ValueError(must("max_distance", f"be above {n_each // 2}", max_distance))
