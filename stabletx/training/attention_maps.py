"""Where a classifier looks: the attention weights of one text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from stabletx.functional.attention import attention_details
from stabletx.layers import MultiHeadAttention
from stabletx.training.evaluate import device_of, eval_mode


class AttentionMap(NamedTuple):
    """The weights of one text in the last block, as a mean over its heads."""

    tokens: list[str]
    weights: Tensor  # (t, s); each row sums to 1
    label: str
    predicted: str
    probability: float


def last_attention(model: nn.Module, ids: Sequence[int]) -> Tensor:  # (h, t, s)
    """Return the attention weights of the last self-attention layer for one text.

    Args:
        model: holds :class:`stabletx.MultiHeadAttention` layers.
        ids: the tokens of the text.

    Raises:
        ValueError: if the model has no such layer.

    Numerics: the weights are computed from the layer's own input by the same formula as its output.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, MultiHeadAttention)]
    if not layers:
        raise ValueError(f"model must hold a MultiHeadAttention, got {type(model).__name__}.")
    seen: dict[str, Any] = {}

    def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(x=args[0], rotation=kwargs.get("rotation"))

    handle = layers[-1].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with eval_mode(model), torch.inference_mode():
            model(torch.tensor([list(ids)], device=device_of(model)))
            q, k, v = layers[-1]._rotated(*layers[-1]._project(seen["x"]), seen["rotation"])
            q, k, v = (rearrange(x, "b t h d -> b h t d") for x in (q, k, v))
            weights = attention_details(q, k, v, weights=True).weights
    finally:
        handle.remove()
    assert weights is not None
    return weights[0].cpu()


def pick_examples(
    lengths: Sequence[int], probabilities: Tensor, truth: Tensor, *, longest: int = 24
) -> list[int]:
    """Return two rows worth looking at: short, rightly and surely labelled, of different classes.

    Args:
        lengths: tokens of each row.
        probabilities: (n, c).
        truth: (n,).
        longest: tokens that still make a readable picture; longer rows come only where there are
            no others.
    """
    confidence, predicted = probabilities.max(1)
    order = sorted(
        range(len(lengths)),
        key=lambda row: (
            not 6 <= lengths[row] <= longest,
            bool(predicted[row] != truth[row]),
            max(lengths[row] - longest, 0),
            -float(confidence[row]),
        ),
    )
    first = order[:1]
    other = [row for row in order[1:] if truth[row] != truth[first[0]]]
    return first + (other or order[1:])[:1]
