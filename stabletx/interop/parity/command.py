"""What ``stabletx parity`` does: read a model and texts, compare, and leave the result behind."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

from stabletx._checks import must
from stabletx.data import DataError, load_named, read_table
from stabletx.interop.export import FORMATS
from stabletx.interop.parity.compare import Comparison, compare
from stabletx.interop.parity.environments import Subject, names
from stabletx.interop.parity.show import print_table, save_parity_picture
from stabletx.training import sources
from stabletx.training.apply import open_model, read_texts
from stabletx.training.checkpoint import write_json
from stabletx.training.runs import read_run

JSON, PICTURE = "parity.json", "parity.png"
_TABLES = (".csv", ".tsv", ".jsonl", ".parquet")


def run_parity(args: argparse.Namespace) -> bool:
    """Do what the command line asks for; tell whether every environment passes the threshold."""
    environments = args.only.split(",") if args.only else []
    for name in environments:
        if name not in names():
            raise DataError(must("only", f"name some of {', '.join(names())}", repr(name)))
    for name in ("rows", "batch"):
        if getattr(args, name) < 1:
            raise DataError(must(name, "be at least 1", getattr(args, name)))
    if args.threshold is not None and not args.threshold >= 0:
        raise DataError(must("threshold", "be at least 0", args.threshold))
    found, files = check_parity(
        args.model,
        args.data,
        text=args.text,
        environments=environments,
        rows=args.rows,
        batch=args.batch,
        out=args.out,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if args.json:
        print(json.dumps(found.to_dict(), ensure_ascii=False))
    else:
        print_table(found)
        for name, why in found.left_out.items():
            print(f"{name} was left out: {why}")
        print(f"\nwrote {' and '.join(map(str, files))}")
    if args.threshold is None:
        return True
    failed = [own.name for own in found.findings if not own.passes(args.threshold)]
    if failed:
        what = f"beyond {args.threshold:g}, or touched by padding"
        print(f"{what}: {', '.join(failed)}", file=sys.stderr)
    return not failed


def check_parity(
    folder: str,
    data: str,
    *,
    text: str | None = None,
    environments: Sequence[str] = (),
    rows: int = 512,
    batch: int = 32,
    out: str | Path | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> tuple[Comparison, list[Path]]:
    """Compare the environments of a trained classifier on some texts.

    Args:
        folder: of the run. An ONNX file that was exported into it is the one that "onnx" runs.
        data: a table, a text file with one text a line, or a named set, of which the test texts
            are taken. Labels are not needed.
        text: column of the texts; None takes the one of the training.
        environments: as in :func:`stabletx.interop.parity.compare.compare`.
        rows: texts taken at most, from the first on.
        batch: texts in a batch.
        out: folder for ``parity.json`` and ``parity.png``; None takes the run's own.
        say: takes each line for the user.

    Returns:
        What was found, and the files written.

    Raises:
        DataError: for a folder or data that cannot be used.
        OSError: if the files cannot be written.
    """
    model, tokenizer = open_model(folder, "cpu")
    texts = list(islice(_texts(folder, data, text), rows))
    if not texts:
        raise DataError(must("data", "hold at least one text", "none", "Check the text column."))
    encoded = tokenizer.encode_batch(texts, model.config.max_seq_len)
    target = Path(folder if out is None else out)
    target.mkdir(parents=True, exist_ok=True)  # before the minutes that follow
    deployed = Path(folder) / FORMATS["onnx"]
    subject = Subject(model, deployed if deployed.is_file() else None)
    if subject.onnx:
        say(f"onnx runs {deployed}.")
    found = compare(
        subject, encoded.ids, environments=environments, batch=batch,
        on_start=lambda name: say(f"running {name} ..."),
    )  # fmt: skip
    write_json(target / JSON, {"model": folder, "data": data, **found.to_dict()})
    files = [target / JSON]
    try:
        files.append(save_parity_picture(target / PICTURE, found))
    except ImportError as error:
        say(f"No picture: {error}")
    return found, files


def _texts(folder: str, data: str, text: str | None) -> Iterable[str]:
    if sources.is_named(data):
        return (example.text for example in load_named(data).test)
    if text is None and Path(data).suffix.lower() not in _TABLES:
        return read_texts([data], None)
    column = text or read_run(folder).get("asked", {}).get("text") or sources.TEXT_COLUMN
    return (example.text for example in read_table(data, text=column))
