"""The program ``stabletx``: train, evaluate, predict, export, parity, check, bench."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

OK, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130

_TRAIN_HELP = """\
examples:
  stabletx train docstrings
  stabletx train reviews.csv --text review --label stars --name reviews
  stabletx train train.jsonl --test test.jsonl --epochs 20
  stabletx train reviews.csv --name reviews --resume"""
_EVALUATE_HELP = """\
examples:
  stabletx evaluate runs/reviews new-reviews.csv --text review --label stars
  stabletx evaluate runs/demo docstrings --json"""
_PREDICT_HELP = """\
examples:
  echo "What a wonderful film" | stabletx predict runs/reviews
  stabletx predict runs/reviews lines.txt --json
  stabletx predict runs/reviews new-reviews.csv --text review"""
_EXPORT_HELP = """\
examples:
  stabletx export runs/reviews --format onnx
  stabletx export runs/reviews --format torch --out reviews.pt2"""
_PARITY_HELP = """\
examples:
  stabletx parity runs/reviews new-reviews.csv --text review
  stabletx parity runs/reviews lines.txt --only float64,onnx --threshold 1e-4"""
_BENCH_HELP = """\
examples:
  stabletx bench --part encoder
  stabletx bench --part decode --part training --threads 2
  stabletx bench --machine my-laptop --results results"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        0 where all went well, 1 for a run that failed, 2 for a mistake of the user's, 130 after
        Ctrl-C.
    """
    args_given = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(next((a for a in args_given if not a.startswith("-")), ""))
    args = parser.parse_args(args_given)
    if args.verb is None:
        parser.print_help()
        return MISTAKE
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except BrokenPipeError:  # the reader of our output has gone, such as `head`
        sys.stderr.close()
        return OK
    except KeyboardInterrupt as stop:
        return _interrupted(stop, args_given)
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        print(f"stabletx {args.verb}: {_one_line(error)}", file=sys.stderr)
        return code


def _exit_code(error: Exception) -> int | None:
    """Return the exit code of an error that a user can meet; None for a bug, which shows itself."""
    from safetensors import SafetensorError

    from stabletx.data import DataError, NetworkNeeded
    from stabletx.training import CheckpointError, TrainingError

    if isinstance(error, DataError | CheckpointError | ImportError | UsageError):
        return MISTAKE
    if isinstance(error, TrainingError | NetworkNeeded | OSError | SafetensorError):
        return FAILED
    return None


class UsageError(ValueError):
    """Options that do not go together."""


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}."
    return text


def _interrupted(stop: KeyboardInterrupt, argv: list[str]) -> int:
    folder = getattr(stop, "folder", None)
    print("stopped.", file=sys.stderr)
    if folder is not None:
        kept = [a for a in argv if a not in ("--resume", "--overwrite")]
        if "--name" not in kept and not any(a.startswith("--name=") for a in kept):
            kept += ["--name", folder.name]
        again = " ".join(_quoted(a) for a in ["stabletx", *kept, "--resume"])
        print(f"The checkpoint is in {folder}. Go on with: {again}", file=sys.stderr)
    return INTERRUPTED


def _quoted(argument: str) -> str:
    import shlex

    return shlex.quote(argument)


def _parser(verb: str) -> argparse.ArgumentParser:
    """Build the parser; the options of ``check`` cost imports, so only it pays for them."""
    from stabletx import __version__

    about = "Train, evaluate and use Transformers whose numbers are right."
    parser = argparse.ArgumentParser(prog="stabletx", description=about, epilog=_TRAIN_HELP)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--version", action="version", version=f"stabletx {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    _add_train(_verb(verbs, "train", "train a text classifier", _TRAIN_HELP, _train))
    _add_evaluate(_verb(verbs, "evaluate", "measure a trained model", _EVALUATE_HELP, _evaluate))
    _add_predict(_verb(verbs, "predict", "label texts", _PREDICT_HELP, _predict))
    _add_export(_verb(verbs, "export", "write a model for other runtimes", _EXPORT_HELP, _export))
    about = "compare a model's answers across dtypes, batches and runtimes"
    _add_parity(_verb(verbs, "parity", about, _PARITY_HELP, _parity))
    check = _verb(verbs, "check", "hold an attention to the laws", "", _check)
    if verb == "check":
        from stabletx.testing.command import add_check_arguments

        add_check_arguments(check)
    _add_bench(_verb(verbs, "bench", "run the benchmarks of a clone", _BENCH_HELP, _bench))
    return parser


def _verb(
    verbs: Any, name: str, about: str, examples: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_columns(parser: argparse.ArgumentParser, text: str | None, label: str | None) -> None:
    parser.add_argument("--text", metavar="COL", default=text, help="column of the texts")
    parser.add_argument("--label", metavar="COL", default=label, help="column of the labels")


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "data",
        nargs="?",
        default="docstrings",
        metavar="DATA",
        help="a CSV, TSV, JSONL or Parquet file, or one of: docstrings (the default), bbc, "
        "rotten-tomatoes, imdb, sms, trec",
    )
    _add_columns(parser, "text", "label")
    add("--validation", metavar="FILE", help="rows to choose the best epoch by (else a tenth)")
    add("--test", metavar="FILE", help="rows to measure on (else a tenth)")
    add("--name", help="of the run; the default is the data's name and the time")
    add("--runs", default="runs", metavar="FOLDER", help="where runs are kept (runs)")
    add("--overwrite", action="store_true", help="replace an earlier run of that name")
    add("--resume", action="store_true", help="go on with the run of that name")
    add("--seed", type=int, help="another seed, another run")
    add("--epochs", type=int, help="times through the training texts")
    add("--max-seconds", type=float, metavar="S", help="end training after about this time")
    add("--lr", type=float, help="highest learning rate")
    add("--batch-tokens", type=int, metavar="N", help="tokens in a batch")
    add("--max-len", type=int, metavar="N", help="tokens read of each text")
    add("--patience", type=int, metavar="N", help="stop after N epochs without a better one")
    add("--class-weights", choices=("none", "balanced"), help="balanced: rare classes count more")
    add("--precision", choices=("auto", "float32", "bfloat16"), help="of matrix products")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--tensorboard", action="store_true", help="log for TensorBoard too")
    add("--no-baseline", action="store_true", help="leave out TF-IDF with logistic regression")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the folder of a run")
    parser.add_argument("data", metavar="DATA", help="a file, or a named set (its test texts)")
    _add_columns(parser, None, None)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the folder of a run")
    about = "text files, one text a line; tables with --text; standard input without any"
    parser.add_argument("files", metavar="FILE", nargs="*", help=about)
    parser.add_argument("--text", metavar="COL", help="FILEs are tables: the column of the texts")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the folder of a run")
    about = "onnx: an ONNX file; torch: a program for torch.export.load"
    parser.add_argument("--format", choices=("onnx", "torch"), required=True, help=about)
    about = "file to write (model.onnx or model.pt2 in the folder of the run)"
    parser.add_argument("--out", metavar="PATH", help=about)


def _add_parity(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="the folder of a run")
    about = "texts: a table, a file with one a line, or a named set (its test texts)"
    add("data", metavar="DATA", help=about)
    add("--text", metavar="COL", help="column of the texts")
    about = "environments, separated by commas; the default is all that this machine has"
    add("--only", metavar="NAMES", help=about)
    add("--rows", type=int, default=512, metavar="N", help="texts compared at most (512)")
    add("--batch", type=int, default=32, metavar="N", help="texts in a batch (32)")
    about = "exit with 1 where a probability changes by more, or padding matters"
    add("--threshold", type=float, metavar="P", help=about)
    about = "for parity.json and parity.png (the folder of the run)"
    add("--out", metavar="FOLDER", help=about)
    add("--json", action="store_true", help="print every figure as JSON")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    about = "encoder, training, decode, attention, functions, guards, growth, memory or import"
    add("--part", action="append", default=[], metavar="PART", help=f"{about}; else all of them")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="where to measure")
    add("--threads", type=int, metavar="N", help="of every contestant (as torch chooses)")
    add("--rounds", type=int, default=9, metavar="N", help="turns of each contestant (9)")
    add("--machine", metavar="NAME", help="what the results file is called (the processor)")
    add("--results", metavar="FOLDER", help="for file and pictures (those of the clone)")
    add("--quick", action="store_true", help="the smallest sizes, to see that everything runs")


def _train(args: argparse.Namespace) -> int:
    from stabletx.training import TrainingError
    from stabletx.training.checkpoint import FILE as CHECKPOINT
    from stabletx.training.run import Job, train
    from stabletx.training.runs import default_name
    from stabletx.training.sources import data_name

    if args.resume and not args.name:
        raise UsageError("--resume must come with --name, got no name. Name the run to go on with.")
    name = args.name or default_name(data_name(args.data))
    job = Job(
        data=args.data,
        folder=Path(args.runs) / name,
        text=args.text,
        label=args.label,
        validation=args.validation,
        test=args.test,
        overwrite=args.overwrite,
        resume=args.resume,
        device=args.device,
        tensorboard=args.tensorboard,
        baseline=not args.no_baseline,
        config=_config(args),
        **({} if args.max_len is None else {"max_len": args.max_len}),
    )
    try:
        outcome = train(job, lambda line: print(line, flush=True))
    except (OSError, TrainingError):
        if (job.folder / CHECKPOINT).exists():
            print(f"{job.folder / CHECKPOINT} is whole: go on with --resume.", file=sys.stderr)
        raise
    print(f"\n{outcome}")
    return OK


def _config(args: argparse.Namespace) -> Any:
    from stabletx.training import TrainingConfig

    names = (
        "seed", "epochs", "max_seconds", "lr", "batch_tokens", "patience", "class_weights",
        "precision",
    )  # fmt: skip
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.max_len is not None and args.max_len < 2:
        raise UsageError(f"max_len must be at least 2, got max_len={args.max_len}.")
    try:
        return TrainingConfig(**given)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def _evaluate(args: argparse.Namespace) -> int:
    from stabletx.training.apply import evaluate_on

    metrics, about = evaluate_on(
        args.model, args.data, text=args.text, label=args.label, device=args.device
    )
    if args.json:
        print(json.dumps({"about": about, **metrics.to_dict()}, ensure_ascii=False))
        return OK
    print(about)
    print(f"accuracy           {metrics.accuracy:.3f}")
    print(f"macro-F1           {metrics.macro_f1:.3f}")
    print(f"majority class     {metrics.majority:.3f} ({metrics.majority_label})")
    print(f"calibration error  {metrics.calibration_error:.3f}\n")
    print(metrics)
    return OK


def _predict(args: argparse.Namespace) -> int:
    from stabletx.training import predict
    from stabletx.training.apply import open_model, read_texts

    model, tokenizer = open_model(args.model, args.device)
    at_once, n_cut = 256, 0
    if not args.files and sys.stdin.isatty():
        print("One text a line; Ctrl-D ends.", file=sys.stderr)
        at_once = 1
    texts = read_texts(args.files, args.text)
    for prediction in predict(model, tokenizer, texts, at_once=at_once):
        n_cut += prediction.was_cut
        if args.json:
            line = prediction._asdict()
            print(json.dumps(line, ensure_ascii=False))
        else:
            print(f"{prediction.label}\t{prediction.probability:.4f}")
    if n_cut:
        limit = model.config.max_seq_len
        print(f"{n_cut} texts are longer than {limit} tokens and lost their end.", file=sys.stderr)
    return OK


def _export(args: argparse.Namespace) -> int:
    from stabletx.interop.export import export_run

    print(export_run(args.model, args.format, args.out))
    return OK


def _parity(args: argparse.Namespace) -> int:
    from stabletx.interop.parity.command import run_parity

    return OK if run_parity(args) else FAILED


def _check(args: argparse.Namespace) -> int:
    from stabletx.testing.command import run_check

    return int(run_check(args))


def _bench(args: argparse.Namespace) -> int:
    from importlib import import_module

    root = next(_clones(), None)
    if root is None:
        raise UsageError(
            "bench must run in a clone of the repository, got no folder benchmarks/ here or beside "
            "the package. Clone it and run: stabletx bench."
        )
    sys.path.insert(0, str(root))
    command: Any = import_module("benchmarks.command")
    request = command.Request(
        parts=args.part,
        device=args.device,
        threads=args.threads,
        rounds=args.rounds,
        machine=args.machine,
        folder=None if args.results is None else Path(args.results),
        is_quick=args.quick,
    )
    try:
        command.bench(request, lambda line: print(line, flush=True))
    except command.BenchmarkError as error:
        raise UsageError(str(error)) from error
    return OK


def _clones() -> Iterator[Path]:
    for root in (Path.cwd(), Path(__file__).resolve().parent.parent):
        if (root / "benchmarks" / "command.py").exists():
            yield root


if __name__ == "__main__":
    sys.exit(main())
