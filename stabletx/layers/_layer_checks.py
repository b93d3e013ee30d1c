"""Checks of what layers are made of and given, with the messages they give."""

from __future__ import annotations

import torch
from torch import Tensor

from stabletx._checks import must


def check_cache_has_room(n_tokens: int, capacity: int) -> None:
    """Refuse to put more tokens into a cache than it can hold."""
    if n_tokens > capacity:
        raise ValueError(
            f"cache must have room for {n_tokens} tokens, got cache with capacity={capacity}. "
            "Make it with a larger capacity, or reset it."
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


def check_even(argument: str, value: int) -> None:
    """Refuse an odd number."""
    if value % 2:
        raise ValueError(must(argument, "be even, as rotary positions turn pairs", value))


def ids_out_of_range(ids: Tensor, vocab_size: int) -> ValueError:
    """Say which token ids are outside the vocabulary, once a lookup has failed on them."""
    return ValueError(
        must(
            "input_ids",
            f"be in [0, vocab_size={vocab_size})",
            f"ids from {int(ids.min())} to {int(ids.max())}",
            "Use the tokenizer that the model was made with.",
        )
    )
