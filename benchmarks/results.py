"""The committed results: one file a machine and device, one entry a part."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import stabletx
from benchmarks.contest import BenchmarkError, Case, Outcome
from benchmarks.machine import commit, describe

ROOT = Path(__file__).parent / "results"


def folder() -> Path:
    """Give the folder of this version's results."""
    return ROOT / stabletx.__version__


def entry(case: Case, outcome: Outcome) -> dict[str, Any]:
    """Turn what a workload found into what JSON can hold, without the empty fields."""
    rows = {}
    for name, row in outcome.rows.items():
        kept = {key: value for key, value in asdict(row).items() if value not in (None, "", [], {})}
        rows[name] = kept
    return {"unit": case.unit, "asked": case.asked, "about": outcome.about, "rows": rows}


def save(
    path: Path, device: str, parts: Mapping[str, Mapping[str, Any]], *, seconds: Mapping[str, float]
) -> Path:
    """Write parts into a results file; those that were not run again stay as they are.

    Raises:
        BenchmarkError: if the file that stands there is not one of ours.
    """
    known = read(path)["parts"] if path.exists() else {}
    today = datetime.now(UTC).date().isoformat()
    for part, workloads in parts.items():
        known[part] = {
            "commit": commit(),
            "date": today,
            "seconds": round(seconds.get(part, 0.0)),
            "machine": describe(device),
            "workloads": workloads,
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".part")
    written.write_text(json.dumps({"format": 1, "parts": known}, indent=1) + "\n", encoding="utf-8")
    os.replace(written, path)
    return path


def prepare(path: Path) -> None:
    """Make the folder of a results file and try to write there.

    Raises:
        BenchmarkError: if that cannot be, or the file that stands there is not one of ours.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            exists = path.exists()
    except OSError as error:
        raise BenchmarkError(
            f"results must be a folder that can be written to, got results={path.parent}: {error}."
        ) from error
    if exists:
        read(path)


def read(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        BenchmarkError: if it is missing or not one of ours.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{path} must be a results file, got {error}.") from error
    is_ours = isinstance(found, dict) and found.get("format") == 1
    if not is_ours or not isinstance(found.get("parts"), dict):
        raise BenchmarkError(f"{path} must be a results file of format 1. Move it away.")
    return found
