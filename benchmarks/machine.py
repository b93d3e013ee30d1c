"""What the figures are measured on, and the limits of that machine."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import stabletx

PEERS = ("transformers", "x-transformers", "onnxruntime", "ctranslate2")
GEMM = 2048  # rows and columns of the product that stands for the limit
READ_BYTES = 2**28  # far beyond any cache
FLOPS_OF_GEMM = 2 * GEMM**3


def machine() -> str:
    """Say in a line what the figures were measured on."""
    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def processor(device: str = "cpu") -> str:
    """Name the processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo") as lines:
            return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def short_name(device: str = "cpu") -> str:
    """Name the machine as a results file is called."""
    return re.sub(r"[^a-z0-9]+", "-", processor(device).lower()).strip("-") or "machine"


def describe(device: str) -> dict[str, Any]:
    """Give all that a figure depends on beside the code."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PEERS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "device": device,
        "processor": processor(device),
        "threads": torch.get_num_threads(),
        "bf16 instructions": torch.cpu._is_avx512_bf16_supported() if device == "cpu" else True,
        "versions": {"stabletx": stabletx.__version__, **versions},
    }


def commit() -> str:
    """Name the commit that is measured; an ending "+" says that files differ from it."""
    root = Path(__file__).parent.parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return ""

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "stabletx")
    return (git("rev-parse", "--short", "HEAD").strip() or "unknown") + ("+" if changed else "")


def limits(dtype: torch.dtype, device: str) -> dict[str, Callable[[], object]]:
    """Build what stands for the machine's limits, to be timed in the same rounds.

    The product limit is the fastest of torch's own product and oneDNN's with prepacked weights
    (on some processors the two differ by half); the bandwidth is that of one read of memory.
    """
    a, b = (torch.randn(GEMM, GEMM, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    data = torch.ones(READ_BYTES // 8, dtype=torch.float64, device=device)
    found: dict[str, Callable[[], object]] = {
        "limit: torch.mm": lambda: torch.mm(a, b, out=out),
        "limit: read": data.sum,
    }
    pointwise = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if device == "cpu" and pointwise is not None and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(b, GEMM)
        found["limit: oneDNN"] = lambda: pointwise(a, packed, None, "none", [], "")
    return found
