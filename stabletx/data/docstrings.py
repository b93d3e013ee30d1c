"""The data set that every installation of torch carries: docstrings, by their library.

The docstrings of the standard library, torch, sympy and networkx are read from the installed
source files. Nothing is imported or run: a pattern finds the literal that follows a ``def`` or
``class`` line, and ``ast.literal_eval`` reads it. Signatures that hold quotes or comments are
passed over, which costs one docstring in nine and is ten times faster than parsing every file.
"""

import ast
import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from stabletx._checks import must
from stabletx.data.errors import DataError
from stabletx.data.splits import Dropped, Example, Splits, ThreeLists, arrange, assign
from stabletx.data.wheels import cache_folder

LIBRARIES = ("networkx", "stdlib", "sympy", "torch")
MIN_WORDS = 6
FORMAT = 2  # part of the cache's name: raise it where the recipe changes
# Texts taken from each library: 16,000 in all, so that the sizes do not hang on the versions.
_N_TEXTS = {"networkx": 1350, "stdlib": 5350, "sympy": 6800, "torch": 7900}
_N_VALIDATION, _N_TEST = 1500, 2500
_SKIPPED = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "testing"} | {
    "idlelib",
    "lib2to3",
}
_DOCSTRING = re.compile(
    rb"""^[ \t]*(?:class|def|async[ ]+def)\b[^"'#]*?:[ \t]*(?:\#[^\n]*)?\r?\n  # a signature
    \s*([rRuU]?\"{3}(?:[^"\\]|\\.|"(?!""))*\"{3})                # the literal below it""",
    re.MULTILINE | re.DOTALL | re.VERBOSE,
)

ABOUT = """\
Which library does this docstring describe: the Python standard library, torch, sympy or networkx?
Docstrings of at least 6 words from the installed source files, one line each, every text once.
Leaks, measured with torch 2.13: 56 % of the sympy texts, 63 % of networkx's and 20 % of torch's
hold the name of their own library; without those names TF-IDF with logistic regression falls from
0.900 to 0.896, and divided by file, not by text, to 0.853 (12,000 train texts): texts of one file
resemble each other. So the accuracy speaks of texts like those seen, not of new modules."""
SOURCE = "the installed source files of the Python standard library, torch, sympy and networkx"
RIGHTS = "Python: PSF-2.0; torch, sympy and networkx: BSD-3-Clause"


def load_docstrings() -> Splits:
    """Return the docstrings of the libraries installed here, divided into three splits.

    Returns:
        About 17,400 train, 1,500 validation and 2,500 test examples, labelled with their library.
        The first call reads the source files and keeps the result in the cache folder; the cache is
        keyed by the versions, and a damaged one is made again.

    Raises:
        DataError: if one of the libraries is not installed with its source.
    """
    path = cache_folder() / f"docstrings-{FORMAT}-{_versions()}.jsonl"
    read = _read_cache(path)
    if read is None:
        read = _sample()
        _write_cache(path, *read)
    lists, n_rows, dropped = read
    return Splits(
        *lists,
        labels=LIBRARIES,
        n_rows=n_rows,
        dropped=dropped,
        about=ABOUT,
        source=SOURCE,
        rights=RIGHTS,
    )


def docstrings_in(source: bytes) -> Iterator[str]:
    r"""Yield the docstrings of a source file, white space joined, that have six words or more.

    >>> source = b"def f(x):\n    @Six words  or more it has.@".replace(b"@", b'"' * 3)
    >>> list(docstrings_in(source))
    ['Six words or more it has.']
    """
    for match in _DOCSTRING.finditer(source):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an invalid escape in someone else's docstring
                words = ast.literal_eval(match.group(1).decode()).split()
        except (SyntaxError, ValueError):
            continue
        if len(words) >= MIN_WORDS:
            yield " ".join(words)


def library_docstrings(library: str) -> Iterator[str]:
    """Yield the docstrings of one installed library, file by file in the order of the names."""
    root = _root(library)
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED)
        for name in sorted(files):
            if name.endswith(".py"):
                yield from docstrings_in(Path(folder, name).read_bytes())


def _root(library: str) -> Path:
    if library == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(library)  # does not import a top-level package
    if spec is None or not spec.submodule_search_locations:
        instead = f"Install it (pip install {library}), or name another data set."
        raise DataError(must("docstrings", f"find {library} installed", "none", instead))
    return Path(next(iter(spec.submodule_search_locations)))


def _versions() -> str:
    """Name the versions that decide the texts, in characters that any file system takes."""
    found = [f"python{platform.python_version()}"]
    for library in ("torch", "sympy", "networkx"):
        try:
            found.append(f"{library}{importlib.metadata.version(library)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{library}-unknown")
    return re.sub(r"[^\w.+-]", "_", "-".join(found))


_Read = tuple[ThreeLists, int, Dropped]


def _sample() -> _Read:
    pool = [Example(t, library) for library in LIBRARIES for t in library_docstrings(library)]
    whole = assign(pool, validation=0, test=0)
    left = dict(_N_TEXTS)
    chosen = []
    for row in whole.order:
        if left[pool[row].label]:
            left[pool[row].label] -= 1
            chosen.append(pool[row])
    # A build with fewer texts than usual keeps the proportions of the splits.
    n_wanted = sum(_N_TEXTS.values())
    n_validation = _N_VALIDATION * len(chosen) // n_wanted
    division = assign(chosen, validation=n_validation, test=_N_TEST * len(chosen) // n_wanted)
    return arrange(chosen, division), len(pool), whole.dropped


def _write_cache(path: Path, lists: ThreeLists, n: int, dropped: Dropped) -> None:
    """Write beside, then rename; a folder that cannot be written only costs the next call time."""
    head = {"sizes": [len(part) for part in lists], "n_rows": n, "dropped": dropped}
    beside = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w", encoding="utf-8") as file:
            file.write(json.dumps(head) + "\n")
            for example in itertools.chain(*lists):
                file.write(json.dumps(example._asdict()) + "\n")
        os.replace(beside, path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def _read_cache(path: Path) -> _Read | None:
    try:
        with path.open(encoding="utf-8") as file:
            head = json.loads(next(file))
            rows = [Example(row["text"], row["label"]) for row in map(json.loads, file)]
        a, b, c = head["sizes"]
        if len(rows) != a + b + c:
            return None
        return (rows[:a], rows[a : a + b], rows[a + b :]), head["n_rows"], Dropped(*head["dropped"])
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return None
