import builtins

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabletx.data import Example
from stabletx.training import baselines
from stabletx.training.baselines import majority_baseline, tfidf_baseline

ROWS = [Example(f"{['bad', 'good'][i % 2]} film number {i}", "ny"[i % 2]) for i in range(40)]


@given(train=st.lists(st.integers(0, 3), min_size=1), test=st.lists(st.integers(0, 3), min_size=1))
def test_majority_baseline_is_right_where_the_test_row_is_of_the_commonest_class(train, test):
    found = majority_baseline(test, train, list("abcd"))
    commonest = max(range(4), key=lambda i: (train.count(i), -i))
    assert found.metrics.accuracy == test.count(commonest) / len(test)


def test_tfidf_baseline_learns_words():
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    found = tfidf_baseline(ROWS[:30], ROWS[30:], ["n", "y"])
    assert found.metrics.accuracy == 1.0
    assert found.n_train == 30


def test_tfidf_baseline_leaves_out_empty_texts_and_copes_with_a_class_it_never_saw():
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    rows = [*ROWS[:30], Example("  ", "n")]
    found = tfidf_baseline(rows, [*ROWS[30:], Example("", "y")], ["a", "n", "y"])
    assert (found.n_train, found.metrics.n_rows) == (30, 10)
    assert found.metrics.accuracy == 1.0


def test_tfidf_baseline_reads_a_bounded_number_of_rows(monkeypatch):
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    monkeypatch.setattr(baselines, "MAX_ROWS", 20)
    assert tfidf_baseline(iter(ROWS), ROWS[30:], ["n", "y"]).n_train == 20


def test_tfidf_baseline_says_how_to_get_scikit_learn(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "sklearn":
            raise ImportError("No module named 'sklearn'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(baselines.importlib, "import_module", without)
    with pytest.raises(ImportError, match=r'got scikit-learn=.*pip install "stabletx\[train\]"'):
        tfidf_baseline(ROWS, ROWS, ["n", "y"])
