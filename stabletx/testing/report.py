"""What a run over the laws found: text, JSON, and one page with a picture."""

from __future__ import annotations

import html
import json
import platform
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from stabletx.testing.laws import Law, Setting

Status = Literal["held", "broken", "not asked"]
MARKS = {"held": "✓", "broken": "✗", "not asked": "·"}
COLOURS = {"held": "#2f7d4f", "broken": "#b3261e", "not asked": "#d9d9d9", "extreme": "#d98c3f"}


@dataclass(frozen=True)
class Verdict:
    """What one law says in one dtype.

    Attributes:
        law: its name.
        sentence: what must hold.
        dtype: such as "float32".
        status: "held", "broken" or "not asked".
        message: what was found, or why nothing was asked.
        counted: whether it counts for the verdict of the report.
        examples: how many were asked.
        occupancy: the largest error as a fraction of the bound.
        setting: the counterexample.
        code: the counterexample as code that runs.
        seconds: spent on it.
    """

    law: str
    sentence: str
    dtype: str
    status: Status
    message: str = ""
    counted: bool = True
    examples: int = 0
    occupancy: float = 0.0
    setting: str = ""
    code: str = ""
    seconds: float = 0.0

    @classmethod
    def of(
        cls, law: Law, dtype: torch.dtype, status: Status, message: str, **rest: object
    ) -> Verdict:
        """Make the verdict of a law."""
        short = str(dtype).removeprefix("torch.")
        return cls(law.name, law.sentence, short, status, message, **rest)  # type: ignore[arg-type]

    @property
    def counts_against(self) -> bool:
        """Tell whether this verdict fails the report."""
        return self.status == "broken" and self.counted


@dataclass(frozen=True)
class ConformanceReport:
    """Every law's verdict in every dtype.

    Attributes:
        name: of the attention.
        verdicts: in the order asked.
        seed: of the examples.
        effort: "quick", "default" or "thorough".
        extremes: whether magnitudes beyond 2^60 count.
        device: where it ran.
        seconds: in all.
        notes: what was noticed, such as sizes that are refused.
    """

    name: str
    verdicts: tuple[Verdict, ...]
    seed: int = 0
    effort: str = "default"
    extremes: bool = False
    device: str = "cpu"
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """True where at least one law was asked and none that counts is broken."""
        asked = any(verdict.status == "held" for verdict in self.verdicts)
        return asked and not any(verdict.counts_against for verdict in self.verdicts)

    @property
    def broken(self) -> tuple[Verdict, ...]:
        """Return the verdicts that found something, those that count first."""
        found = [verdict for verdict in self.verdicts if verdict.status == "broken"]
        return tuple(sorted(found, key=lambda verdict: not verdict.counted))

    @property
    def occupancy(self) -> float:
        """Return the largest error of the laws that hold, as a fraction of the bound."""
        return max((verdict.occupancy for verdict in self.verdicts), default=0.0)

    @property
    def dtypes(self) -> list[str]:
        """Return the dtypes, in the order asked."""
        return list(dict.fromkeys(verdict.dtype for verdict in self.verdicts))

    @property
    def laws(self) -> list[str]:
        """Return the names of the laws, in the order asked."""
        return list(dict.fromkeys(verdict.law for verdict in self.verdicts))

    def verdict(self, law: str, dtype: str) -> Verdict | None:
        """Return the verdict of a law in a dtype, such as ``("agreement", "float32")``."""
        for verdict in self.verdicts:
            if verdict.law == law and verdict.dtype == dtype:
                return verdict
        return None

    def findings(self) -> list[tuple[str, str, list[str]]]:
        """Return one sentence for each way in which a law is broken: (law, sentence, dtypes)."""
        found: dict[tuple[str, str], tuple[str, list[str]]] = {}
        for verdict in self.broken:
            # Dtypes that differ in numbers alone are told together.
            kind = re.sub(r"[-+]?\d[\d.e+-]*|, #.*bound", "#", verdict.message)
            first = f"{verdict.sentence} Broken: {verdict.message}"
            found.setdefault((verdict.law, kind), (first, []))[1].append(verdict.dtype)
        return [(law, text, dtypes) for (law, _), (text, dtypes) in found.items()]

    def summary(self) -> str:
        """Say in one line what came out."""
        counts = Counter(verdict.status for verdict in self.verdicts)
        word = "passed" if self.passed else "FAILED"
        if any(verdict.message == "out of time" for verdict in self.verdicts):
            word = f"{word} in the time there was"
        return (
            f"{self.name}: {word}. {counts['held']} held, {counts['broken']} broken, "
            f"{counts['not asked']} not asked; worst error {self.occupancy:.2f} of the bound; "
            f"{self.effort}, seed {self.seed}, {self.device}, {self.seconds:.1f} s"
        )

    def __str__(self) -> str:
        """Draw the laws by dtype, then tell what is broken, with code."""
        return "\n".join([*self._table(), *self._reasons(), *self._broken()])

    __repr__ = __str__

    def _table(self) -> list[str]:
        width = max((len(law) for law in self.laws), default=0)
        head = " ".join(f"{dtype:>8}" for dtype in self.dtypes)
        rows = [self.summary(), "", f"{'law':<{width}} {head}"]
        for law in self.laws:
            cells = []
            for dtype in self.dtypes:
                verdict = self.verdict(law, dtype)
                status = verdict.status if verdict else "not asked"
                number = f" {verdict.occupancy:.2f}" if verdict and verdict.occupancy else ""
                cells.append(f"{MARKS[status] + number:>8}")
            rows.append(f"{law:<{width}} {' '.join(cells)}")
        return [*rows, "", "✓ held (worst error as a fraction of the bound)  ✗ broken  · not asked"]

    def _reasons(self) -> list[str]:
        """Say why laws were not asked, each reason once."""
        reasons: dict[str, list[str]] = {}
        for verdict in self.verdicts:
            if verdict.status == "not asked":
                reasons.setdefault(verdict.message, []).append(verdict.law)
        rows = [f"not asked, {why}: {', '.join(dict.fromkeys(x))}" for why, x in reasons.items()]
        return [*rows, *self.notes]

    def _broken(self) -> list[str]:
        rows: list[str] = []
        for law, text, dtypes in self.findings():
            first = self._first(law, dtypes)
            aside = "" if first.counted else ", beyond 2^60: not counted"
            rows += ["", f"✗ {law} ({', '.join(dtypes)}{aside})", f"  {text}"]
            rows += [f"    {line}" for line in first.code.splitlines()]
        return rows

    def _first(self, law: str, dtypes: Sequence[str]) -> Verdict:
        verdict = self.verdict(law, dtypes[0])
        assert verdict is not None
        return verdict

    def to_json(self) -> str:
        """Return everything as JSON, with the versions it was found under."""
        whole = {"passed": self.passed, "versions": versions(), **asdict(self)}
        return json.dumps(whole, indent=1, ensure_ascii=False)

    def _repr_html_(self) -> str:
        """Show the picture and the findings in a notebook."""
        return _body(self)

    def save_html(self, path: str | Path) -> Path:
        """Write one self-contained page: picture, findings, code; no script, nothing fetched.

        Returns:
            Where it was written.
        """
        target = Path(path)
        title = html.escape(f"{self.name}: {'passed' if self.passed else 'failed'}")
        page = (
            f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
            f"<style>{_STYLE}</style>\n<body>{_body(self)}</body></html>\n"
        )
        target.write_text(page, encoding="utf-8")
        return target


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;"
    "color:#1c1c1c;background:#fff}pre{background:#f4f4f4;padding:.8rem;overflow-x:auto}"
    "h3{margin-bottom:.2rem}svg{max-width:100%;height:auto}"
)


def _body(report: ConformanceReport) -> str:
    parts = [f"<h2>{html.escape(report.summary())}</h2>", picture([report])]
    for law, text, dtypes in report.findings():
        first = report._first(law, dtypes)
        aside = "" if first.counted else " (beyond 2^60: not counted)"
        parts.append(f"<h3>{html.escape(law)}: {html.escape(', '.join(dtypes))}{aside}</h3>")
        parts.append(f"<p>{html.escape(text)}</p><pre>{html.escape(first.code)}</pre>")
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in report._reasons())
    stamp = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"{''.join(parts)}<ul>{reasons}</ul><p>{html.escape(stamp)}</p>"


def picture(reports: Sequence[ConformanceReport]) -> str:
    """Draw laws by dtype, side by side for several attentions, as an SVG.

    Args:
        reports: one block of columns each.

    Returns:
        The picture. The depth of a green cell is the error as a fraction of the bound; hover to
        read a cell.
    """
    laws = list(dict.fromkeys(law for report in reports for law in report.laws))
    cell, top, left = 18, 150, 190
    columns = [(report, dtype) for report in reports for dtype in report.dtypes]
    gaps = [sum(len(r.dtypes) and r is not reports[0] for r in reports[: i + 1])
            for i, report in enumerate(reports) for _ in report.dtypes]  # fmt: skip
    width = left + len(columns) * cell + 10 * len(reports) + 20
    height = top + len(laws) * cell + 20
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="laws by dtype" font-family="sans-serif" '
        f'font-size="11"><rect width="{width}" height="{height}" fill="#fff"/>'
    ]
    for row, law in enumerate(laws):
        y = top + row * cell
        drawn.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{law}</text>')
    for i, (report, dtype) in enumerate(columns):
        x = left + i * cell + 10 * gaps[i]
        label = html.escape(f"{report.name} {dtype}" if len(reports) > 1 else dtype)
        drawn.append(f'<text transform="translate({x + 13},{top - 6}) rotate(-60)">{label}</text>')
        for row, law in enumerate(laws):
            drawn.append(_cell(report, law, dtype, (x, top + row * cell, cell - 2)))
    return "".join([*drawn, "</svg>"])


def _cell(report: ConformanceReport, law: str, dtype: str, place: tuple[int, int, int]) -> str:
    verdict = report.verdict(law, dtype)
    status = verdict.status if verdict else "not asked"
    kind = "extreme" if verdict and status == "broken" and not verdict.counted else status
    shade = 0.45 + 0.55 * min(1.0, verdict.occupancy) if verdict and status == "held" else 1.0
    said = f"{law}, {dtype}: {status}"
    if verdict and verdict.message:
        said = f"{said}. {verdict.message}"
    elif verdict and verdict.occupancy:
        said = f"{said}, {verdict.occupancy:.2f} of the bound"
    x, y, size = place
    return (
        f'<rect x="{x}" y="{y}" width="{size}" height="{size}" rx="3" fill="{COLOURS[kind]}" '
        f'fill-opacity="{shade:.2f}"><title>{html.escape(said)}</title></rect>'
    )


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def name_of(fn: object) -> str:
    """Return what to call an attention in a report."""
    for attribute in ("name", "__qualname__", "__name__"):
        value = getattr(fn, attribute, None)
        if isinstance(value, str):
            return value
    return type(fn).__name__


def replay_code(law: str, fn: object, setting: Setting) -> str:
    """Return code that asks a law about one example again."""
    module, name = getattr(fn, "__module__", None), getattr(fn, "__qualname__", "")
    known = getattr(fn, "known_as", "")
    if known:
        found = (
            "from stabletx.testing.known import known_attention\n\n"
            f'attention = known_attention("{known}")'
        )
    elif module and name and "<" not in name and module != "__main__" and "." not in name:
        found = f"from {module} import {name} as attention\n"
    else:
        found = f"attention = ...  # {name_of(fn)}"
    return (
        "import torch\n"
        "from stabletx.testing.conformance import Setting, Shape, replay\n"
        f"{found}\n"
        f'print(replay("{law}", attention, {setting!r}))'
    )
