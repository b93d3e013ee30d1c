"""What ``stabletx check`` does."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  stabletx check torch:sdpa
  stabletx check my_package.attention:attention --effort quick --html report.html
  stabletx check --all --output docs/scoreboard
"""
# An attention that traces itself anew for each shape would take an hour.
_SECONDS_EACH = 120.0


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``stabletx check`` to a parser; imports nothing heavy."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument("name", nargs="?", help="a ready name, or package.module:function")
    parser.add_argument(
        "--all", action="store_true", help="ask every ready name, write a scoreboard"
    )
    parser.add_argument("--list", action="store_true", help="list the ready names")
    parser.add_argument("--effort", choices=("quick", "default", "thorough"), default="default")
    parser.add_argument("--supports", nargs="*", default=(), help="bias softcap sinks lse ...")
    parser.add_argument(
        "--dtypes", nargs="*", default=None, help="float64 float32 bfloat16 float16"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-examples", type=int, default=None)
    parser.add_argument("--budget-seconds", type=float, default=None)
    parser.add_argument("--extremes", action="store_true", help="count magnitudes beyond 2^60")
    parser.add_argument("--json", type=Path, help="write the report there as JSON")
    parser.add_argument("--html", type=Path, help="write the report there as one page")
    parser.add_argument("--output", type=Path, default=Path("docs/scoreboard"))


def run_check(args: argparse.Namespace) -> int:
    """Check what the arguments name.

    Returns:
        The exit status: 0 where all laws hold, 1 where one is broken, 2 where nothing could be
        asked. A scoreboard that was written has status 0.
    """
    from stabletx.testing.known import KNOWN, Unavailable, known_attention

    if args.list:
        print("\n".join(KNOWN))
        return 0
    if args.all:
        from stabletx.testing.scoreboard import write_scoreboard

        options = _options(args)
        if options["budget_seconds"] is None:
            options["budget_seconds"] = _SECONDS_EACH
        written = write_scoreboard(args.output, **options, progress=_say)
        print(f"wrote {written}")
        return 0
    if not args.name:
        print("name must be given, got nothing. Try: stabletx check torch:sdpa", file=sys.stderr)
        return 2
    sys.path.insert(0, os.getcwd())  # as python -m does, so that one's own module is found
    try:
        attention = known_attention(args.name)
    except Unavailable as error:
        print(f"{args.name} is not available: {error}", file=sys.stderr)
        return 2
    return _report(attention, args)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    return {
        "effort": args.effort,
        "device": args.device,
        "seed": args.seed,
        "max_examples": args.max_examples,
        "budget_seconds": args.budget_seconds,
        "extremes": args.extremes,
        "dtypes": [getattr(torch, name) for name in args.dtypes] if args.dtypes else None,
    }


def _report(attention: Any, args: argparse.Namespace) -> int:
    from stabletx.testing.conformance import check_attention

    report = check_attention(attention, supports=args.supports, **_options(args))
    print(report)
    if args.json:
        write_atomically(args.json, report.to_json())
    if args.html:
        print(f"wrote {report.save_html(args.html)}")
    return 0 if report.passed else 1


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is there in full or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, delete=False, encoding="utf-8", suffix=".part"
    ) as part:
        part.write(text)
    os.replace(part.name, path)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
