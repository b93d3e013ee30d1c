"""Norms over the last axis, as modules."""

from __future__ import annotations

from dataclasses import dataclass
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
        use_bias: whether there is an offset.

    Numerics: statistics in at least float32 whatever the dtype of the parameters.
    Source: Ba, Kiros & Hinton (2016).

    >>> LayerNorm(2)(torch.tensor([[0.0, 1e30]])).detach()
    tensor([[-1.,  1.]])
    """

    def __init__(self, d_model: int, *, eps: float = 1e-5, use_bias: bool = True) -> None:
        super().__init__()
        _checks.check_positive("d_model", d_model)
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(d_model))
        self.bias = nn.Parameter(torch.empty(d_model)) if use_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with gain 1 and offset 0."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
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


@dataclass(frozen=True)
class NormSettings:
    """Say which norm a model uses: None for ``eps`` takes the norm's own; see :func:`make_norm`."""

    kind: NormKind = "layer"
    eps: float | None = None
    use_bias: bool = True


def make_norm(norm: NormKind | NormSettings, d_model: int) -> LayerNorm | RMSNorm:
    """Build the norm that ``norm`` names.

    Raises:
        ValueError: for another name.
    """
    chosen = norm if isinstance(norm, NormSettings) else NormSettings(norm)
    _checks.check_one_of("norm", chosen.kind, ("layer", "rms"))
    if chosen.kind == "layer":
        eps = 1e-5 if chosen.eps is None else chosen.eps
        return LayerNorm(d_model, eps=eps, use_bias=chosen.use_bias)
    return RMSNorm(d_model, eps=1e-6 if chosen.eps is None else chosen.eps)
