"""Attention against torch's own function, called its fastest way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.contest import OURS, Case, Contest, Outcome, Settings, hold, largest
from benchmarks.interleave import Call
from stabletx import Mask, attention
from stabletx.testing import attention_error_bound, reference_attention

Pair = tuple[Callable[[], object], Callable[[], object]]
TORCH = "torch SDPA"
BACKENDS = {
    "torch flash": SDPBackend.FLASH_ATTENTION,
    "torch efficient": SDPBackend.EFFICIENT_ATTENTION,
    "torch cuDNN": SDPBackend.CUDNN_ATTENTION,
}


class Workload(NamedTuple):
    """One line of the table."""

    kind: str  # "plain", "causal" or "padding"
    dtype: torch.dtype
    n: int
    backward: bool
    batch: int
    n_heads: int = 12
    head_dim: int = 64

    @property
    def name(self) -> str:
        """Name it for a table and a test id."""
        pass_ = "forward+backward" if self.backward else "forward"
        return f"{str(self.dtype).removeprefix('torch.')}-{self.kind}-n{self.n}-{pass_}"


def attention_workloads(device: str = "cpu") -> list[Workload]:
    """List the workloads of the cost table."""
    if device == "cuda":
        shapes = [(8, 12, 512, 64), (1, 16, 8192, 128), (1, 16, 65536, 128)]
        return [
            Workload(kind, torch.bfloat16, n, backward, b, h, d)
            for b, h, n, d in shapes
            for kind in ("plain", "causal", "padding")
            for backward in (False, True)
        ]
    listed = []
    for backward in (False, True):
        sizes: list[tuple[str, torch.dtype, tuple[int, ...]]] = [
            ("plain", torch.float32, (128, 512, 2048)),
            ("plain", torch.bfloat16, (128, 512, 2048)),
            ("plain", torch.float16, (128, 512)),
            ("causal", torch.float32, (128, 512, 2048)),
            ("padding", torch.float32, (128, 512, 2048)),
        ]
        for kind, dtype, lengths in sizes:
            listed += [Workload(kind, dtype, n, backward, 8 if n <= 512 else 2) for n in lengths]
    return listed


def cases(settings: Settings) -> list[Case]:
    """List the workloads."""
    works = attention_workloads(settings.device)
    if settings.is_quick:
        works = [w._replace(n=16, batch=2, n_heads=2, head_dim=8) for w in works if w.n <= 128]
    names = (OURS, *(BACKENDS if settings.device == "cuda" else (TORCH,)))
    return [
        Case("attention", w.name, names, partial(run, w), _asked(w, settings.device)) for w in works
    ]


def _asked(work: Workload, device: str) -> dict[str, float]:
    if device == "cuda":
        return {"best": 1.02}
    key = (work.kind, work.dtype)
    if key == ("causal", torch.float32) and work.n == 512:
        return {TORCH: 0.85}
    return {
        ("plain", torch.float32): {TORCH: 1.10},
        ("plain", torch.bfloat16): {TORCH: 1.25},
        ("plain", torch.float16): {TORCH: 0.25} if work.backward else {},
        ("padding", torch.float32): {TORCH: 0.45},
    }.get(key, {})


def run(work: Workload, settings: Settings) -> Outcome:
    """Measure one workload."""
    return hold(contest(work, settings.device), settings)


def build(work: Workload) -> Pair:
    """Build ours and torch's own call on the CPU."""
    made = contest(work, "cpu").makers
    return made[OURS](), made[TORCH]()


def contest(work: Workload, device: str) -> Contest:
    """Build the inputs and the calls; padding keeps half of the keys."""
    b = work.batch
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        shape = (b, work.n_heads, work.n, work.head_dim)
        made = torch.randn(*shape, generator=generator).to(device, work.dtype)
        return made.requires_grad_(work.backward)

    q, k, v = draw(), draw(), draw()
    grad = draw().detach()
    mask, options = None, {}
    if work.kind == "causal":
        mask, options = Mask.causal(), {"is_causal": True}
    elif work.kind == "padding":
        keep = torch.arange(work.n) < _ends(b).mul(work.n).long()[:, None]
        mask, options = Mask.padding(keep.to(device)), {"attn_mask": keep.to(device)[:, None, None]}

    def finish(out: Tensor) -> list[Tensor]:
        return [out, *torch.autograd.grad(out, (q, k, v), grad)] if work.backward else [out]

    def torch_own(backend: SDPBackend | None) -> Call:
        def call() -> list[Tensor]:
            if backend is None:
                return finish(F.scaled_dot_product_attention(q, k, v, **options))
            with sdpa_kernel(backend):
                return finish(F.scaled_dot_product_attention(q, k, v, **options))

        if backend is not None:
            try:
                call()
            except RuntimeError as refused:
                raise ImportError(name=f"a kernel of {backend} for this mask") from refused
        return call

    makers = {OURS: lambda: lambda: finish(attention(q, k, v, mask=mask))}
    rivals = BACKENDS if device == "cuda" else {TORCH: None}
    makers |= {name: partial(torch_own, backend) for name, backend in rivals.items()}
    return Contest(makers, _occupancy(work, q, k, v), {OURS: 1.0, "": 1e4})


def _occupancy(work: Workload, q: Tensor, k: Tensor, v: Tensor) -> Callable[[Any], float]:
    """Give the error of 128 queries of one head as a share of the computed bound."""
    first = max(0, work.n - 128)  # the last queries see the most
    one = [x.detach()[:1, :1].cpu() for x in (q[:, :, first:], k, v)]
    keys, allowed = torch.arange(work.n), None
    if work.kind == "causal":
        allowed = (keys <= keys[first:, None])[None, None]
    elif work.kind == "padding":
        allowed = (keys < int(_ends(work.batch)[0] * work.n))[None, None, None]
    exact = reference_attention(*one, mask=allowed).out
    bound = attention_error_bound(*one, mask=allowed).out

    def error(result: Any) -> float:
        found = result[0].detach()[:1, :1, first:].cpu().double()
        return largest((found - exact) / bound)

    return error


def _ends(batch: int) -> Tensor:
    """Say what share of the keys each row keeps; the mean is a half."""
    return torch.linspace(0.1, 0.9, batch) if batch > 1 else torch.tensor([0.5])
