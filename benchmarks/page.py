"""Write docs/speed.md from the committed results, and draw its pictures.

``python -m benchmarks.page [--results FOLDER] [--docs FOLDER]``
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import pictures, results
from benchmarks.contest import OURS, BenchmarkError
from benchmarks.parts import PARTS

DOCS = Path(__file__).parent.parent / "docs"
ASKED_SHARE = 0.80  # of the measured float32 matrix-product limit, encoder inference
ASKED_MB = 2048  # of a process that encodes 65,536 tokens at width 384
COMMAND = "python -m benchmarks.page"

INTRODUCTION = """\
# Speed

Made from the committed results by `{command}`; nothing here is typed by hand.

The figure is the **ratio**, the time of stabletx over the time of the peer: below 1 stabletx is
faster. All contestants of a workload take turns, each round beginning with another; those of
encoders, training and decoding in processes of their own, for beside CTranslate2 everybody's
threads sleep between two steps. The ratio is taken round by round; the median and the
interquartile range (±) are given. They hold the same random weights, and each is compared with a
float64 model of torch's own layers before it is timed: a wrong answer gets no time. The error in
the tables is the largest difference from that model on real tokens; for training the largest error
of the gradient of the embeddings, as a share of its largest entry; for decoding how much less a
written token scores than the best one after the same text; for attention, softmax and norms a
share of the computed bound.

Peers are called their fastest way: Hugging Face with `sdpa`, `nn.TransformerEncoder` on its fast
path with nested tensors, ONNX Runtime with its BERT optimiser and every graph optimisation,
CTranslate2 with a dense batch and lengths, all in inference mode with the same number of threads.
Lengths are lognormal with a mean of 0.4 of the longest, seeded; nobody pads beyond the longest.

MiniLM size is 6 layers of width 384 with 12 heads, BERT width 2 layers of width 768 with 12 heads;
training takes 3 layers of width 384 and 1 of width 768; decoding has GPT-2's form, 6 layers of
width 384, and writes 128 tokens after a prompt of 32.
"""
NO_GPU = """\
## On a GPU

**Not measured.** The suite has parts for CUDA (`--device cuda`: packed encoder against padded
Hugging Face, attention against each of torch's backends timed by events, decoding), but they have
not been run on a GPU yet, so no claim is made.
"""
ENDING = """\
## Measure it yourself

```text
stabletx bench --part encoder          # in a clone; one part, a table, a file, the pictures
stabletx bench --threads 2             # everything
python3 -m pytest benchmarks           # the same as tests, no network
python -m benchmarks.page              # this page
```

A peer that is not installed is left out, and the results say so. `pip install 'stabletx[peers]'`
installs them all.
"""


class Line(NamedTuple):
    """A figure that was asked for."""

    work: str
    peer: str
    asked: str
    measured: str
    is_met: bool


def page(files: Mapping[str, Mapping[str, Any]], image_folder: str) -> str:
    """Write the page from results by machine and device."""
    texts = [INTRODUCTION.format(command=COMMAND)]
    for name, found in files.items():
        texts.append(_about(name, found))
        texts.append(_table(
            ("work", "peer", "asked", "measured", ""),
            [(x.work, x.peer, x.asked, x.measured, "yes" if x.is_met else "**short**")
             for x in asked_lines(found)],
        ))  # fmt: skip
        texts.append(_ahead(found))
        texts.append(_all_figures(name, found, image_folder))
    if all(not name.endswith("--cuda") for name in files):
        texts.append(NO_GPU)
    return "\n".join([*texts, ENDING])


def asked_lines(found: Mapping[str, Any]) -> Iterator[Line]:
    """Give every figure that was asked for, beside what was measured."""
    for part, entry in _workloads(found):
        for title, work in entry.items():
            name, rows = f"{part}, {title}", work["rows"]
            for peer, limit in work["asked"].items():
                best = _best(rows) if peer == "best" else None
                row = rows.get(best or peer, {})
                shown = "best of all" if peer == "best" else peer
                if best:
                    shown += f": {best}"
                if "ratio" not in row:
                    reason = row.get("reason", "not measured")
                    yield Line(name, shown, f"at most {limit:.2f}", reason, False)
                    continue
                yield Line(name, shown, f"at most {limit:.2f}", _ratio(row), row["ratio"] <= limit)
            share = work["about"].get("share_of_products")
            if part == "encoder" and "float32" in title and share is not None:
                yield Line(
                    name, "limit of matrix products", f"at least {ASKED_SHARE:.2f}",
                    f"{share:.2f}", share >= ASKED_SHARE,
                )  # fmt: skip
            waits = work["about"].get("waits for the GPU")
            if waits is not None:
                yield Line(
                    name, "synchronisation with the GPU", "none", "some" if waits else "none",
                    not waits,
                )  # fmt: skip
            whole = work["about"].get("process_mb_at_the_longest")
            if whole is not None:
                n = work["about"]["longest"]
                yield Line(
                    f"memory of the process, {n:,} tokens, width {work['about']['width']}", "",
                    f"at most {ASKED_MB:,} MB", f"{whole:,.0f} MB", whole <= ASKED_MB,
                )  # fmt: skip
            over = work["about"].get("largest_over_expected")
            if over is not None:
                yield Line(
                    "growth, time per token", "expected from attention's own share",
                    "as expected", f"at most {over:.2f} of it", over <= 1.1,
                )  # fmt: skip


def peers_ahead(found: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Give (part, workload, peer, ratio) wherever a peer is faster."""
    for part, entry in _workloads(found):
        if part in ("guards", "import"):  # these compare with a part of the same work
            continue
        for title, work in entry.items():
            for peer, row in work["rows"].items():
                if peer != OURS and row.get("ratio", 0.0) > 1.0:
                    yield part, title, peer, _ratio(row)


def _workloads(found: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    parts = found["parts"]
    for part in PARTS:
        if part in parts:
            yield part, parts[part]["workloads"]


def _best(rows: Mapping[str, Any]) -> str | None:
    """Name the fastest peer: the one with the largest ratio."""
    ratios = {name: row["ratio"] for name, row in rows.items() if name != OURS and "ratio" in row}
    return max(ratios, key=lambda name: ratios[name], default=None)


def _ratio(row: Mapping[str, Any]) -> str:
    return f"{row['ratio']:.3f} ± {row.get('ratio_spread', 0.0):.3f}"


def _about(name: str, found: Mapping[str, Any]) -> str:
    entries = found["parts"]
    lines = [f"## {name}\n"]
    machines = {}
    for part, entry in entries.items():
        own = entry["machine"]
        versions = ", ".join(f"{x} {version}" for x, version in own["versions"].items())
        key = f"{own['processor']}, {own['threads']} threads. {versions}."
        machines.setdefault(key, []).append(f"{part} ({entry['commit']}, {entry['date']})")
    for machine, parts in machines.items():
        lines.append(f"{machine} Parts, with commit and date: {', '.join(parts)}.\n")
    lines.append("### What was asked for\n")
    return "\n".join(lines)


def _ahead(found: Mapping[str, Any]) -> str:
    rows = list(peers_ahead(found))
    title = "### Where a peer is ahead\n\n"
    if not rows:
        return title + "Nowhere in these workloads.\n"
    return title + _table(("part", "workload", "peer", "ratio"), rows)


def _all_figures(name: str, found: Mapping[str, Any], image_folder: str) -> str:
    texts = ["### Every figure\n"]
    for part, entry in _workloads(found):
        texts.append(f"#### {part.capitalize()}\n")
        if part in (*pictures.BAR_PARTS, "growth", "memory"):
            picture = f"{image_folder}/{pictures.picture_name(name, part)}"
            texts.append(f"![{part}: stabletx and its peers]({picture})\n")
        curves = {title: work for title, work in entry.items() if work["unit"] != "ms"}
        for work in curves.values():
            texts.append(_curve_table(work))
        rows = [
            _figure(title, peer, row)
            for title, work in entry.items()
            if title not in curves
            for peer, row in work["rows"].items()
        ]
        if rows:
            head = ("workload", "implementation", "median, ms", "ratio", "error")
            texts.append(_table(head, rows))
        texts += _shares(entry)
    return "\n".join(texts)


def _figure(title: str, peer: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    if "ms" not in row:
        return title, peer, row.get("reason", "not measured"), "", ""
    time = f"{row['ms']:.4g} ± {row.get('spread_ms', 0.0):.2g}"
    ratio = "" if peer == OURS or "ratio" not in row else _ratio(row)
    error = f"{row['error']:.1e}" if "error" in row else ""
    return title, peer, time, ratio, error


def _curve_table(work: Mapping[str, Any]) -> str:
    rows = work["rows"]
    lengths = sorted({int(n) for row in rows.values() for n in row.get("points", {})})
    cells = []
    for name, row in rows.items():
        points = row.get("points", {})
        if not points:
            cells.append((name, row.get("reason", ""), *[""] * (len(lengths) - 1)))
            continue
        given = (points.get(str(n)) for n in lengths)
        cells.append((name, *("" if y is None else f"{y:.4g}" for y in given)))
    return _table((f"{work['unit']}, by length", *(f"{n:,}" for n in lengths)), cells)


def _shares(entry: Mapping[str, Any]) -> list[str]:
    cells = []
    for title, work in entry.items():
        about = work["about"]
        if "peak_gflops" in about:
            shares = (about.get("share_of_products"), about.get("share_of_bandwidth"))
            cells.append((
                title, f"{about['peak_gflops']:.0f}", f"{about['bandwidth_gb']:.1f}",
                *("" if share is None else f"{share:.2f}" for share in shares),
            ))  # fmt: skip
    if not cells:
        return []
    head = (
        "workload", "limit of products, GFLOP/s", "bandwidth, GB/s", "share of products",
        "share of bandwidth",
    )  # fmt: skip
    return [_table(head, cells)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def write(folder: Path, docs: Path) -> Path:
    """Write the page and its pictures from every results file of a folder.

    Raises:
        BenchmarkError: if the folder is missing or holds no results.
    """
    paths = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if not paths:
        raise BenchmarkError(f"results must lie in {folder}, got none. Run: stabletx bench.")
    files = {path.stem: results.read(path) for path in paths}
    for name, found in files.items():
        for picture in pictures.draw_all(found, docs / "images", name):
            print(f"Drawn: {picture}")
    target = docs / "speed.md"
    target.write_text(page(files, "images"), encoding="utf-8")
    return target


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=results.folder())
    parser.add_argument("--docs", type=Path, default=DOCS)
    args = parser.parse_args(argv)
    try:
        print(f"Written to {os.path.relpath(write(args.results, args.docs))}")
    except BenchmarkError as error:
        print(f"benchmarks.page: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
