"""Peak memory of one forward pass against length, each in a process of its own.

``python -m benchmarks.memory IMPLEMENTATION LENGTH DEVICE THREADS`` prints the MB that one pass of
a layer of width 384 adds to what the model and its input hold, and those of the whole process.
"""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import weights
from benchmarks.contest import OURS, Case, Outcome, Row, Settings
from benchmarks.encoder import HF, TORCH
from benchmarks.errors import BenchmarkError

EAGER, EXPECTED = "Hugging Face eager", "expected"
LENGTHS = {
    OURS: (1024, 4096, 16384, 65536),
    TORCH: (1024, 4096, 16384),
    HF: (1024, 4096, 16384),
    EAGER: (1024, 4096),
}
WIDTH, HEADS = 384, 6


def cases(settings: Settings) -> list[Case]:
    """List the one workload."""
    lengths = {OURS: (1024,)} if settings.is_quick else LENGTHS
    names = (*lengths, EXPECTED)
    return [Case("memory", "forward", names, partial(run, lengths), unit="MB")]


def run(lengths: dict[str, tuple[int, ...]], settings: Settings) -> Outcome:
    """Measure every implementation at its lengths."""
    rows = {name: Row() for name in (*lengths, EXPECTED)}
    whole = 0.0
    for name, own in lengths.items():
        for n in own:
            try:
                rows[name].points[str(n)], in_all = _measured_mb(name, n, settings.device)
                whole = in_all if name == OURS else whole
            except ImportError as missing:
                rows[name].reason = f"{missing.name} is not installed"
                break
    most = max(n for own in lengths.values() for n in own)
    for n in sorted({n for own in lengths.values() for n in own}):
        share = n / most  # memory that is linear in the length, from the longest backwards
        rows[EXPECTED].points[str(n)] = share * rows[OURS].points[str(most)]
    about = {"width": WIDTH, "layers": 1, "longest": most, "process_mb_at_the_longest": whole}
    return Outcome(rows, about)


def _measured_mb(name: str, n: int, device: str) -> tuple[float, float]:
    command = [sys.executable, "-m", "benchmarks.memory", name, str(n), device]
    command.append(str(torch.get_num_threads()))
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode == 3:
        raise ImportError(name=done.stdout.splitlines()[-1])
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command[1:])} failed: {done.stderr.strip()[-500:]}")
    return _figures(done.stdout)


def _figures(printed: str) -> tuple[float, float]:
    added, whole = map(float, printed.splitlines()[-1].split())  # above it, what a peer printed
    return added, whole


def _model(name: str, sizes: weights.Sizes) -> Any:
    ours = weights.encoder(sizes)
    if name == OURS:
        return ours
    if name == TORCH:
        return weights.TorchModel(weights.of(ours), sizes.n_heads)
    kind = "eager" if name == EAGER else "sdpa"
    return weights.bert(weights.of(ours), sizes.n_heads, attention=kind)


def _added_and_whole_mb(name: str, n: int, device: str) -> tuple[float, float]:
    model = _model(name, weights.Sizes(WIDTH, 1, HEADS, n, vocab_size=100)).to(device)
    ids = torch.randint(1, 100, (1, n), device=device)
    with torch.inference_mode():
        model(ids[:, :64])  # what is set up once does not count
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(ids)
            peak = torch.cuda.max_memory_allocated()
            return (peak - before) / 2**20, peak / 2**20
        before = _peak_kib(restart=True)
        model(ids)
        peak = _peak_kib()
        return (peak - before) / 1024, peak / 1024


def _peak_kib(*, restart: bool = False) -> int:
    """Read the most memory so far; on Linux the count can restart from what is held now."""
    status = Path("/proc/self/status")
    if not status.exists():
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most // 1024 if sys.platform == "darwin" else most  # there in bytes
    if restart:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    try:
        found = _added_and_whole_mb(sys.argv[1], int(sys.argv[2]), sys.argv[3])
        print("\n", *found)  # on a line of its own: a peer may have left one open
    except ImportError as missing:
        print(f"\n{missing.name}")
        sys.exit(3)
