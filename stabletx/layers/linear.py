"""A linear map that is as fast on a CPU as the machine allows."""

from __future__ import annotations

from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from stabletx import _checks
from stabletx.functional.activations import gelu
from stabletx.layers._as_made import is_as_made
from stabletx.layers._prepacked import Prepacked, Ready
from stabletx.layers._trained import multiply_trained

Backend = Literal["auto", "plain", "prepacked"]


@final
class Linear(nn.Linear):
    """Multiply by a weight and add a bias, as :class:`torch.nn.Linear`.

    In inference on a CPU (evaluation mode, no gradient, float32 or bfloat16) a second copy of the
    weight, in the order that oneDNN reads fastest, is kept and used where that is faster. It is
    made anew whenever the weight has changed: after ``load_state_dict``, a step of an optimizer, a
    cast, any write that autograd counts. Writes that it does not count, through ``weight.data`` or
    to weights that were made in inference mode, are seen where they touch many entries; write a few
    under ``torch.no_grad()`` instead.

    In training in float32 on a CPU oneDNN takes large products and the gradients of their inputs,
    with the weight as it lies. Size alone decides, so that a seeded run repeats.

    Args:
        in_features: size of the last axis.
        out_features: size that it becomes.
        use_bias: whether something is added.

    Attributes:
        backend: "auto" times both ways of inference once for each kind of call, and is "plain"
            under ``torch.use_deterministic_algorithms``; "plain" is torch's own, always;
            "prepacked" is oneDNN wherever it can be. May be set at any time.

    Numerics: the plain and the packed product differ in the order of their sums, so in their last
        bits. Which is taken in inference depends on a measurement, except with "plain" and
        "prepacked".

    >>> Linear(4, 2)(torch.zeros(3, 4)).shape
    torch.Size([3, 2])
    """

    def __init__(self, in_features: int, out_features: int, use_bias: bool = True) -> None:
        super().__init__(in_features, out_features, use_bias)
        self.backend: Backend = "auto"
        self._prepacked = Prepacked()

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x`` (..., in_features)."""
        out = self._by_onednn(x, then_gelu=False)
        return nn.functional.linear(x, self.weight, self.bias) if out is None else out

    def forward_gelu(self, x: Tensor) -> Tensor:
        """Transform ``x`` and apply GELU, in one step where that is faster."""
        # Whoever watches this layer, or has replaced its forward, is asked before the activation.
        if is_as_made(self, Linear):
            out = self._by_onednn(x, then_gelu=True)
            if out is not None:
                return out
        return gelu(self(x))

    def ready(self, n_rows: int, *, then_gelu: bool = False, by_onednn: bool = False) -> Ready:
        """Choose how so many rows are multiplied, once for many calls in inference.

        With ``by_onednn`` a choice that is left to us is not made by timing.
        """
        if self.training or self._is_plain():
            return Ready("plain", self.weight, self.bias, then_gelu)
        x = self.weight.new_ones(n_rows, self.in_features)
        always = by_onednn or self.backend == "prepacked"
        return self._prepacked.ready(x, self.weight, self.bias, then_gelu=then_gelu, always=always)

    def _is_plain(self) -> bool:
        _checks.check_one_of("backend", self.backend, ("auto", "plain", "prepacked"))
        return self.backend == "plain"

    def _by_onednn(self, x: Tensor, *, then_gelu: bool) -> Tensor | None:
        if self._is_plain():
            return None
        always = self.backend == "prepacked"
        if torch.is_grad_enabled():
            if then_gelu:  # a step of its own here, after a call without it
                return None
            return multiply_trained(x, self.weight, self.bias, always=always)
        if self.training:
            return None
        return self._prepacked.apply(x, self.weight, self.bias, then_gelu=then_gelu, always=always)

    def _apply(self, fn: object, recurse: bool = True) -> Linear:
        self._prepacked.forget()  # the old weight's memory is not kept for it
        made: Linear = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return made

    def _load_from_state_dict(self, *args: Any) -> None:
        self._prepacked.forget()
        super()._load_from_state_dict(*args)

    def train(self, mode: bool = True) -> Linear:
        """Leave inference, or go back to it; training frees the packed copy."""
        if mode:
            self._prepacked.forget()
        return super().train(mode)
