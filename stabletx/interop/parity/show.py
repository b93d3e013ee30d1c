"""A comparison as a table and as a picture."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from stabletx.interop.parity.compare import Comparison, Finding
from stabletx.training.plots import Axes, save_picture

HEADER = (
    "environment", "largest change", "mean change", "labels changed", "rounding explains",
    "padding", "seconds",
)  # fmt: skip
_MARKS = "osD^vP*Xd<>h"


def cells(finding: Finding) -> tuple[str, ...]:
    """Give a line of the table."""
    worst = f"{max(finding.ratios, default=0.0):.2f} of it"
    cause = f"not from {finding.diverges_at} on" if finding.diverges_at else f"yes, {worst}"
    empty = "" if finding.empty_is_finite else "empty row not finite"
    leak = "" if finding.ignores_padding else "leaks"
    return (
        finding.name,
        f"{finding.largest_change:.1e}",
        f"{finding.mean_change:.1e}",
        f"{finding.changed_labels:.2%}",
        cause if finding.ratios else "not seen",
        "; ".join(x for x in (leak, empty) if x) or "absent",
        f"{finding.seconds:.2f}",
    )


def print_table(comparison: Comparison, stream: TextIO | None = None) -> None:
    """Write the table: by rich where it is installed and the stream is a terminal."""
    stream = sys.stdout if stream is None else stream
    rows = [cells(finding) for finding in comparison.findings]
    if stream.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            table = Table(*HEADER)
            for row in rows:
                table.add_row(*row)
            Console(file=stream).print(table)
            return
    widths = [max(len(row[i]) for row in (HEADER, *rows)) for i in range(len(HEADER))]
    for row in (HEADER, *rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        stream.write(line.rstrip() + "\n")


def save_parity_picture(path: Path, comparison: Comparison) -> Path:
    """Draw how far each environment is from float64, layer by layer, into a PNG file.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    return save_picture(path, lambda ax: plot_parity(ax, comparison), size=(8.4, 4.8))


def plot_parity(ax: Axes, comparison: Comparison) -> Axes:
    """Draw the distances from float64, and what rounding explains as grey bands."""
    x = range(len(comparison.stages))
    for shade, (dtype, sizes) in zip(("#00000010", "#00000018"), _bands(comparison), strict=False):
        ax.fill_between(x, _floor(comparison), sizes, color=shade, label=f"{dtype}: by rounding")
    colors = _colors()
    for i, finding in enumerate(comparison.findings):
        if any(finding.distances):
            ax.plot(
                x, finding.distances, marker=_MARKS[i % len(_MARKS)], markersize=5, alpha=0.8,
                linewidth=1, color=colors[i % len(colors)], label=finding.name,
            )  # fmt: skip
    ax.set_yscale("log")
    ax.set_xticks(x, comparison.stages, rotation=45, ha="right")
    ax.set_ylabel("distance from float64 (worst token)")
    ax.set_title(f"Where environments part ({comparison.n_rows} texts)")
    ax.grid(alpha=0.25)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    return ax


def _bands(comparison: Comparison) -> list[tuple[str, Sequence[float]]]:
    shown = [(dtype, sizes) for dtype, sizes in comparison.rounding.items() if dtype != "float64"]
    return sorted(shown, key=lambda own: own[1][-1], reverse=True)


def _floor(comparison: Comparison) -> float:
    every = [d for finding in comparison.findings for d in finding.distances if d > 0]
    return 0.5 * min(every, default=1e-12)


def _colors() -> list[Any]:
    return ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"]
