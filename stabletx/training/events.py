"""What a run tells while it goes, and who may listen.

An event is a dict. ``event`` is "start", "step", "validation" or "end"; ``step``, ``epoch`` and
``seconds`` are always there. A "step" has the mean ``loss`` and ``accuracy`` since the last one,
``lr``, ``gradient_norm``, ``tokens_per_second`` and the ``share`` of the run that is done; a
"validation" has ``loss``, ``accuracy``, ``macro_f1`` and ``is_best``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from stabletx.data.errors import optional
from stabletx.training.checkpoint import write_atomically

Event = dict[str, Any]
Listener = Callable[[Event], None]
LOG = "log.jsonl"


@final
class StepMeter:
    """The steps since the last report; their numbers stay on the device until they are read."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.restart_clock()
        self._clear()

    def restart_clock(self) -> None:
        """Leave out of the rate what happened until now."""
        self.clock = time.perf_counter()

    def _clear(self) -> None:
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.right: list[Tensor] = []
        self.n_rows = self.n_tokens = 0

    def add(self, loss: Tensor, norm: Tensor, right: Tensor, n_rows: int, n_tokens: int) -> None:
        """Take in a step."""
        self.losses.append(loss)
        self.norms.append(norm)
        self.right.append(right)
        self.n_rows += n_rows
        self.n_tokens += n_tokens

    @property
    def is_full(self) -> bool:
        """Tell whether it is time to report."""
        return len(self.losses) >= self.every

    def read(self) -> tuple[list[float], list[float]]:
        """Return the losses and gradient norms; a GPU is waited for."""
        return torch.stack(self.losses).tolist(), torch.stack(self.norms).tolist()

    def close(self) -> dict[str, float]:
        """Return accuracy and rate, and begin anew."""
        now = time.perf_counter()
        accuracy = int(torch.stack(self.right).sum()) / self.n_rows
        rate = self.n_tokens / max(now - self.clock, 1e-9)
        self.clock = now
        self._clear()
        return {"accuracy": accuracy, "tokens_per_second": round(rate)}


@final
class JsonLinesLog:
    """Write each event as a line of JSON.

    A run that was killed may have logged steps after its last checkpoint. They are done again, so
    that the log drops what it holds of them when the run goes on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, event: Event) -> None:
        """Write an event."""
        if event["event"] == "start":
            old = read_log(self.path) if event["step"] else []
            kept = [own for own in old if own["step"] <= event["step"] and own["event"] != "end"]
            write_atomically(self.path, "".join(json.dumps(own) + "\n" for own in kept).encode())
            if kept:
                return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


def read_log(path: Path) -> list[Event]:
    """Read the events of a log; a last line that a kill cut short is left out."""
    events: list[Event] = []
    if not path.exists():
        return events
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            break
    return events


@final
class TensorBoardLog:
    """Write each number of each event for TensorBoard, below the name of the event.

    Raises:
        ImportError: if tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        optional("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))

    def __call__(self, event: Event) -> None:
        """Write an event."""
        for name, value in event.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and name not in ("step", "total_steps"):
                self._writer.add_scalar(f"{event['event']}/{name}", value, event["step"])
        if event["event"] == "end":
            self._writer.close()
