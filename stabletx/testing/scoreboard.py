"""One page on which every attention with a ready name is held to the laws."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from stabletx.testing.command import write_atomically
from stabletx.testing.conformance import check_attention
from stabletx.testing.known import KNOWN, Unavailable, known_attention
from stabletx.testing.report import ConformanceReport, picture, versions

_PACKAGES = ("torch", "transformers", "x-transformers", "stabletx")


def write_scoreboard(
    folder: str | Path, *, progress: Callable[[str], None] = print, **options: Any
) -> Path:
    """Ask every attention with a ready name and write table, picture and counterexamples.

    Args:
        folder: gets ``README.md``, ``laws.svg`` and one JSON file an attention.
        progress: told what happens.
        **options: of :func:`check_attention`.

    Returns:
        The page.
    """
    folder = Path(folder)
    reports: list[ConformanceReport] = []
    absent: dict[str, str] = {}
    for name in KNOWN:
        try:
            attention = known_attention(name)
        except Unavailable as error:
            absent[name] = str(error)
            progress(f"{name}: not asked, {error}")
            continue
        report = check_attention(attention, **options)
        reports.append(report)
        progress(report.summary())
        write_atomically(folder / f"{name.replace(':', '-')}.json", report.to_json())
    write_atomically(folder / "laws.svg", picture(reports))
    page = folder / "README.md"
    write_atomically(page, _page(reports, absent))
    return page


def _page(reports: list[ConformanceReport], absent: dict[str, str]) -> str:
    found = {name: _version(name) for name in _PACKAGES} | versions()
    stamp = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    rows = [
        "# Scoreboard",
        "",
        f"Written by `stabletx check --all`: {stamp}.",
        "A law is counted once, whatever the number of dtypes in which it is broken. "
        "*Beyond 2^60* counts the laws about magnitudes up to the largest float.",
        "",
        "| attention | laws held | broken | beyond 2^60 | not asked | worst error / bound | s |",
        "|---|---|---|---|---|---|---|",
    ]
    rows += [_row(report) for report in reports]
    rows += [f"| {name} | not asked: {why} | | | | | |" for name, why in absent.items()]
    rows += ["", "![laws by attention and dtype](laws.svg)", ""]
    rows.append(
        "Green: held, the darker the nearer to the bound. Red: broken. Orange: broken beyond 2^60. "
        "Grey: not asked."
    )
    for report in reports:
        rows += _findings(report)
    return "\n".join(rows) + "\n"


def _row(report: ConformanceReport) -> str:
    broken = {verdict.law for verdict in report.broken if verdict.counted}
    beyond = {verdict.law for verdict in report.broken if not verdict.counted} - broken
    held = {verdict.law for verdict in report.verdicts if verdict.status == "held"}
    rest = set(report.laws) - held - broken - beyond
    late = any(verdict.message == "out of time" for verdict in report.verdicts)
    cells = (
        f"{report.name} (out of time)" if late else report.name,
        len(held - broken - beyond),
        len(broken),
        len(beyond),
        len(rest),
        f"{report.occupancy:.2f}",
        f"{report.seconds:.0f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def _findings(report: ConformanceReport) -> list[str]:
    rows = ["", f"## {report.name}", ""]
    if not report.broken:
        return [*rows, "Nothing found."]
    for law, text, dtypes in report.findings():
        verdict = report.verdict(law, dtypes[0])
        assert verdict is not None
        rows += [f"**{law}** ({', '.join(dtypes)}): {text}", "", "```text", verdict.code, "```", ""]
    return rows


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
