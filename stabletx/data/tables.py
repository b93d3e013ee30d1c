"""Text and labels from the user's own files, a batch of rows at a time."""

import csv
import difflib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from stabletx._checks import must
from stabletx.data.errors import DataError, optional
from stabletx.data.splits import (
    TEST,
    TRAIN,
    VALIDATION,
    Example,
    Rows,
    Splits,
    assign,
)

_MAX_LINE = 1 << 26  # bytes; a longer line is a file without line ends
_MAX_FIELD = 1 << 24  # characters; a longer field is a quote that was never closed
_ROWS_AT_ONCE = 1024
_ABSENT = type("absent", (), {"__repr__": lambda self: "nothing"})()
_Row = tuple[str, Mapping[str, Any]]  # where it stands, and its fields


def read_table(
    path: str | os.PathLike[str], *, text: str, label: str | None = None
) -> Iterator[Example]:
    r"""Read the text and label columns of a file as a stream.

    Args:
        path: a file that ends in .csv, .tsv, .jsonl, .ndjson or .parquet; UTF-8 where it is text.
        text: the name of the column with the texts. A missing text reads as ``""``.
        label: the name of the column with the labels (text, whole numbers, true or false), or None
            for no labels.

    Returns:
        An iterator over the rows. Its memory does not grow with the file.

    Raises:
        DataError: at the call for a file or column that is not there, later for a row that cannot
            be read or has no label; the message names the file, the row and the column.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "reviews.csv")
    ...     _ = path.write_text("text,stars\nA good film,5\n")
    ...     print(*read_table(path, text="text", label="stars"))
    Example(text='A good film', label='5')
    """
    file = _check_path(Path(path))
    rows = _READERS[file.suffix.lower()](file, [c for c in (text, label) if c is not None])
    examples = _examples(rows, file.name, text, label)
    first = next(examples, None)
    if first is None:
        raise DataError(must("data", "hold at least one row", f"{file} without any"))
    return itertools.chain([first], examples)


def read_rows(
    rows: Iterable[Mapping[str, Any]], *, text: str, label: str | None = None
) -> Iterator[Example]:
    """Read the text and label of rows that are mappings, such as a Hugging Face ``Dataset``.

    Args:
        rows: anything that yields mappings from column to value.
        text: the key of the text.
        label: the key of the label, or None for no labels.

    Raises:
        DataError: if a row lacks the text or the label.

    >>> list(read_rows([{"text": "A good film", "label": 1}], text="text", label="label"))
    [Example(text='A good film', label='1')]
    """
    numbered = ((f"row {n}", row) for n, row in enumerate(rows, start=1))
    return _examples(numbered, "data", text, label)


def load_table(
    path: str | os.PathLike[str],
    *,
    text: str,
    label: str,
    validation: int | float = 0.1,
    test: int | float = 0.1,
    seed: int = 0,
) -> Splits:
    """Divide a file into train, validation and test without loading it.

    Args:
        path: a file as ``read_table`` takes it.
        text: the column with the texts.
        label: the column with the labels.
        validation: rows (an int) or share of the rows (a float) for the validation split.
        test: the same for the test split.
        seed: another seed, another division.

    Returns:
        Splits that read the file anew whenever they are looped over. Empty texts, copies and texts
        with contradicting labels are left out and counted.

    Raises:
        DataError: as ``read_table``, and if the rows do not suffice.

    Numerics: none; about 110 bytes a row while dividing, one byte a row afterwards.
    """

    def read() -> Iterator[Example]:
        return read_table(path, text=text, label=label)

    division = assign(read(), validation=validation, test=test, seed=seed)
    train, held_out, last = (
        Rows(read, division.parts, part, division.sizes[part]) for part in (TRAIN, VALIDATION, TEST)
    )
    return Splits(
        train,
        held_out,
        last,
        labels=division.labels,
        n_rows=len(division.parts),
        dropped=division.dropped,
        about=f"texts in column {text!r} with labels in column {label!r}",
        source=str(path),
        rights="the user's own file",
    )


def _check_path(path: Path) -> Path:
    known = ", ".join(_READERS)
    if path.is_dir():
        raise DataError(must("data", "be a file", f"the folder {path}", "Name the file in it."))
    if not path.exists():
        near = difflib.get_close_matches(path.name, _siblings(path), n=1)
        instead = f"Did you mean {path.with_name(near[0])}?" if near else "Check the path."
        raise DataError(must("data", "name a file that exists", path, instead))
    if path.suffix.lower() not in _READERS:
        instead = "Convert it, or rename it if it already is one of these."
        raise DataError(must("data", f"end in one of {known}", path, instead))
    if path.stat().st_size == 0:
        raise DataError(must("data", "hold at least one row", f"{path} with 0 bytes"))
    return path


def _siblings(path: Path) -> list[str]:
    return sorted(os.listdir(path.parent)) if path.parent.is_dir() else []


def _examples(rows: Iterable[_Row], file: str, text: str, label: str | None) -> Iterator[Example]:
    if text == label:
        raise DataError(must("label", "be another column than text", repr(label)))
    for n, (where, row) in enumerate(rows):
        if n == 0:
            _check_columns(row, [text] if label is None else [text, label], file)
        value = row.get(text, _ABSENT)
        if value is not None and not isinstance(value, str):
            got = f"{type(value).__name__} in {where}, column {text!r}"
            raise DataError(must("text", f"be text in every row of {file}", got))
        name = "" if label is None else _label(row.get(label, _ABSENT))
        if name is None:
            got = f"{row.get(label or '', _ABSENT)!r} in {where}, column {label!r}"
            instead = "Fill it in (text, a whole number, true or false), or take the row out."
            raise DataError(must("label", f"be given in every row of {file}", got, instead))
        yield Example(value or "", name)


def _check_columns(names: Iterable[str], columns: list[str], file: str) -> None:
    """Refuse a text or label column that is not there; name the nearest that is."""
    names = [str(name) for name in names]
    for argument, column in zip(("text", "label"), columns, strict=False):
        if names.count(column) > 1:
            got = f"{names.count(column)} columns {column!r}"
            raise DataError(must(argument, f"name a single column of {file}", got, "Rename one."))
        if column not in names:
            lower = [name.lower() for name in names]
            near = difflib.get_close_matches(column.lower(), lower, n=1)
            instead = f"The columns are {', '.join(map(repr, names)) or 'none'}."
            if near:
                instead += f" Did you mean {names[lower.index(near[0])]!r}?"
            raise DataError(must(argument, f"be a column of {file}", repr(column), instead))


def _label(value: Any) -> str | None:
    """Write a label as text, or return None where there is none."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        # A column of whole numbers with gaps reads as floats elsewhere: 1.0 is the class 1.
        return str(int(value)) if math.isfinite(value) and value == int(value) else None
    if isinstance(value, int):
        return str(value)
    return value.strip() or None if isinstance(value, str) else None


def _lines(file: BinaryIO, path: Path) -> Iterator[str]:
    """Yield the lines of a file as text; bytes that are not UTF-8 are named by their place."""
    n, start = 0, 0
    while raw := file.readline(_MAX_LINE):
        n += 1
        if len(raw) == _MAX_LINE and not raw.endswith(b"\n"):
            instead = "Is it one long array? Write one object a line (JSONL)."
            got = f"line {n} with more than {_MAX_LINE} bytes"
            raise DataError(must("data", f"have line ends in {path}", got, instead))
        try:
            line = raw.decode("utf-8-sig" if n == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = raw[error.start]
            got = f"byte 0x{byte:02x} at offset {start + error.start} (line {n})"
            instead = "Save it as UTF-8, for example: iconv -f latin1 -t utf-8 OLD > NEW."
            raise DataError(must("data", f"be UTF-8 text in {path}", got, instead)) from None
        yield line
        start += len(raw)


def _read_separated(delimiter: str) -> Callable[[Path, list[str]], Iterator[_Row]]:
    def read(path: Path, columns: list[str]) -> Iterator[_Row]:
        # The limit is the csv module's own and can only be set for all: it is only ever raised.
        csv.field_size_limit(max(csv.field_size_limit(), _MAX_FIELD))
        with _open(path) as file:
            reader = csv.reader(_lines(file, path), delimiter=delimiter, strict=True)
            header: list[str] = []
            n, line = 0, 1
            try:
                for fields in reader:
                    if fields and not header:
                        header = [name.strip() for name in fields]
                        _check_columns(header, columns, path.name)
                    elif fields:
                        n += 1
                        yield (
                            f"row {n}",
                            _check_width(fields, header, f"row {n} (line {line})", path),
                        )
                    line = reader.line_num + 1
            except csv.Error as error:
                got = f"{error} in row {n + 1}, which begins in line {line}"
                instead = 'Close every quote, and write a quote inside a field twice ("").'
                raise DataError(must("data", f"be well quoted in {path}", got, instead)) from error

    return read


def _check_width(fields: list[str], header: list[str], where: str, path: Path) -> dict[str, str]:
    if len(fields) != len(header):
        rule = f"have {len(header)} fields in every row of {path}, as its first line has"
        instead = "Put a text that holds the separator in double quotes."
        raise DataError(must("data", rule, f"{len(fields)} fields in {where}", instead))
    return dict(zip(header, fields, strict=True))


def _read_json_lines(path: Path, columns: list[str]) -> Iterator[_Row]:
    with _open(path) as file:
        n = 0
        for number, line in enumerate(_lines(file, path), start=1):
            if not line.strip():
                continue
            n += 1
            where = f"row {n}" if n == number else f"row {n} (line {number})"
            try:
                row = json.loads(line)
                _check_unicode(row, columns)
            except (ValueError, RecursionError) as error:
                got = f"{error} in line {number}"
                instead = "Write one whole JSON object on each line."
                raise DataError(must("data", f"be JSON lines in {path}", got, instead)) from error
            if not isinstance(row, dict):
                got = f"{type(row).__name__} in line {number}"
                instead = f'Write each row as {{"{columns[0]}": ...}} on a line of its own.'
                raise DataError(must("data", f"hold JSON objects in {path}", got, instead))
            yield where, row


def _check_unicode(row: object, columns: list[str]) -> None:
    for column in columns:
        value = row.get(column) if isinstance(row, dict) else None
        if isinstance(value, str) and not value.isascii():
            value.encode()  # half a surrogate pair is a UnicodeEncodeError, which is a ValueError


def _read_parquet(path: Path, columns: list[str]) -> Iterator[_Row]:
    parquet = optional("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, columns, path.name)
            n = 0
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
                for row in batch.to_pylist():
                    n += 1
                    yield f"row {n}", row
    except (optional("pyarrow").ArrowException, OSError) as error:
        got = f"{path} ({error})"
        raise DataError(must("data", "be a whole Parquet file", got, "Write it again.")) from error


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(must("data", "be readable", f"{path} ({error.strerror})")) from error


_READERS: dict[str, Callable[[Path, list[str]], Iterator[_Row]]] = {
    ".csv": _read_separated(","),
    ".tsv": _read_separated("\t"),
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": _read_parquet,
}
