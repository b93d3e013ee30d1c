import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabletx.data import DataError, Example, Splits, preflight

GOOD = [Example(f"text {i}", "ab"[i % 2]) for i in range(40)]


def test_clean_data_has_no_warnings():
    report = preflight({"train": GOOD, "test": [Example("other", "a")]})
    assert report.warnings == []
    assert report.labels == {"train": {"a": 20, "b": 20}, "test": {"a": 1}}
    assert "warning" not in str(report)


def test_splits_are_taken_as_they_are():
    splits = Splits(GOOD, [Example("v", "a")], [Example("t", "b")], ("a", "b"), 42, (0, 0, 0))
    assert list(preflight(splits).labels) == ["train", "validation", "test"]


@given(
    train=st.lists(st.sampled_from("abcdefg"), min_size=1),
    test=st.lists(st.sampled_from("abcdefgh"), min_size=1),
)
def test_repeated_and_leaked_texts_are_counted(train, test):
    rows = [*(Example(t, "x") for t in train), Example("one", "y"), Example("two", "y")]
    report = preflight({"train": rows, "test": [Example(f" {t.upper()} ", "x") for t in test]})
    assert report.duplicates == {
        "train": len(train) - len(set(train)),
        "test": len(test) - len(set(test)),
    }
    assert report.leaked == {"test": sum(t in train for t in test)}
    assert any("are in train too" in w for w in report.warnings) == (report.leaked["test"] > 0)


def test_empty_texts_are_counted_and_warned_of():
    report = preflight({"train": [*GOOD, Example(" \n", "a"), Example("", "c")], "test": GOOD[:1]})
    assert report.empty == {"train": 2, "test": 0}
    assert "train: 2 empty texts are left out" in report.warnings
    assert report.labels["train"] == {"a": 20, "b": 20}


def test_rare_and_skewed_labels_are_warned_of():
    rows = [*GOOD, *(Example(f"c {i}", "c") for i in range(3)), Example("d", "d")]
    warnings = preflight({"train": rows}).warnings
    assert "train: fewer than 10 rows of 'c' (3), 'd' (1)" in warnings
    assert "train: the most frequent label has 20 times the rows of the rarest" in warnings


def test_cut_texts_are_warned_of_when_they_are_many():
    report = preflight({"train": GOOD, "test": [Example("t", "a")]})
    assert report.with_truncated({"train": 4, "test": 0}).warnings == []
    cut = report.with_truncated({"train": 5, "test": 0})
    assert cut.warnings == ["train: 12% of the texts lose their end at max_len"]
    assert report.truncated == {}


def test_report_shows_each_label_in_each_split():
    report = preflight({"train": GOOD, "test": [*GOOD[:3], Example("", "a")]})
    assert str(report).splitlines() == [
        "label   train  test",
        "a          20     2",
        "b          20     1",
        "all        40     3",
        "empty       0     1",
        "leaked            3",
        "warning: test: 3 texts are in train too, so its figures are too good",
        "warning: test: 1 empty texts are left out",
    ]


def test_report_can_be_kept_as_json():
    report = preflight({"train": GOOD}).with_truncated({"train": 9})
    kept = json.loads(json.dumps(report.to_dict()))
    assert kept["labels"] == {"train": {"a": 20, "b": 20}}
    assert kept["warnings"] == report.warnings != []


def test_one_class_only_is_refused():
    match = r"train must have at least two classes, got train=only \['a'\]\. Check the label column"
    with pytest.raises(DataError, match=match):
        preflight({"train": GOOD[::2]})


def test_label_that_only_evaluation_has_is_refused():
    match = r"test must have only labels that train has \('a', 'b'\), got test='c' \(2 rows\)\. Ren"
    with pytest.raises(DataError, match=match):
        preflight({"train": GOOD, "test": [Example("x", "c"), Example("y", "c")]})


@pytest.mark.parametrize("rows", [[], [Example("  ", "a"), Example("", "b")]])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_split_without_a_text_is_refused(rows, split):
    match = rf"{split} must hold at least one text, got .*no text among {len(rows)} rows\. Check"
    with pytest.raises(DataError, match=match):
        preflight({"train": GOOD, split: rows})


def test_missing_train_split_is_refused():
    with pytest.raises(DataError, match=r"have a split named 'train', got splits=\['test'\]"):
        preflight({"test": GOOD})
