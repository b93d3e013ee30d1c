"""What a person sees while a model trains: one live line, or a plain line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO, final

from stabletx.training.events import Event

_SECONDS_BETWEEN_LINES = 5.0


def progress(stream: TextIO | None = None) -> LiveLine | PlainLines:
    """Return a live line where the stream is a terminal and rich is installed, else plain lines."""
    stream = sys.stderr if stream is None else stream
    if stream.isatty():
        try:
            import rich.progress  # noqa: F401
        except ImportError:
            return PlainLines(stream)
        return LiveLine(stream)
    return PlainLines(stream)


def clock(seconds: float) -> str:
    """Write seconds as ``m:ss`` or ``h:mm:ss``.

    >>> clock(75), clock(3675)
    ('1:15', '1:01:15')
    """
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def time_left(event: Event) -> float:
    """Estimate the seconds until the end from the share that is done."""
    share = float(event["share"])
    return float(event["seconds"]) * (1 - share) / share if share else 0.0


def _thousands(rate: float) -> str:
    return f"{rate / 1000:.1f}k" if rate >= 1000 else f"{rate:.0f}"


def _step_line(event: Event) -> str:
    return (
        f"epoch {event['epoch']}  {event['share']:4.0%}  loss {event['loss']:.3f}  "
        f"accuracy {event['accuracy']:.3f}  {_thousands(event['tokens_per_second'])} tokens/s  "
        f"{clock(time_left(event))} left"
    )


def _validation_line(event: Event) -> str:
    best = "  (best so far)" if event["is_best"] else ""
    return (
        f"epoch {event['epoch']} done after {clock(event['seconds'])}: validation loss "
        f"{event['loss']:.3f}  accuracy {event['accuracy']:.3f}  "
        f"macro-F1 {event['macro_f1']:.3f}{best}"
    )


@final
class PlainLines:
    """Write a line at most every five seconds, and one for each validation."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = time.monotonic()

    def __enter__(self) -> PlainLines:
        """Begin."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End."""

    def __call__(self, event: Event) -> None:
        """Show an event."""
        now = time.monotonic()
        if event["event"] == "validation":
            self._write(_validation_line(event))
        elif event["event"] == "step" and now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            self._write(_step_line(event))

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


@final
class LiveLine:
    """Keep one line up to date at the bottom of a terminal."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:3.0f}%"),
            TextColumn("loss {task.fields[loss]}  accuracy {task.fields[accuracy]}"),
            TextColumn("{task.fields[rate]} tokens/s  {task.fields[left]} left"),
            console=Console(file=stream),
            transient=True,
        )
        fields: dict[str, Any] = {"loss": "-", "accuracy": "-", "rate": "-", "left": "-"}
        self._task = self._bar.add_task("train", total=1.0, epoch=1, **fields)
        # A reader wants the trend: the loss of one batch jumps.
        self._loss = self._accuracy = 0.0
        self._weight = 0.0

    def __enter__(self) -> LiveLine:
        """Show the line."""
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the line away."""
        self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        if event["event"] == "validation":
            self._bar.console.print(_validation_line(event), highlight=False)
        elif event["event"] == "step":
            self._weight = 0.95 * self._weight + 0.05
            self._loss = 0.95 * self._loss + 0.05 * event["loss"]
            self._accuracy = 0.95 * self._accuracy + 0.05 * event["accuracy"]
            self._bar.update(
                self._task,
                completed=event["share"],
                epoch=event["epoch"],
                loss=f"{self._loss / self._weight:.3f}",
                accuracy=f"{self._accuracy / self._weight:.3f}",
                rate=_thousands(event["tokens_per_second"]),
                left=clock(time_left(event)),
            )
