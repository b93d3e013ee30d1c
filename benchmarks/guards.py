"""What attention's guards and choices add to torch's kernel, as a share of an encoder's layer."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.contest import OURS, Case, Outcome, Row, Settings, timed
from benchmarks.interleave import in_turns
from stabletx import EncoderBlock, attention

KERNEL, LAYER = "torch SDPA", "an encoder's layer"


def cases(settings: Settings) -> list[Case]:
    """List the workloads."""
    shapes = [(8, 12, 128, 64), (8, 12, 512, 64), (1, 12, 2048, 64)]
    if settings.is_quick:
        shapes = [(1, 2, 8, 4)]
    names = (OURS, KERNEL, LAYER)
    return [
        Case("guards", "x".join(map(str, shape)), names, partial(run, shape)) for shape in shapes
    ]


def run(shape: tuple[int, ...], settings: Settings) -> Outcome:
    """Time attention, the kernel and a layer in the same rounds."""
    b, h, n, d = shape
    device = settings.device
    q, k, v = (torch.randn(*shape, device=device) for _ in range(3))
    x = torch.randn(b, n, h * d, device=device)
    block = EncoderBlock(h * d, h).to(device).eval()
    with torch.inference_mode():
        found = in_turns(
            {
                OURS: lambda: attention(q, k, v),
                KERNEL: lambda: F.scaled_dot_product_attention(q, k, v),
                LAYER: lambda: block(x),
            },
            rounds=settings.rounds,
            device=device,
        )
    rows = {name: timed(Row(), found[name], found[OURS]) for name in found}
    added = found[OURS].ms - found[KERNEL].ms
    about = {"added_ms": added, "share_of_the_layer": added / found[LAYER].ms}
    return Outcome(rows, about)
