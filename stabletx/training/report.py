"""One HTML file about a run that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: .6rem 0; }
th, td { padding: .25rem .9rem .25rem 0; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
td { font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
.big { font-size: 1.25rem; } .warn { border-left: 4px solid #D55E00; padding-left: .8rem; }
summary { cursor: pointer; }
pre { background: #f5f5f5; padding: .6rem; overflow-x: auto; }
"""


class Section(NamedTuple):
    """A heading, and what stands below it: texts, tables or pictures, in order."""

    title: str
    parts: Sequence[str]


def render(title: str, sections: Sequence[Section]) -> str:
    """Return a whole page. The parts are HTML already: make them with the functions below."""
    body = "".join(f"<h2>{escape(s.title)}</h2>{''.join(s.parts)}" for s in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph; ``kind`` is "", "big" or "warn".

    >>> paragraph("a < b")
    '<p class="">a &lt; b</p>'
    """
    return f'<p class="{escape(kind)}">{escape(text)}</p>'


def preformatted(text: str) -> str:
    """Return text whose line ends and blanks stay."""
    return f"<pre>{escape(text)}</pre>"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table; a float is written with three decimals."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_cell(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def settings(values: Mapping[str, Any]) -> str:
    """Return names and values as a table."""
    return table(["setting", "value"], [(name, str(value)) for name, value in values.items()])


def folded(title: str, parts: Sequence[str]) -> str:
    """Return parts that the reader opens by a click."""
    return f"<details><summary>{escape(title)}</summary>{''.join(parts)}</details>"


def picture(path: Path, about: str) -> str:
    """Return a PNG file as part of the page itself."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return (
        f'<figure><img alt="{escape(about)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(about)}</figcaption></figure>"
    )


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
