"""How accurate the classifier that ``stabletx train`` makes is, on every named data set.

    python -m benchmarks.accuracy                     # every set, three seeds
    python -m benchmarks.accuracy --data sms trec     # these two anew, the others as they were

Each set and seed is a process of its own, ``stabletx train DATA --seed SEED``; the test rows are
seen once, at the end. Writes docs/accuracy.md and docs/accuracy.json, and again after every set, so
that a run that is cut short leaves whole tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from stabletx.data import NAMES
from stabletx.training.checkpoint import write_atomically, write_json

COMMAND = "python -m benchmarks.accuracy"
COLUMNS = (
    "data",
    "classes",
    "train / test",
    "accuracy, mean ± spread (each seed)",
    "macro-F1",
    "calibration error",
    "TF-IDF + LR",
    "ahead by, points",
    "training, s",
    "peak memory, MB",
)


def measure(data: str, seed: int, *, baseline: bool) -> dict[str, Any]:
    """Train once and return what is worth keeping."""
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-m", "stabletx.cli", "train", data, "--seed", str(seed)]
        command += ["--runs", runs, "--name", "run"] + ["--no-baseline"] * (not baseline)
        subprocess.run(command, check=True)
        outcome = json.loads(Path(runs, "run", "metrics.json").read_text(encoding="utf-8"))
    rivals = {own["name"]: own for own in outcome["baselines"]}
    return {
        "seed": seed,
        "accuracy": outcome["accuracy"],
        "macro_f1": outcome["macro_f1"],
        "calibration_error": outcome["test"]["calibration_error"],
        "classes": len(outcome["test"]["classes"]),
        "test_rows": outcome["test"]["n_rows"],
        "train_rows": sum(outcome["checks"]["labels"]["train"].values()),
        "majority": rivals["majority class"]["accuracy"],
        "tfidf": rivals.get("TF-IDF + logistic regression"),
        "versions": outcome["versions"],
        **{name: outcome["training"][name] for name in ("seconds", "steps", "peak_memory_mb")},
    }


def row(data: str, runs: list[dict[str, Any]]) -> str:
    """Write the runs of one data set as a line of the table."""
    accuracies = [own["accuracy"] for own in runs]
    first, mean = runs[0], statistics.mean(accuracies)
    spread = statistics.stdev(accuracies) if len(runs) > 1 else 0.0
    each = ", ".join(f"{a:.4f}" for a in accuracies)
    tfidf = first["tfidf"]["accuracy"] if first["tfidf"] else None
    cells = [
        data,
        str(first["classes"]),
        f"{first['train_rows']:,} / {first['test_rows']:,}",
        f"**{mean:.4f}** ± {spread:.4f} ({each})",
        f"{statistics.mean(own['macro_f1'] for own in runs):.4f}",
        f"{statistics.mean(own['calibration_error'] for own in runs):.3f}",
        "not measured" if tfidf is None else f"{tfidf:.4f}",
        "" if tfidf is None else f"{100 * (mean - tfidf):+.1f}",
        f"{statistics.mean(own['seconds'] for own in runs):.0f}",
        str(max(own["peak_memory_mb"] or 0 for own in runs)),
    ]
    return f"| {' | '.join(cells)} |\n"


def page(found: dict[str, list[dict[str, Any]]]) -> str:
    """Write the whole page."""
    versions = next(iter(found.values()))[0]["versions"]
    about = ", ".join(f"{name} {value}" for name, value in versions.items())
    header = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|\n"
    lines = "".join(row(data, runs) for data, runs in found.items())
    return (
        "# Accuracy of the default classifier\n\n"
        "Trained from nothing with the defaults of `stabletx train`; test rows are never trained "
        "on and choose nothing. The spread is the standard deviation over the seeds. A negative "
        "number of points means that TF-IDF with logistic regression wins. Peak memory is that of "
        "the whole process, baseline and pictures included.\n\n"
        f"{header}{lines}\n"
        f"Made by `{COMMAND}` with {about}.\n"
    )


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--docs", type=Path, default=Path(__file__).parents[1] / "docs")
    args = parser.parse_args()
    args.docs.mkdir(parents=True, exist_ok=True)
    before = args.docs / "accuracy.json"
    found: dict[str, list[dict[str, Any]]] = (
        json.loads(before.read_text(encoding="utf-8"))["runs"] if before.exists() else {}
    )
    for data in args.data:
        found[data] = [measure(data, seed, baseline=seed == args.seeds[0]) for seed in args.seeds]
        write_atomically(args.docs / "accuracy.md", page(found).encode())
        made = {"finished": time.strftime("%Y-%m-%d"), "runs": found}
        write_json(args.docs / "accuracy.json", made)
    print(page(found))


if __name__ == "__main__":
    main()
