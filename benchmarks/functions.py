"""Softmax, norms and their like against torch's own functions, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contest import OURS, Case, Contest, Outcome, Settings, hold, largest
from stabletx import functional as ours
from stabletx.testing import layer_norm_error_bound, rms_norm_error_bound, softmax_error_bound

TORCH = "torch"


class Work(NamedTuple):
    """A function on one size of input."""

    name: str
    rows: int
    width: int
    dtype: torch.dtype
    backward: bool


def cases(settings: Settings) -> list[Case]:
    """List the workloads."""
    sizes = [(4, 16)] if settings.is_quick else [(4096, 384), (8192, 128)]
    found = []
    for name in _FUNCTIONS:
        for rows, width in sizes:
            for dtype in (torch.float32, torch.bfloat16):
                for backward in (False, True):
                    work = Work(name, rows, width, dtype, backward)
                    kind = str(dtype).removeprefix("torch.")
                    title = f"{name}-{rows}x{width}-{kind}" + "-backward" * backward
                    found.append(Case("functions", title, (OURS, TORCH), partial(run, work)))
    return found


def run(work: Work, settings: Settings) -> Outcome:
    """Measure one workload."""
    return hold(build(work, settings.device), settings)


def build(work: Work, device: str) -> Contest:
    """Build the input and both calls; the forward is held to its computed bound."""
    function, torch_function, bound = _FUNCTIONS[work.name]
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, work.dtype)

    x, weight, bias = draw(work.rows, work.width), draw(work.width), draw(work.width)
    grad = draw(work.rows, work.width)
    wide = [a.double() for a in (x, weight, bias)]
    exact, allowed = torch_function(*wide), bound(x, weight, bias)
    leaves = [a.requires_grad_(work.backward) for a in (x, weight, bias)]

    def make(f: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            out = f(*leaves)
            if not work.backward:
                return [out]
            return [out, *torch.autograd.grad(out, leaves, grad, allow_unused=True)]

        return call

    def occupancy(result: Any) -> float:
        """Give the largest error as a share of the bound."""
        return largest((result[0].detach().double() - exact) / allowed)

    return Contest(
        makers={OURS: lambda: make(function), TORCH: lambda: make(torch_function)},
        error=occupancy,
        # Torch's functions promise no bound; one far off would still be another function.
        allowed={OURS: 1.0, "": 1e4},
        about={"error": "share of the bound"},
    )


def _softmax(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.softmax(x, dim=-1)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias)


def _rms_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-6)


_FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]]
_FUNCTIONS = {
    "softmax": (
        lambda x, w, b: ours.softmax(x),
        _softmax,
        lambda x, w, b: softmax_error_bound(x),
    ),
    "layer-norm": (
        lambda x, w, b: ours.layer_norm(x, w, b),
        _layer_norm,
        lambda x, w, b: layer_norm_error_bound(x, w, b),
    ),
    "rms-norm": (
        lambda x, w, b: ours.rms_norm(x, w, eps=1e-6),
        _rms_norm,
        lambda x, w, b: rms_norm_error_bound(x, w, eps=1e-6),
    ),
}
