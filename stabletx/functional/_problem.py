"""One attention problem, checked once: what every method computes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stabletx import _checks
from stabletx.functional._sight import Sight
from stabletx.masks import Mask


@dataclass(frozen=True)
class Problem:
    """The arguments of :func:`stabletx.attention`, checked and completed."""

    q: Tensor  # (b, h, t, d)
    k: Tensor  # (b, g, s, d)
    v: Tensor  # (b, g, s, e)
    mask: Mask | None
    bias: Tensor | None  # (b|1, h|1, t|1, s|1)
    scale: float
    softcap: float | None
    sinks: Tensor | None  # (h,)
    dropout_p: float

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """List the tensors that hold values: q, k, v, and the bias and the sinks if given."""
        return tuple(x for x in (self.q, self.k, self.v, self.bias, self.sinks) if x is not None)

    @property
    def needs_grad(self) -> bool:
        """Tell whether a gradient will be asked for."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in self.tensors)

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """Give the shape of the output, (b, h, t, e)."""
        return (*self.q.shape[:3], self.v.shape[3])

    def sight(self) -> Sight:
        """Say who sees whom, the -inf of a bias included."""
        t, s = self.q.shape[2], self.k.shape[2]
        return Sight.of(self.mask, self.bias, t, s, self.q.device)

    def with_tensors(self, q: Tensor, k: Tensor, v: Tensor) -> Problem:
        """Put other queries, keys and values in their place."""
        return replace(self, q=q, k=k, v=v)

    def map(self, convert: Callable[[Tensor], Tensor]) -> Problem:
        """Convert every tensor alike."""
        extras = (None if x is None else convert(x) for x in (self.bias, self.sinks))
        q, k, v = convert(self.q), convert(self.k), convert(self.v)
        return self.with_tensors(q, k, v).with_extras(*extras)

    def with_extras(self, bias: Tensor | None, sinks: Tensor | None) -> Problem:
        """Put another bias and other sinks in their place."""
        return replace(self, bias=bias, sinks=sinks)


def checked_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout_p: float,
    training: bool | None,
) -> Problem:
    """Check every argument by shape, dtype and device, never by value, and complete it."""
    _check_tensors(q, k, v)
    b, h, t, d = q.shape
    s = k.shape[2]
    if isinstance(mask, Tensor):
        _checks.check_allowed("mask", mask)
        mask = Mask.dense(mask)
    elif mask is not None:
        instead = "Pass a stabletx.Mask or a boolean tensor of 4 axes."
        _checks.check_is_mask("mask", mask, Mask, instead)
    if mask is not None:
        _checks.check_mask_fits(mask.sizes(), (b, h, t, s), mask.devices(), q.device)
    if bias is not None:
        _checks.check_bias(bias, (b, h, t, s), q)
    if sinks is not None:
        _checks.check_sinks(sinks, h, q)
    if scale is None:
        scale = d**-0.5 if d else 1.0
    else:
        _checks.check_finite_number("scale", scale)
    if softcap is not None:
        _checks.check_softcap(softcap)
    _checks.check_probability("dropout_p", dropout_p)
    _checks.check_training_given(dropout_p, training)
    dropout_p = dropout_p if training else 0.0
    return Problem(q, k, v, mask, bias, scale, softcap, sinks, dropout_p)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x, axes in (("q", q, "b h t d"), ("k", k, "b g s d"), ("v", v, "b g s e")):
        _checks.check_float(name, x)
        _checks.check_axes(name, x, axes, "Split the heads first.")
        if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            instead = "Convert it: an 8-bit float cannot hold attention."
            raise TypeError(
                _checks.must(name, "be float64, float32, bfloat16 or float16", x.dtype, instead)
            )
    for name, x in (("k", k), ("v", v)):
        _checks.check_same("dtype", name, x.dtype, "q", q.dtype)
        _checks.check_same("device", name, x.device, "q", q.device)
        _checks.check_same("batch size", name, x.shape[0], "q", q.shape[0])
    _checks.check_same("number of heads", "v", v.shape[1], "k", k.shape[1])
    _checks.check_same("number of keys", "v", v.shape[2], "k", k.shape[2])
    _checks.check_same("head dim", "k", k.shape[3], "q", q.shape[3])
    if q.shape[1] != k.shape[1]:
        _checks.check_divides("k.shape[1]", k.shape[1], "q.shape[1]", q.shape[1])
