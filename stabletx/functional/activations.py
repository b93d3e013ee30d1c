"""Activations of the feed-forward layers, finite up to the largest float, gradients too."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from stabletx import _checks
from stabletx._precision import compute_dtype
from stabletx.functional._magnitude import surely_within

Approximation = Literal["none", "tanh"]

# Beyond this GELU is 0 or its input to the last bit in every dtype, while torch's kernels run into
# infinity times zero: 2 x overflows in the forward pass, x**2 in the gradient of the tanh form.
_FLAT = 2.0**20


def gelu(
    x: Tensor,  # any shape
    *,
    approximate: Approximation = "none",
) -> Tensor:  # the shape of x
    """Multiply each value by the probability that a standard normal variable lies below it.

    Args:
        x: pre-activations, unit-free.
        approximate: ``"none"`` for ``x / 2 * (1 + erf(x / sqrt(2)))``, ``"tanh"`` for
            ``x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))``.

    Returns:
        Values in the dtype of ``x``.

    Raises:
        TypeError: if ``x`` is not floating point.
        ValueError: if ``approximate`` is neither of the two.

    Numerics: computed in float32 (float64 for float64), rounded once; the error is a few units in
    the last place of ``x``, so the far negative tail is right in absolute terms. Value and gradient
    are finite for every finite ``x``. NaN and -inf give NaN.
    Source: Hendrycks & Gimpel (2016), arXiv 1606.08415, section 2.

    >>> gelu(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.1587,  0.0000,  0.8413])
    """
    _checks.check_float("x", x)
    _checks.check_one_of("approximate", approximate, get_args(Approximation))
    z = x.to(compute_dtype(x.dtype))
    if surely_within(x, _FLAT):
        return torch.nn.functional.gelu(z, approximate=approximate).to(x.dtype)
    middle = torch.nn.functional.gelu(z.clamp(-_FLAT, _FLAT), approximate=approximate)
    return torch.where(z.abs() > _FLAT, z * (z > 0), middle).to(x.dtype)


def swiglu(
    gate: Tensor,  # (..., f)
    up: Tensor,  # (..., f)
) -> Tensor:  # (..., f)
    """Gate one projection by the SiLU of another: ``gate * sigmoid(gate) * up``.

    Args:
        gate: the projection that opens and closes.
        up: the projection that is let through.

    Returns:
        Values in the dtype of ``gate``.

    Raises:
        TypeError: if either is not floating point or their dtypes differ.
        ValueError: if their shapes differ.

    Numerics: computed in float32 (float64 for float64), rounded once: the product is taken before
    rounding. A ``gate`` so negative that ``exp(-gate)`` overflows gives 0.
    Source: Shazeer (2020), arXiv 2002.05202, section 2.

    >>> swiglu(torch.tensor([0.0, 2.0]), torch.tensor([3.0, 3.0]))
    tensor([0.0000, 5.2848])
    """
    _checks.check_float("gate", gate)
    _checks.check_float("up", up)
    _checks.check_same("dtype", "up", up.dtype, "gate", gate.dtype)
    _checks.check_same("shape", "up", tuple(up.shape), "gate", tuple(gate.shape))
    opened = torch.nn.functional.silu(gate.to(compute_dtype(gate.dtype)))
    return (opened * up).to(gate.dtype)
