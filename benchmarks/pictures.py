"""Pictures of a results file: time and memory against length, and ratio bars.

The colours are those of Okabe and Ito, which the colour-blind can tell apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.contest import OURS

BLUE, RED, GREY = "#0072B2", "#D55E00", "#666666"
STYLES = {
    "stabletx": (BLUE, "o", "-"),
    "expected": (GREY, "", "--"),
    "attention alone (torch)": ("#999999", "", ":"),
    "nn.TransformerEncoder": ("#009E73", "s", "-"),
    "Hugging Face sdpa": (RED, "^", "-"),
    "Hugging Face eager": ("#CC79A7", "v", "-"),
}
IMAGES = Path(__file__).parent.parent / "docs" / "images"
LENGTH_LABEL = "length of a sequence, tokens"
BAR_PARTS = ("encoder", "training", "decode", "attention", "functions")
LONGEST_BAR = 1.6  # a longer one is cut off, and its figure says how long it is

Axes = Any  # a matplotlib Axes; matplotlib is loaded when the first picture is drawn


def picture_name(machine: str, part: str) -> str:
    """Name the picture of a part; ``machine`` is the stem of the results file."""
    return f"speed-{machine}-{part}.png"


def draw_all(found: Mapping[str, Any], folder: Path, machine: str) -> Iterator[Path]:
    """Draw every picture that the parts of a results file allow."""
    parts = found["parts"]
    for part, draw in (("growth", _draw_growth), ("memory", _draw_memory)):
        for entry in parts.get(part, {}).get("workloads", {}).values():
            yield _save(folder / picture_name(machine, part), draw, entry, (6.4, 4.2))
    for part in BAR_PARTS:
        workloads = parts.get(part, {}).get("workloads", {})
        bars = list(bars_of(workloads))
        if bars:
            height = 1.0 + 0.2 * len(bars)
            if len(bars) > len(workloads):  # each workload has a heading
                height += 0.32 * len(workloads)
            yield _save(
                folder / picture_name(machine, part),
                lambda ax, own, part=part: draw_bars(ax, own, part),
                bars,
                (7.6, height),
            )


class Bar(NamedTuple):
    """A peer that was timed, the ratio to it, and what was asked for."""

    workload: str
    peer: str
    ratio: float
    spread: float
    asked: float | None


def bars_of(workloads: Mapping[str, Any]) -> Iterator[Bar]:
    """Give a bar for every peer that was timed."""
    for workload, entry in workloads.items():
        peers = {
            name: row for name, row in entry["rows"].items() if name != OURS and "ratio" in row
        }
        best = max((row["ratio"] for row in peers.values()), default=None)
        for name, row in peers.items():
            asked = entry["asked"].get(name)
            if asked is None and row["ratio"] == best:
                asked = entry["asked"].get("best")
            yield Bar(workload, name, row["ratio"], row.get("ratio_spread", 0.0), asked)


def draw_bars(ax: Axes, bars: list[Bar], part: str) -> Axes:
    """Draw ratios as bars, stabletx / peer: left of 1 stabletx is faster; a tick where asked.

    Peers of one workload stand below its name; where there is but one, the workload is the label.
    """
    counts = Counter(bar.workload for bar in bars)
    has_headings = max(counts.values()) > 1
    y, places, labels, last = 0.0, [], [], None
    for bar in bars:
        if has_headings and bar.workload != last:
            y += 0.0 if last is None else 0.6
            ax.text(0.0, y, bar.workload, va="center", fontsize=8, fontweight="bold")
            y, last = y + 1.0, bar.workload
        shown = min(bar.ratio, LONGEST_BAR)
        color = BLUE if bar.ratio <= 1.0 else RED
        error = None if bar.ratio > LONGEST_BAR else bar.spread / 2
        ax.barh(y, shown, height=0.72, color=color, alpha=0.85, xerr=error, ecolor=GREY)
        ax.text(LONGEST_BAR + 0.12, y, f"{bar.ratio:.2f}", va="center", ha="right", fontsize=8)
        if bar.asked is not None:
            ax.plot([bar.asked] * 2, [y - 0.45, y + 0.45], color="black", linewidth=2)
        places.append(y)
        labels.append(bar.peer if has_headings else bar.workload)
        y += 1.0
    ax.axvline(1.0, color=GREY, linewidth=1)
    ax.set_yticks(places, labels, fontsize=8)
    ax.set_ylim(y - 0.4, -0.8)
    ax.set_xlim(0, LONGEST_BAR)
    ax.tick_params(axis="x", labelsize=8)
    ax.set_xlabel("time of stabletx / time of the peer; left of 1 is faster", fontsize=8)
    black = "; black: what was asked for" if any(bar.asked is not None for bar in bars) else ""
    peer = "" if has_headings else f" against {bars[0].peer}"
    ax.set_title(f"{part.capitalize()}{peer}: median over rounds in turns{black}", fontsize=9)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return ax


def _draw_growth(ax: Axes, entry: Mapping[str, Any]) -> Axes:
    _curves(ax, entry["rows"])
    ax.set_ylabel("time, µs a token")
    sizes = entry["about"]["sizes"]
    title = f"Time per token of one layer, width {sizes['d_model']}, the same number of tokens"
    ax.set_title(title, fontsize=10)
    return ax


def _draw_memory(ax: Axes, entry: Mapping[str, Any]) -> Axes:
    _curves(ax, entry["rows"])
    ax.set_ylabel("peak memory over model and input, MB")
    ax.set_title(f"Memory of a forward pass, width {entry['about']['width']}", fontsize=10)
    return ax


def _curves(ax: Axes, rows: Mapping[str, Any]) -> None:
    for name, row in rows.items():
        points = {int(n): y for n, y in row.get("points", {}).items() if y > 0}
        if not points:
            continue
        color, marker, line = STYLES[name]
        label = name if name != "expected" else "expected growth"
        ax.plot(
            list(points), list(points.values()), color=color, marker=marker, linestyle=line,
            label=label, markersize=5,
        )  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel=LENGTH_LABEL)
    lengths = sorted({int(n) for row in rows.values() for n in row.get("points", {})})
    ax.set_xticks(lengths, [f"{n:,}" for n in lengths], fontsize=8)
    ax.minorticks_off()
    ticks = _round_ticks(ax)
    ax.set_yticks(ticks, [f"{y:,g}" for y in ticks], fontsize=8)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=8)


def _round_ticks(ax: Axes) -> list[float]:
    """Give 1, 2 and 5 times powers of ten within the axis: plain numbers, not exponents."""
    low, high = ax.get_ylim()
    every = [m * 10.0**e for e in range(-6, 10) for m in (1, 2, 5)]
    inside = [y for y in every if low <= y <= high]
    return inside if len(inside) <= 10 else [y for y in inside if f"{y:e}".startswith("1.")]


def _save(path: Path, draw: Any, given: Any, size: tuple[float, float]) -> Path:
    """Draw into a PNG file without touching any global state of matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=size, dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.add_subplot(), given)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
