import ast
import json
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabletx.data import DataError, docstrings, load_named
from stabletx.data.docstrings import docstrings_in, library_docstrings
from stabletx.data.splits import text_key


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(cache, monkeypatch):
    monkeypatch.setenv("STABLETX_CACHE", str(cache))


@pytest.fixture(scope="module")
def splits(cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STABLETX_CACHE", str(cache))
        return load_named("docstrings")


def parsed(source):
    """The docstrings of functions and classes, the slow and sure way."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    found = (ast.get_docstring(node, clean=False) for node in nodes)
    return Counter(" ".join(text.split()) for text in found if text and len(text.split()) >= 6)


# Some distributions pack parts of Python's library by themselves, this one first of all.
IS_WHOLE = (Path(sysconfig.get_path("stdlib")) / "tkinter").is_dir()


def sizes(splits):
    return [len(part) for part in splits.parts().values()]


def test_docstrings_have_the_pinned_sizes_and_classes(splits):
    counts = Counter(label for part in splits.parts().values() for _, label in part)
    if IS_WHOLE:
        assert sizes(splits) == [17_400, 1_500, 2_500]
        assert counts == docstrings._N_TEXTS
    else:
        assert 4_500 < counts["stdlib"] < docstrings._N_TEXTS["stdlib"]
        assert counts == {**docstrings._N_TEXTS, "stdlib": counts["stdlib"]}
        for size, pinned in zip(sizes(splits), [17_400, 1_500, 2_500], strict=True):
            assert abs(size - pinned * counts.total() / 21_400) < len(counts)
    assert splits.labels == ("networkx", "stdlib", "sympy", "torch")
    for part in splits.parts().values():
        shares = Counter(label for _, label in part)
        for label, n in counts.items():
            assert abs(shares[label] - n * len(part) / counts.total()) < 1


def test_docstrings_have_six_words_and_are_unique(splits):
    texts = [text for part in splits.parts().values() for text, _ in part]
    assert min(len(text.split()) for text in texts) >= 6
    assert len({text_key(text) for text in texts}) == len(texts)


def test_docstrings_say_where_they_are_from(splits):
    assert "standard library" in splits.source
    assert "PSF" in splits.rights
    assert "Leaks" in splits.about
    assert splits.n_rows > sum(sizes(splits))
    assert splits.dropped.duplicates > 0


def test_docstrings_name_their_library_as_often_as_the_text_says(splits):
    rows = [e for part in splits.parts().values() for e in part]
    for label, most in (("sympy", 0.66), ("networkx", 0.73), ("torch", 0.30)):
        own = [text.lower() for text, of in rows if of == label]
        assert sum(label in text for text in own) / len(own) < most


def test_docstrings_come_back_from_the_cache_unchanged(splits, monkeypatch):
    monkeypatch.setattr(docstrings, "_sample", None)
    assert load_named("docstrings") == splits


def test_docstrings_are_the_same_when_made_anew(splits, monkeypatch, tmp_path):
    monkeypatch.setenv("STABLETX_CACHE", str(tmp_path))
    assert load_named("docstrings") == splits


@pytest.mark.parametrize("damage", ["", "{}", "[1]\n", "not json\n", "cut", "short", "wrong kind"])
def test_damaged_cache_is_made_again(damage, cache, splits, monkeypatch):
    read = (splits.train, splits.validation, splits.test), splits.n_rows, splits.dropped
    monkeypatch.setattr(docstrings, "_sample", lambda: read)
    (path,) = cache.glob("docstrings-*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    content = {
        "short": "".join(lines[:-1]),
        "cut": "".join(lines[:-1])[:-9],
        "wrong kind": "".join([*lines[:-1], "[1]\n"]),
    }
    path.write_text(content.get(damage, damage))
    assert load_named("docstrings") == splits
    assert path.read_text().splitlines(keepends=True) == lines
    assert [p.name for p in cache.iterdir()] == [path.name]


def test_docstrings_do_without_a_cache_that_cannot_be_written(splits, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STABLETX_CACHE", str(tmp_path / "file"))
    read = (splits.train, splits.validation, splits.test), splits.n_rows, splits.dropped
    monkeypatch.setattr(docstrings, "_sample", lambda: read)
    assert load_named("docstrings") == splits


def test_docstrings_keep_their_proportions_when_there_are_fewer(monkeypatch, tmp_path):
    monkeypatch.setenv("STABLETX_CACHE", str(tmp_path))
    made = {label: [f"{label} text number {i} has words" for i in range(64)] for label in "abcd"}
    monkeypatch.setattr(docstrings, "LIBRARIES", tuple("abcd"))
    monkeypatch.setattr(docstrings, "library_docstrings", made.get)
    monkeypatch.setattr(docstrings, "_N_TEXTS", dict.fromkeys("abcd", 4000))
    splits = load_named("docstrings")
    assert [len(part) for part in splits.parts().values()] == [192, 24, 40]


def test_missing_library_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        DataError, match=r"find sympy installed, got .* Install it \(pip install sy"
    ):
        list(library_docstrings("sympy"))


@pytest.mark.parametrize(
    "module", ["argparse", "json.decoder", "typing", "statistics", "asyncio.tasks"]
)
def test_pattern_finds_only_what_parsing_finds(module):
    import importlib.util

    source = Path(importlib.util.find_spec(module).origin).read_bytes()
    found, sure = Counter(docstrings_in(source)), parsed(source)
    assert found
    assert not found - sure


@given(
    text=st.text(
        st.characters(exclude_categories=["Cs", "Cc"], exclude_characters='"\\'), min_size=1
    ),
    kind=st.sampled_from(["def f(a, b=1)", "async  def f() -> int", "class A(B, c=D)", "class A"]),
    comment=st.sampled_from(["", "  # why", " \t"]),
    end=st.sampled_from(["\n", "\r\n"]),
    prefix=st.sampled_from(["", "r", "R", "u"]),
)
def test_pattern_finds_what_parsing_finds(text, kind, comment, end, prefix):
    source = (
        f'{kind}:{comment}{end}    {prefix}"""six words are all it takes {text}"""{end}'.encode()
    )
    assert Counter(docstrings_in(source)) == parsed(source)


@pytest.mark.parametrize(
    "source",
    [
        'x = """not the first thing in a function here"""',
        'def f():\n    x = 1\n    """not the first thing in a function here"""',
        'def f():\n    """too short by one word"""',
        'def f():\n    f"""not a plain literal but a formatted one"""',
        'def f():\n    """never closed and so on and on',
        'def f():\n    """broken escape \\x in a text that is long enough"""',
    ],
)
def test_pattern_passes_over_what_is_no_docstring(source):
    assert list(docstrings_in(source.encode())) == []


def test_cache_holds_plain_json_lines(cache, splits):
    (path,) = cache.glob("docstrings-*.jsonl")
    head, first, *_ = path.read_text().splitlines()
    assert json.loads(head)["sizes"] == sizes(splits)
    assert json.loads(first) == splits.train[0]._asdict()
