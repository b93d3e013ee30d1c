"""What attention is timed on: each workload builds two callables that do the same work."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stabletx import Mask, attention

Pair = tuple[Callable[[], object], Callable[[], object]]


class Workload(NamedTuple):
    """One line of the table."""

    kind: str  # "plain", "causal" or "padding"
    dtype: torch.dtype
    n: int
    backward: bool

    @property
    def name(self) -> str:
        """Name it for a table and a test id."""
        pass_ = "forward+backward" if self.backward else "forward"
        return f"{str(self.dtype).removeprefix('torch.')}-{self.kind}-n{self.n}-{pass_}"


def attention_workloads() -> list[Workload]:
    """List the workloads of the cost table."""
    listed = []
    for backward in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            listed += [Workload("plain", dtype, n, backward) for n in (128, 512, 2048)]
        listed += [Workload("plain", torch.float16, n, backward) for n in (128, 512)]
        listed += [Workload("causal", torch.float32, n, backward) for n in (128, 512, 2048)]
        listed += [Workload("padding", torch.float32, n, backward) for n in (128, 512, 2048)]
    return listed


def build(work: Workload) -> Pair:
    """Build ours and torch's own call for a workload; padding keeps half of the keys."""
    b = 8 if work.n <= 512 else 2
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        made = torch.randn(b, 12, work.n, 64, generator=generator).to(work.dtype)
        return made.requires_grad_(work.backward)

    q, k, v = draw(), draw(), draw()
    grad = draw().detach()
    mask, options = None, {}
    if work.kind == "causal":
        mask, options = Mask.causal(), {"is_causal": True}
    elif work.kind == "padding":
        lengths = torch.linspace(0.1, 0.9, b).mul(work.n).long()
        keep = torch.arange(work.n) < lengths[:, None]
        mask, options = Mask.padding(keep), {"attn_mask": keep[:, None, None]}

    def finish(out: Tensor) -> list[Tensor]:
        return [out, *torch.autograd.grad(out, (q, k, v), grad)] if work.backward else [out]

    return (
        lambda: finish(attention(q, k, v, mask=mask)),
        lambda: finish(F.scaled_dot_product_attention(q, k, v, **options)),
    )
