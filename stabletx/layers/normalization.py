"""Norms over the last axis, as modules."""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor, nn

from stabletx import _checks
from stabletx.functional.normalization import layer_norm, rms_norm

NormKind = Literal["layer", "rms"]


@final
class LayerNorm(nn.Module):
    """Give each token mean 0 and variance 1, then a learned gain and offset.

    Args:
        d_model: size of the last axis.
        eps: added to the variance.

    Numerics: statistics in at least float32 whatever the dtype of the parameters.
    Source: Ba, Kiros & Hinton (2016).

    >>> LayerNorm(2)(torch.tensor([[0.0, 1e30]])).detach()
    tensor([[-1.,  1.]])
    """

    def __init__(self, d_model: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        _checks.check_positive("d_model", d_model)
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(d_model))
        self.bias = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with gain 1 and offset 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` (..., d_model)."""
        return layer_norm(x, self.weight, self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        """Say the size."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


@final
class RMSNorm(nn.Module):
    """Give each token a root mean square of 1, then a learned gain.

    Args:
        d_model: size of the last axis.
        eps: added to the mean square.

    Numerics: statistics in at least float32 whatever the dtype of the parameters.
    Source: Zhang & Sennrich (2019).
    """

    def __init__(self, d_model: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        _checks.check_positive("d_model", d_model)
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with gain 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` (..., d_model)."""
        return rms_norm(x, self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        """Say the size."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


def make_norm(kind: NormKind, d_model: int) -> LayerNorm | RMSNorm:
    """Build the norm that ``kind`` names.

    Raises:
        ValueError: for another name.
    """
    _checks.check_one_of("norm", kind, ("layer", "rms"))
    return LayerNorm(d_model) if kind == "layer" else RMSNorm(d_model)
