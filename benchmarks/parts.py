"""The parts of the suite, and the workloads of each."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from benchmarks import (
    attention,
    decode,
    encoder,
    functions,
    growth,
    guards,
    imports,
    memory,
    training,
)
from benchmarks.contest import BenchmarkError, Case, Settings

PARTS = {
    "encoder": encoder,
    "training": training,
    "decode": decode,
    "attention": attention,
    "functions": functions,
    "guards": guards,
    "growth": growth,
    "memory": memory,
    "import": imports,
}


def chosen_cases(parts: Iterable[str], settings: Settings) -> list[Case]:
    """List the workloads of some parts; of all where none is named.

    Raises:
        BenchmarkError: for a part that is unknown, or a device that is missing.
    """
    wanted = list(parts) or list(PARTS)
    for part in wanted:
        if part not in PARTS:
            raise BenchmarkError(f"part must be one of {', '.join(PARTS)}, got part={part!r}.")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("device must be there, got device='cuda'. Use --device cpu.")
    return [case for part in PARTS if part in wanted for case in PARTS[part].cases(settings)]
