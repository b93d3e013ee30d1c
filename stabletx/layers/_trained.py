"""Linear maps in training on a CPU, multiplied by oneDNN forward and for the gradient of the input.

The library behind :func:`torch.mm` is slower there (measured on a Zen 4). Which of the two
multiplies is settled by the size of the product and never by timing, so a seeded run repeats.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stabletx.functional._sight import values_may_be_read
from stabletx.layers._prepacked import is_but_numbers, onednn_takes

# Products of two numbers, from which oneDNN's gain is larger than its way through Python; measured.
FROM = 2**26


def multiply_trained(
    x: Tensor,  # (..., m)
    weight: Tensor,  # (f, m)
    bias: Tensor | None,  # (f,)
    *,
    always: bool = False,
) -> Tensor | None:  # (..., f)
    """Give ``x @ weight.T + bias`` with its gradients; None where torch's own is due.

    ``always`` takes oneDNN wherever it can.
    """
    if not values_may_be_read(x):  # asked first: a compiler would hold on to what is known of sizes
        return None
    is_large = x.numel() * weight.shape[0] >= FROM
    if not (is_large or always) or x.ndim < 2 or weight.dtype != torch.float32:
        return None
    is_wanted = any(a is not None and a.requires_grad for a in (x, weight, bias))
    if not is_wanted or torch.are_deterministic_algorithms_enabled():
        return None
    if not (onednn_takes(x, weight, bias) and weight.is_contiguous()):
        return None
    out: Tensor = _Product.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


class _Product(torch.autograd.Function):
    """One product; the gradient of the weight is torch's own, which is as fast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        dx = dweight = None
        if wants_x:
            # Only plain operations have derivatives of their own, or take a batch of gradients.
            is_plain = torch.is_grad_enabled() or not is_but_numbers(grad)
            dx = grad @ weight if is_plain else _multiply(grad, weight.t(), None)
        if wants_weight:
            dweight = rows.t() @ x.reshape(-1, x.shape[-1])
        return dx, dweight, rows.sum(0) if wants_bias else None


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out
