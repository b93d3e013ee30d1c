"""A pytest plugin: an option for the effort, and a section with what the laws found.

It is loaded by every pytest run in an environment that holds stabletx, so it imports nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from stabletx.testing.report import ConformanceReport

REPORTS: pytest.StashKey[list[ConformanceReport]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--stabletx-effort``."""
    parser.getgroup("stabletx").addoption(
        "--stabletx-effort",
        choices=("quick", "default", "thorough"),
        default="default",
        help="how many examples law_tests asks of each law (default: %(default)s)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Begin with no reports."""
    config.stash[REPORTS] = []


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say for each attention what held, what broke and how near the bound it came."""
    reports = config.stash.get(REPORTS, [])
    if not reports:
        return
    terminalreporter.section("stabletx: attention held to the laws")
    for report in reports:
        terminalreporter.write_line(report.summary())
        for law, _, dtypes in report.findings():
            terminalreporter.write_line(f"  ✗ {law} ({', '.join(dtypes)})")
