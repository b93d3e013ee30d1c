"""From what a user names on the command line to three splits."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import final

from stabletx._checks import must
from stabletx.data import NAMES, DataError, Example, Splits, load_named, load_table, read_table

TEXT_COLUMN, LABEL_COLUMN = "text", "label"
_SHARE = 0.1  # of a file's rows, for each of validation and test


@final
class FileRows:
    """All rows of a file as they stand, read anew by every loop."""

    def __init__(self, path: str, text: str, label: str) -> None:
        self._columns = (path, text, label)
        self._n_rows: int | None = None

    def __iter__(self) -> Iterator[Example]:
        path, text, label = self._columns
        return read_table(path, text=text, label=label)

    def __len__(self) -> int:
        if self._n_rows is None:
            self._n_rows = sum(1 for _ in self)
        return self._n_rows

    def __contains__(self, example: object) -> bool:
        return any(example == own for own in self)


@final
class Texts:
    """The texts of examples, which can be looped over again and again."""

    def __init__(self, examples: Iterable[Example]) -> None:
        self._examples = examples

    def __iter__(self) -> Iterator[str]:
        return (example.text for example in self._examples)


def load_splits(
    data: str,
    *,
    text: str = TEXT_COLUMN,
    label: str = LABEL_COLUMN,
    validation: str | None = None,
    test: str | None = None,
) -> Splits:
    """Load a named data set, or a file with or without files of its own to validate and test on.

    Args:
        data: one of ``stabletx.data.NAMES``, or a path to a CSV, TSV, JSONL or Parquet file.
        text: the column with the texts.
        label: the column with the labels.
        validation: a file for the validation split; None takes a tenth of ``data``.
        test: the same for the test split.

    Raises:
        DataError: if there is no such set or file, or the file cannot be used.
        NetworkNeeded: if a named set has to be fetched and cannot be.
    """
    if is_named(data):
        for name, file in (("validation", validation), ("test", test)):
            if file is not None:
                instead = f"{data} brings its own."
                raise DataError(must(name, "be left out with a named data set", file, instead))
        return load_named(data)
    _check_data(data)
    splits = load_table(
        data,
        text=text,
        label=label,
        validation=0.0 if validation else _SHARE,
        test=0.0 if test else _SHARE,
    )
    files = {"validation": validation, "test": test}
    own = {name: FileRows(file, text, label) for name, file in files.items() if file}
    return dataclasses.replace(splits, **own)  # type: ignore[arg-type]


def is_named(data: str) -> bool:
    """Tell whether ``data`` is the name of a data set; a file of that name goes first."""
    return data in NAMES and not Path(data).exists()


def digest(path: str) -> str:
    """Return a fingerprint of a file's bytes, by which it is known again."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def data_name(data: str) -> str:
    """Return what a run with this data is called."""
    return data if is_named(data) else Path(data).stem


def _check_data(data: str) -> None:
    """Refuse a word that is neither a file nor a name, and say which names there are."""
    if Path(data).exists() or Path(data).suffix:
        return
    near = difflib.get_close_matches(data, NAMES, n=1)
    known = f"The named sets are {', '.join(NAMES)}."
    instead = f"Did you mean {near[0]}? {known}" if near else known
    raise DataError(must("data", "be a file or a named data set", repr(data), instead))
