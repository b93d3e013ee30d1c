"""How weights start."""

from __future__ import annotations

import math

from torch import nn


def init_linear(linear: nn.Linear, d_model: int) -> None:
    """Draw weights small: a normal of standard deviation ``sqrt(2 / (5 d_model))``, bias 0.

    Source: Nguyen & Salazar (2019), section 2.2; Takase et al. (2023), "Spike No More".
    """
    nn.init.normal_(linear.weight, std=math.sqrt(2 / (5 * d_model)))
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
