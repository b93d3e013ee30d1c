"""The folder of a run: what is in it, and when it may be written."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

from stabletx._checks import must
from stabletx.data import DataError, Tokenizer
from stabletx.models import SequenceClassifier
from stabletx.training import checkpoint as ck
from stabletx.training.events import LOG

RUN, METRICS, REPORT = "run.json", "metrics.json", "report.html"
TENSORBOARD = "tensorboard"
_MODEL = ("config.json", "model.safetensors", "tokenizer.json")
_OF_MODEL = ("model.onnx", "model.pt2", "parity.json")  # made from it later; untrue of a new one
_OWN = (RUN, METRICS, REPORT, LOG, ck.FILE, *_MODEL, *_OF_MODEL)


def default_name(data: str) -> str:
    """Return a name of the data and the time, fit for a folder."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", data).strip("-.") or "run"
    return f"{plain}-{time.strftime('%Y%m%d-%H%M%S')}"


def check_free(folder: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuse to write a run into a folder that holds something else. Nothing is touched.

    Raises:
        DataError: if it holds a finished run, one to be resumed, or files that are not a run's.
    """
    if overwrite and resume:
        raise DataError(must("resume", "be left out beside overwrite", True))
    if folder.exists() and not folder.is_dir():
        raise DataError(must("name", "be free for a folder", f"the file {folder}"))
    if not folder.exists() or not any(folder.iterdir()):
        if resume:
            instead = "Leave out --resume, or name the run that was stopped."
            raise DataError(must("name", "be a run that can go on", folder, instead))
        return
    if not (folder / RUN).exists():
        instead = "Choose another --name: nothing in it was touched."
        raise DataError(must("name", "be a new folder or an earlier run's", folder, instead))
    if overwrite:
        return
    if (folder / METRICS).exists():
        instead = "Choose another --name, or replace it with --overwrite."
        raise DataError(must("name", "be new", f"{folder}, a finished run", instead))
    if not resume:
        instead = "Go on with --resume, or begin anew with --overwrite."
        raise DataError(must("name", "be new", f"{folder}, a run that was stopped", instead))


def clear(folder: Path) -> None:
    """Delete what a run wrote, and nothing else."""
    for name in _OWN:
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob("*.png"):
        path.unlink()
    for path in (folder / TENSORBOARD).glob("events.out.tfevents.*"):
        path.unlink()


def load_model(folder: str | Path) -> tuple[SequenceClassifier, Tokenizer]:
    """Read a trained classifier and its tokenizer.

    Raises:
        DataError: if the folder or a file in it is missing or damaged, or holds pickled weights.
    """
    path = Path(folder)
    if not path.is_dir():
        instead = "Name the folder of a run, such as runs/NAME."
        raise DataError(must("model", "be a folder", path, instead))
    if (path / ck.FILE).exists() and not (path / "model.safetensors").exists():
        instead = "Let it end first: stabletx train ... --resume."
        raise DataError(must("model", "be a finished run", f"{path}, which was stopped", instead))
    try:
        model = SequenceClassifier.from_pretrained(path)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(str(error)) from error
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > model.config.vocab_size:
        rule = f"have at most the model's {model.config.vocab_size} tokens"
        instead = "Copy both files from the same run."
        raise DataError(must("tokenizer.json", rule, tokenizer.vocab_size, instead))
    return model, tokenizer


def read_run(folder: str | Path) -> dict[str, Any]:
    """Return what a run was asked for; nothing where the folder does not say."""
    path = Path(folder) / RUN
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
