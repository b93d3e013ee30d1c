"""What importing costs, each in processes of their own, turn by turn."""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.contest import OURS, Case, Outcome, Row, Settings
from benchmarks.interleave import spread

BARE = "torch alone"
STATEMENTS = {
    OURS: "import torch; from stabletx import Decoder, Encoder, SequenceClassifier, attention",
    BARE: "import torch",
    "transformers": "import torch; from transformers import BertModel",
    "x-transformers": "import torch; import x_transformers",
    "ONNX Runtime": "import onnxruntime",
    "CTranslate2": "import ctranslate2",
}
PACKAGES = {
    "transformers": "transformers",
    "x-transformers": "x_transformers",
    "ONNX Runtime": "onnxruntime",
    "CTranslate2": "ctranslate2",
}


def cases(settings: Settings) -> list[Case]:
    """List the one workload."""
    names = (OURS, BARE) if settings.is_quick else tuple(STATEMENTS)
    return [Case("import", "import", names, lambda own: run(names, own))]


def run(names: tuple[str, ...], settings: Settings) -> Outcome:
    """Import each in turns; processor time, which others on the machine disturb least."""
    rows = {name: Row() for name in names}
    for name in names:
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            rows[name].reason = f"{PACKAGES[name]} is not installed"
    for _ in range(min(settings.rounds, 3)):
        for name, row in rows.items():
            if not row.reason:
                row.rounds_ms.append(1e3 * _seconds(STATEMENTS[name]))
    ours = rows[OURS].rounds_ms
    for row in rows.values():
        if row.rounds_ms:
            ratios = [a / b for a, b in zip(ours, row.rounds_ms, strict=True)]
            row.ms, row.spread_ms = statistics.median(row.rounds_ms), spread(row.rounds_ms)
            row.ratio, row.ratio_spread = statistics.median(ratios), spread(ratios)
    added = statistics.median(a - b for a, b in zip(ours, rows[BARE].rounds_ms, strict=True))
    return Outcome(rows, {"added_to_torch_ms": added})


def _seconds(statement: str) -> float:
    code = f"import time; s = time.process_time(); {statement}; print(time.process_time() - s)"
    command = [sys.executable, "-c", code]
    root = Path(__file__).parent.parent  # a clone need not be installed
    done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    return float(done.stdout)
