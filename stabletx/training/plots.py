"""Pictures of a run, one function each: axes in, the same axes out.

The colours are those of Okabe and Ito, which the colour-blind can tell apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stabletx.data.errors import optional
from stabletx.training.attention_maps import AttentionMap
from stabletx.training.events import Event
from stabletx.training.metrics import Metrics

Axes = Any  # a matplotlib Axes; matplotlib is loaded when the first picture is drawn

_BLUE, _RED, _GREY = "#0072B2", "#D55E00", "#666666"
_CELLS_WITH_NUMBERS = 14  # classes; more leave no room
_CLASSES_WITH_NAMES = 40
_LABEL_WIDTH = 18  # characters


def save_picture(
    path: Path, draw: Callable[[Axes], Axes], *, size: tuple[float, float] = (6.4, 4.2)
) -> Path:
    """Draw into a PNG file of its own, without touching any global state of matplotlib.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    optional("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=size, dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.add_subplot())
    # With square cells the first layout is only a guess: what it cuts off, "tight" brings back.
    figure.savefig(path, bbox_inches="tight", pad_inches=0.1)
    return path


def plot_loss(ax: Axes, events: Sequence[Event]) -> Axes:
    """Draw the loss over the steps."""
    return _plot_curve(ax, events, "loss", "loss (nats)")


def plot_accuracy(ax: Axes, events: Sequence[Event]) -> Axes:
    """Draw the accuracy over the steps."""
    return _plot_curve(ax, events, "accuracy", "accuracy")


def plot_confusion(ax: Axes, metrics: Metrics) -> Axes:
    """Draw which classes are taken for which: rows are the truth, shaded by their share."""
    n = len(metrics.classes)
    names = [_short(score.label) for score in metrics.classes]
    shares = [[cell / max(sum(row), 1) for cell in row] for row in metrics.confusion]
    image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if n <= _CELLS_WITH_NUMBERS:
        for i, row in enumerate(metrics.confusion):
            for j, cell in enumerate(row):
                color = "white" if shares[i][j] > 0.5 else "black"
                size = 10 if n <= 8 else 7
                ax.text(j, i, str(cell), ha="center", va="center", color=color, fontsize=size)
    if n <= _CLASSES_WITH_NAMES:
        size = 10 if n <= 8 else 7
        ax.set_xticks(range(n), names, rotation=45, ha="right", fontsize=size)
        ax.set_yticks(range(n), names, fontsize=size)
    ax.set_xlabel("predicted")
    ax.set_ylabel("true")
    ax.set_title(f"Which class was taken for which ({metrics.n_rows} test texts)")
    ax.figure.colorbar(image, ax=ax, label="share of the true class", fraction=0.046)
    return ax


def plot_calibration(ax: Axes, metrics: Metrics) -> Axes:
    """Draw how often the model is right where it says how sure it is."""
    full = [own for own in metrics.bins if own.n]
    most = max(own.n for own in full)
    width = metrics.bins[0].high - metrics.bins[0].low
    ax.bar(
        [own.low + width / 2 for own in full],
        [0.25 * own.n / most for own in full],
        width=0.9 * width,
        color="#bbbbbb",
        label=f"texts in the bin (at most {most})",
    )
    ax.plot([0, 1], [0, 1], linestyle="--", color=_GREY, label="as sure as right")
    ax.plot(
        [own.confidence for own in full],
        [own.accuracy for own in full],
        marker="o",
        color=_BLUE,
        label="this model",
    )
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1.02)
    ax.set_xlabel("how sure the model is (highest probability)")
    ax.set_ylabel("how often it is right")
    ax.set_title(f"Calibration: expected error {metrics.calibration_error:.3f}")
    ax.legend(loc="upper left", frameon=False)
    return ax


def plot_attention(ax: Axes, example: AttentionMap) -> Axes:
    """Draw one text's attention weights: each row is a token and what it looks at."""
    n = len(example.tokens)
    names = [_short(token) for token in example.tokens]
    size = 9 if n <= 24 else 6
    image = ax.imshow(example.weights.tolist(), cmap="cividis", vmin=0)
    ax.set_xticks(range(n), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=size)
    ax.set_yticks(range(n), names, fontsize=size)
    ax.set_xlabel("token looked at")
    ax.set_ylabel("token looking")
    verdict = "right" if example.label == example.predicted else f"truly {_short(example.label)}"
    answer = f"{_short(example.predicted)} ({example.probability:.0%}, {verdict})"
    ax.set_title(f"Attention of the last block\n{answer}", fontsize=11)
    ax.figure.colorbar(image, ax=ax, label="weight, mean over heads", fraction=0.046)
    return ax


def _plot_curve(ax: Axes, events: Sequence[Event], what: str, name: str) -> Axes:
    steps = [event for event in events if event["event"] == "step"]
    rounds = [event for event in events if event["event"] == "validation"]
    x, y = [event["step"] for event in steps], [event[what] for event in steps]
    ax.plot(x, y, color=_BLUE, alpha=0.2, linewidth=0.8)
    ax.plot(x, _smooth(y), color=_BLUE, label="train (with dropout)")
    ax.plot(
        [event["step"] for event in rounds],
        [event[what] for event in rounds],
        color=_RED,
        marker="o",
        markersize=4,
        label="validation",
    )
    best = [event for event in rounds if event["is_best"]]
    if best:
        kept = best[-1]
        ax.plot(
            kept["step"], kept[what], marker="*", markersize=14, color=_RED, linestyle="none",
            markeredgecolor="white", label=f"kept: epoch {kept['epoch']}",
        )  # fmt: skip
    ax.set_xlabel("step")
    ax.set_ylabel(name)
    ax.set_title(f"{what.capitalize()} while training")
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
    return ax


def _smooth(values: Sequence[float]) -> list[float]:
    """Return the exponential mean over about a fiftieth of the run."""
    keep = 1 - 1 / max(len(values) / 50, 1)
    total = weight = 0.0
    out = []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight)
    return out


def _short(label: str) -> str:
    """Cut a name to the room there is; a dollar sign would begin a formula."""
    cut = label if len(label) <= _LABEL_WIDTH else label[: _LABEL_WIDTH - 1] + "…"
    return cut.replace("$", r"\$")
