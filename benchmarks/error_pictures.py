"""Draw the error of attention against length and against a common logit offset.

``python -m benchmarks.error_pictures`` writes docs/images/error-*.png and prints the figures.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
import torch.nn.functional as F
from torch import Tensor

from stabletx import attention
from stabletx.testing import condition_scales, condition_ulps, reference_attention
from stabletx.testing.reference import reference_gradients

mpl.use("Agg")
import matplotlib.pyplot as plt

IMAGES = Path(__file__).parent.parent / "docs" / "images"
METHODS: dict[str, Callable[..., Tensor]] = {
    "stabletx auto": lambda q, k, v, scale: attention(q, k, v, scale=scale),
    "stabletx tiled": lambda q, k, v, scale: attention(q, k, v, scale=scale, method="tiled"),
    "stabletx exact": lambda q, k, v, scale: attention(q, k, v, scale=scale, method="exact"),
    "torch": lambda q, k, v, scale: F.scaled_dot_product_attention(q, k, v, scale=scale),
}
STYLES = {
    "stabletx auto": ("#0072B2", "o", "-"),
    "stabletx tiled": ("#009E73", "s", "--"),
    "stabletx exact": ("#CC79A7", "^", ":"),
    "torch": ("#D55E00", "x", "-"),
}


def against_length(dtype: torch.dtype, lengths: list[int]) -> dict[str, list[float]]:
    """Measure the largest output error of 16 queries over n keys, in cULP."""
    found: dict[str, list[float]] = {name: [] for name in METHODS}
    for n in lengths:
        r = torch.Generator().manual_seed(n)
        q = torch.randn(1, 2, 16, 64, generator=r).to(dtype)
        k, v = (torch.randn(1, 2, n, 64, generator=r).to(dtype) for _ in range(2))
        exact, scale = reference_attention(q, k, v).out, condition_scales(q, k, v).out
        for name, method in METHODS.items():
            found[name].append(float(condition_ulps(method(q, k, v, None), exact, scale).max()))
    return found


def against_offset(offsets: list[float]) -> dict[str, list[float]]:
    """Measure the largest error of the values' gradient in float32, in cULP."""
    found: dict[str, list[float]] = {name: [] for name in METHODS}
    for offset in offsets:
        r = torch.Generator().manual_seed(0)
        small = torch.randint(-2, 3, (2, 1, 2, 256, 15), generator=r).float()
        ones = torch.ones(1, 2, 256, 1)
        q, k = torch.cat([ones, small[0]], -1), torch.cat([offset * ones, small[1] / 4], -1)
        v, g = (torch.randn(1, 2, 256, 16, generator=r) for _ in range(2))
        exact = reference_gradients(q, k, v, g, scale=1.0).dv
        scale = condition_scales(q, k, v, scale=1.0, grad_out=g).dv
        assert scale is not None
        for name, method in METHODS.items():
            leaf = v.clone().requires_grad_()
            grad = torch.autograd.grad(method(q, k, leaf, 1.0), leaf, g)[0]
            found[name].append(float(condition_ulps(grad, exact, scale).max()))
    return found


def draw(x: list[float], found: dict[str, list[float]], title: str, label: str, name: str) -> None:
    """Draw one picture and print its figures."""
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for method, ys in found.items():
        color, marker, line = STYLES[method]
        axes.plot(x, ys, color=color, marker=marker, linestyle=line, label=method)
        print(f"{title} | {method} | " + " ".join(f"{y:.3g}" for y in ys))
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="largest error, cULP", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(IMAGES / name, dpi=120)
    plt.close(figure)


def main() -> None:
    """Draw the pictures."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    lengths = [16, 64, 256, 1024, 4096, 16384]
    for dtype in (torch.float32, torch.bfloat16):
        title = f"Output error against length, {str(dtype).removeprefix('torch.')}"
        name = f"error-length-{str(dtype).removeprefix('torch.')}.png"
        draw([*map(float, lengths)], against_length(dtype, lengths), title, "keys", name)
    offsets = [1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6]
    title = "Gradient of the values against a common logit offset, float32"
    draw(offsets, against_offset(offsets), title, "offset added to every score", "error-offset.png")


if __name__ == "__main__":
    main()
