"""A whole run: from data to a folder with a model, its figures, pictures and a report."""

from __future__ import annotations

import dataclasses
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import stabletx
from stabletx._checks import must
from stabletx.data import DataError, EncodedSet, Preflight, Splits, Tokenizer, preflight
from stabletx.models import SequenceClassifier
from stabletx.training import checkpoint as ck
from stabletx.training import runs, sources
from stabletx.training.baselines import Baseline, majority_baseline, tfidf_baseline
from stabletx.training.config import TrainingConfig, default_model
from stabletx.training.evaluate import Evaluation, evaluate
from stabletx.training.events import LOG, JsonLinesLog, Listener, TensorBoardLog
from stabletx.training.fit import FitResult, fit
from stabletx.training.progress import progress
from stabletx.training.summary import Outcome, write_report

Say = Callable[[str], None]


class Interrupted(KeyboardInterrupt):
    """The user stopped a run; its checkpoint is in ``folder``."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder


@dataclasses.dataclass(frozen=True)
class Job:
    """What ``stabletx train`` is asked for.

    Args:
        data: a file or a named data set.
        text: column of the texts.
        label: column of the labels.
        validation: a file of its own for the validation split.
        test: a file of its own for the test split.
        folder: where everything is written.
        overwrite: replace an earlier run in that folder.
        resume: go on with the run in that folder.
        max_len: tokens read of a text; None picks 256, or 96 from 10,000 train rows on.
        vocab_size: tokens of the tokenizer at most.
        device: "auto", "cpu", "cuda" or "cuda:N".
        tensorboard: log for TensorBoard too.
        baseline: hold the model against TF-IDF with logistic regression.
        config: how to train.
    """

    data: str
    folder: Path
    text: str = sources.TEXT_COLUMN
    label: str = sources.LABEL_COLUMN
    validation: str | None = None
    test: str | None = None
    overwrite: bool = False
    resume: bool = False
    max_len: int | None = None
    vocab_size: int = 8000
    device: str = "auto"
    tensorboard: bool = False
    baseline: bool = True
    config: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)


def train(job: Job, say: Say = print) -> Outcome:
    """Do everything that ``stabletx train`` does.

    Args:
        job: what is asked for.
        say: takes each line for the user.

    Returns:
        The figures, and where everything lies.

    Raises:
        DataError: for data or a folder that cannot be used.
        TrainingError: if the numbers of the run are no longer finite.
        Interrupted: if the user pressed Ctrl-C; the checkpoint is kept.
        OSError: if the disk is full; the last checkpoint is kept.
    """
    device = pick_device(job.device)
    runs.check_free(job.folder, overwrite=job.overwrite, resume=job.resume)
    say(f"Reading {job.data} ...")
    splits = sources.load_splits(
        job.data, text=job.text, label=job.label, validation=job.validation, test=job.test
    )
    checked = preflight(splits)
    if job.overwrite and job.folder.exists():
        runs.clear(job.folder)
    job.folder.mkdir(parents=True, exist_ok=True)
    ck.write_json(job.folder / runs.RUN, _about(job, splits))
    if job.max_len is None:
        n_train = sum(checked.labels["train"].values())
        job = dataclasses.replace(job, max_len=96 if n_train >= 10_000 else 256)
    tokenizer, encoded = _encode(splits, job)
    checked = checked.with_truncated({name: own.n_truncated for name, own in encoded.items()})
    say("\n".join([str(checked), *_left_out(splits, checked, job.max_len or 256)]))
    model = _new_model(tokenizer, splits, job, sum(encoded["train"].lengths)).to(device)
    result = _fit(model, encoded, job, say)
    model.save_pretrained(job.folder)
    tokenizer.save(job.folder)
    evaluation = evaluate(model, encoded["test"])
    baselines = _baselines(splits, encoded, job, say)
    outcome = _outcome(job, splits, checked, model, result, evaluation, baselines)
    write_report(outcome, model, tokenizer, encoded["test"], evaluation, say)
    ck.write_json(job.folder / runs.METRICS, outcome.to_dict())
    (job.folder / ck.FILE).unlink(missing_ok=True)
    return outcome


def pick_device(device: str) -> torch.device:
    """Return the device to train on; "auto" is the GPU where there is one.

    Raises:
        DataError: if there is no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.zeros(1, device=picked)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        got = f"{device} ({str(error).splitlines()[0]})"
        raise DataError(must("device", "be usable here", got, "Try --device cpu.")) from error
    return picked


def _about(job: Job, splits: Splits) -> dict[str, Any]:
    asked = dataclasses.asdict(job)
    asked.update(folder=str(job.folder), config=job.config.to_dict())
    fingerprint = None if sources.is_named(job.data) else sources.digest(job.data)
    return {
        "asked": asked,
        "source": splits.source,
        "rights": splits.rights,
        "citation": splits.citation,
        "data_digest": fingerprint,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return what the figures of a run hang on."""
    return {
        "stabletx": stabletx.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


def _encode(splits: Splits, job: Job) -> tuple[Tokenizer, dict[str, EncodedSet]]:
    tokenizer = Tokenizer.train(sources.Texts(splits.train), job.vocab_size)
    encoded = {
        name: EncodedSet.encode(examples, tokenizer, splits.labels, job.max_len or 256)
        for name, examples in splits.parts().items()
    }
    return tokenizer, encoded


def _left_out(splits: Splits, checked: Preflight, max_len: int) -> list[str]:
    """Say which rows, and which parts of rows, are not used."""
    words = {
        "copies of a text that is kept once": splits.dropped.duplicates,
        "rows of a text that has two labels": splits.dropped.conflicts,
        "empty texts": splits.dropped.empty,
    }
    found = [f"{n:,} {what}" for what, n in words.items() if n]
    lines = [f"left out: {', '.join(found)}"] if found else []
    n_cut = sum(checked.truncated.values())
    n_all = sum(sum(counts.values()) for counts in checked.labels.values())
    if n_cut:
        lines.append(
            f"{n_cut:,} of {n_all:,} texts are longer than {max_len} tokens and lose their end."
        )
    return lines


def _new_model(tokenizer: Tokenizer, splits: Splits, job: Job, n_tokens: int) -> SequenceClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.config.seed)
        return SequenceClassifier(
            default_model(
                tokenizer.vocab_size,
                splits.labels,
                max_seq_len=job.max_len or 256,
                pad_id=tokenizer.pad_id,
                # Measured: little text wants many features, none of them relied on.
                d_model=256 if n_tokens < 100_000 else 128,
                dropout_p=0.5 if n_tokens < 500_000 else 0.3,
            )
        )


def _fit(
    model: SequenceClassifier, encoded: dict[str, EncodedSet], job: Job, say: Say
) -> FitResult:
    n_parameters = sum(p.numel() for p in model.parameters())
    say(f"Training {n_parameters:,} parameters on {len(encoded['train']):,} texts ...")
    listeners: list[Listener] = [JsonLinesLog(job.folder / LOG)]
    if job.tensorboard:
        listeners.append(TensorBoardLog(job.folder / runs.TENSORBOARD))
    with progress() as line, _interruptible() as should_stop:
        result = fit(
            model,
            encoded["train"],
            encoded["validation"],
            config=job.config,
            folder=job.folder,
            resume=job.resume,
            listeners=[*listeners, line],
            should_stop=should_stop,
        )
    if result.reason == "request":
        raise Interrupted(job.folder)
    return result


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C end the run after its step; a second one ends it at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _baselines(
    splits: Splits, encoded: dict[str, EncodedSet], job: Job, say: Say
) -> Sequence[Baseline]:
    test, train = encoded["test"].labels, encoded["train"].labels
    found = [majority_baseline(test, train, splits.labels)]
    if job.baseline:
        say("Fitting TF-IDF with logistic regression to the same texts ...")
        try:
            found.append(tfidf_baseline(splits.train, splits.test, splits.labels))
        except (ImportError, ValueError) as error:  # no package, or texts without any word
            say(f"No TF-IDF beside it: {error}")
    return found


def _outcome(
    job: Job,
    splits: Splits,
    checked: Preflight,
    model: SequenceClassifier,
    result: FitResult,
    evaluation: Evaluation,
    baselines: Sequence[Baseline],
) -> Outcome:
    return Outcome(
        folder=job.folder,
        data=sources.data_name(job.data),
        about=splits.about,
        source=splits.source,
        rights=splits.rights,
        test=evaluation.metrics,
        baselines=tuple(baselines),
        training={
            "seconds": round(result.seconds, 2),
            "steps": result.steps,
            "epochs": result.epochs,
            "best_epoch": result.best_epoch,
            "ended_by": result.reason,
            "tokens_per_second": round(result.tokens / max(result.seconds, 1e-9)),
            "parameters": sum(p.numel() for p in model.parameters()),
            "peak_memory_mb": peak_memory_mb(),
            "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        },
        settings={**result.config.to_dict(), **model.config.to_dict()},
        checks=checked,
        left_out=_left_out(splits, checked, job.max_len or 256),
        versions=versions(),
    )


def peak_memory_mb() -> int | None:
    """Return the largest memory this process has held, or None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(most / (1 << 20 if sys.platform == "darwin" else 1 << 10))
