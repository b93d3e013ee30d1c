"""Use a trained model on files: what ``stabletx evaluate`` and ``stabletx predict`` do."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from stabletx._checks import must
from stabletx.data import DataError, EncodedSet, Example, Tokenizer, load_named, read_table
from stabletx.models import SequenceClassifier
from stabletx.training import sources
from stabletx.training.evaluate import evaluate
from stabletx.training.metrics import Metrics
from stabletx.training.run import pick_device
from stabletx.training.runs import load_model, read_run


def open_model(folder: str, device: str = "auto") -> tuple[SequenceClassifier, Tokenizer]:
    """Read a model and its tokenizer, and put the model on a device.

    Raises:
        DataError: if the folder cannot be used, or there is no such device.
    """
    picked = pick_device(device)
    model, tokenizer = load_model(folder)
    return model.to(picked), tokenizer


def evaluate_on(
    folder: str,
    data: str,
    *,
    text: str | None = None,
    label: str | None = None,
    device: str = "auto",
) -> tuple[Metrics, str]:
    """Measure a trained model.

    Args:
        folder: of the run.
        data: a file, all rows of which are taken, or a named set, of which the test texts are. Of
            the file that the model was trained on, the test rows are taken too.
        text: column of the texts; None takes the one of the training.
        label: column of the labels; None takes the one of the training.
        device: where to compute.

    Returns:
        The figures, and a sentence that says on what.

    Raises:
        DataError: for a folder or data that cannot be used.
    """
    model, tokenizer = open_model(folder, device)
    asked = read_run(folder)
    columns = asked.get("asked", {})
    text = text or columns.get("text") or sources.TEXT_COLUMN
    label = label or columns.get("label") or sources.LABEL_COLUMN
    examples, about = _examples(data, text, label, asked)
    limit = model.config.max_seq_len
    encoded = EncodedSet.encode(examples, tokenizer, model.config.labels, limit)
    if len(encoded) == 0:
        got = f"no text among {encoded.n_empty} rows"
        raise DataError(must("data", "hold at least one text", got, "Check the text column."))
    about = f"{data}: {len(encoded):,} {about}"
    if encoded.n_empty:
        about += f"; {encoded.n_empty:,} empty ones left out"
    if encoded.n_truncated:
        about += f"; {encoded.n_truncated:,} cut to {limit} tokens"
    return evaluate(model, encoded).metrics, about


def read_texts(files: Sequence[str], text: str | None) -> Iterator[str]:
    """Yield the texts of files, or of standard input where none is named.

    Raises:
        DataError: for a file that cannot be read.
    """
    if text is not None:
        if not files:
            instead = "Leave out --text, or name a table."
            raise DataError(must("files", "be named beside text", "none", instead))
        for name in files:
            yield from (example.text for example in read_table(name, text=text))
        return
    if not files:
        yield from _lines(sys.stdin.buffer, "standard input")
    for name in files:
        try:
            with Path(name).open("rb") as file:
                yield from _lines(file, name)
        except OSError as error:
            raise DataError(must("files", "be readable", f"{name} ({error.strerror})")) from error


def _examples(
    data: str, text: str, label: str, asked: dict[str, object]
) -> tuple[Iterable[Example], str]:
    if sources.is_named(data):
        return load_named(data).test, "test texts"
    fingerprint = asked.get("data_digest")
    if fingerprint and Path(data).is_file() and sources.digest(data) == fingerprint:
        columns = asked["asked"]
        assert isinstance(columns, dict)
        splits = sources.load_splits(
            data,
            text=text,
            label=label,
            validation=columns.get("validation"),
            test=columns.get("test"),
        )
        return splits.test, "test texts (the model was trained on the others of this file)"
    return read_table(data, text=text, label=label), "texts"


def _lines(file: Iterable[bytes], name: str) -> Iterator[str]:
    for number, raw in enumerate(file, start=1):
        try:
            yield raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            got = f"byte 0x{raw[error.start]:02x} in line {number}"
            instead = "Convert it, for example: iconv -f latin1 -t utf-8 OLD > NEW."
            raise DataError(must("files", f"be UTF-8 text in {name}", got, instead)) from None
