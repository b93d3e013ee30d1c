"""The position-wise part of a block."""

from __future__ import annotations

from typing import Literal, final, get_args

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stabletx import _checks
from stabletx._precision import compute_dtype
from stabletx.functional.activations import gelu, swiglu
from stabletx.layers._init import init_linear
from stabletx.layers.linear import Linear

Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu", "geglu_tanh"]
GATED = ("swiglu", "geglu", "geglu_tanh")

# Without a gradient the wide activation of a long input is made in pieces of this many tokens, so
# that memory grows with d_model alone; smaller pieces cost time, larger ones save none.
TOKENS_AT_ONCE = 8192


@final
class FeedForward(nn.Module):
    """Widen each token, bend it and bring it back.

    Args:
        d_model: size of a token.
        d_ff: size within; None takes ``4 d_model``, and with a gate two thirds of that (the same
            number of weights), rounded up to a multiple of 8.
        activation: "gelu", "gelu_tanh" (its approximation), "relu", "silu"; or "swiglu", "geglu",
            "geglu_tanh", whose widening also makes a gate.
        use_bias: whether the two linear maps have one.
        recompute: while training, keep only the input and work out the wide activation again in
            the backward pass: about a tenth more time, a fraction of the memory, the same bits.

    Raises:
        ValueError: for a size that is not positive or another activation.

    Source: Hendrycks & Gimpel (2016); Shazeer (2020).

    >>> FeedForward(4)(torch.zeros(2, 4)).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int | None = None,
        *,
        activation: Activation = "gelu",
        use_bias: bool = True,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        _checks.check_one_of("activation", activation, get_args(Activation))
        _checks.check_positive("d_model", d_model)
        is_gated = activation in GATED
        if d_ff is None:
            d_ff = -(-8 * d_model // 24) * 8 if is_gated else 4 * d_model
        _checks.check_positive("d_ff", d_ff)
        self.activation, self.recompute = activation, recompute
        self.widen = Linear(d_model, d_ff * (2 if is_gated else 1), use_bias)
        self.out = Linear(d_ff, d_model, use_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        init_linear(self.widen, self.out.out_features)
        init_linear(self.out, self.out.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token of ``x`` (..., d_model)."""
        if torch.is_grad_enabled() and self.training and self.recompute:
            # Nothing in here is random, so no state of a generator need be kept.
            again: Tensor = checkpoint(
                self._whole, x, use_reentrant=False, preserve_rng_state=False
            )
            return again
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._whole(x)
        tokens = rearrange(x, "... m -> (...) m")
        if tokens.shape[0] <= TOKENS_AT_ONCE:
            return self._whole(x)
        parts = [self._whole(part) for part in torch.split(tokens, TOKENS_AT_ONCE)]
        return torch.cat(parts).view(x.shape)

    def _whole(self, x: Tensor) -> Tensor:
        if self.activation == "gelu" and type(self.widen) is Linear:
            bent = self.widen.forward_gelu(x)
        else:
            bent = bend(self.widen(x), self.activation)
        out: Tensor = self.out(bent)
        return out


def bend(x: Tensor, activation: Activation) -> Tensor:  # (..., f or 2 f) -> (..., f)
    """Apply an activation; with a gate, the first half of the last axis is bent and gates."""
    if activation in GATED:
        gate, up = x.chunk(2, dim=-1)
        if activation == "swiglu":
            return swiglu(gate, up)
        form: Literal["none", "tanh"] = "tanh" if activation == "geglu_tanh" else "none"
        opened = gelu(gate.to(compute_dtype(gate.dtype)), approximate=form)
        return (opened * up).to(gate.dtype)
    if activation == "relu":
        return nn.functional.relu(x)
    if activation == "silu":
        return nn.functional.silu(x)
    return gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
