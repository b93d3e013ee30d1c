"""What ``stabletx bench`` does: measure chosen parts, print, save and draw."""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import pictures, results
from benchmarks.contest import OURS, BenchmarkError, Case, Outcome, Settings
from benchmarks.machine import machine, short_name
from benchmarks.parts import chosen_cases


class Request(NamedTuple):
    """What the user asked for; None takes the default."""

    parts: Sequence[str] = ()
    device: str = "cpu"
    threads: int | None = None
    rounds: int = 9
    machine: str | None = None
    folder: Path | None = None
    is_quick: bool = False


def bench(request: Request, say: Callable[[str], None]) -> Path:
    """Measure, and return the results file.

    Raises:
        BenchmarkError: for an unknown part or device, a number that is not positive, or a wrong
            answer of stabletx itself; without matplotlib.
    """
    for name, value in (("threads", request.threads), ("rounds", request.rounds)):
        if value is not None and value < 1:
            raise BenchmarkError(f"{name} must be at least 1, got {name}={value}.")
    if request.machine is not None and not re.fullmatch(r"[\w.-]+", request.machine):
        raise BenchmarkError(
            "machine must be of letters, digits, '.', '_' and '-', "
            f"got machine={request.machine!r}."
        )
    if importlib.util.find_spec("matplotlib") is None:  # better said now than at the end
        raise BenchmarkError(
            "matplotlib must be installed, got none. Run: pip install 'stabletx[bench]'."
        )
    if request.is_quick and request.folder is None:
        raise BenchmarkError(
            "quick must come with a folder of its own, got none. Its sizes are no results: "
            "add --results FOLDER."
        )
    settings = Settings(request.device, request.rounds, request.is_quick)
    cases = chosen_cases(request.parts, settings)
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    folder = request.folder or results.folder()
    name = request.machine or short_name(request.device)
    path = folder / f"{name}--{request.device}.json"
    results.prepare(path)  # better refused now than after a quarter of an hour
    say(machine() + "\n")
    found: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}
    for i, case in enumerate(cases):
        start = time.perf_counter()
        outcome = case.run(settings)
        seconds[case.part] = seconds.get(case.part, 0.0) + time.perf_counter() - start
        say(table(case, outcome))
        found.setdefault(case.part, {})[case.name] = results.entry(case, outcome)
        if i + 1 == len(cases) or cases[i + 1].part != case.part:
            # A part is saved when it is whole, so that a run that is cut short loses one at most.
            own = {case.part: found[case.part]}
            results.save(path, request.device, own, seconds=seconds)
    say(f"Written to {path}")
    images = request.folder or pictures.IMAGES
    for picture in pictures.draw_all(results.read(path), images, path.stem):
        say(f"Drawn: {picture}")
    return path


def table(case: Case, outcome: Outcome) -> str:
    """Write what a workload found as lines of text."""
    lines = [f"{case.part}: {case.name}"]
    for name, row in outcome.rows.items():
        if row.reason:
            figures = f"not measured: {row.reason}"
        elif row.points:
            points = ", ".join(f"{n}: {x:.3g}" for n, x in row.points.items())
            figures = f"{case.unit} at {points}"
        else:
            figures = f"{row.ms:10.3f} ± {row.spread_ms:.3f} {case.unit}"
            if name != OURS and row.ratio is not None:
                figures += f"   ratio {row.ratio:.3f} ± {row.ratio_spread:.3f}"
            limit = case.asked.get(name)
            figures += "" if limit is None else f"   (asked: {limit:.2f})"
        lines.append(f"  {name:28} {figures}")
    if "best" in case.asked:
        ratios = [r.ratio for n, r in outcome.rows.items() if n != OURS and r.ratio is not None]
        best = f"ratio {max(ratios):.3f}" if ratios else "no peer"
        lines.append(f"  {'best of all':28} {best}   (asked: {case.asked['best']:.2f})")
    share = outcome.about.get("share_of_products")
    if share is not None:
        lines.append(f"  {'share of the product limit':28} {share:.2f}")
    return "\n".join(lines) + "\n"
