from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabletx.data import DataError, Example, assign
from stabletx.data.splits import DROPPED, TEST, TRAIN, VALIDATION, arrange, text_key

ROWS = st.lists(
    st.builds(Example, st.text("ab \n", max_size=6), st.sampled_from("xyz")),
    min_size=1,
    max_size=80,
)


def sets_of(rows, **sizes):
    return [set(part) for part in arrange(rows, assign(rows, **sizes))]


def test_text_key_is_the_same_on_every_machine():
    assert text_key("Good  Film\n") == text_key("good film") == 0x1321B0036CC38EA
    assert text_key("good film", seed=1) == 0x5E22387B922BA186


@given(rows=ROWS, data=st.data())
def test_assign_does_not_depend_on_the_order_of_the_rows(rows, data):
    shuffled = data.draw(st.permutations(rows), label="shuffled")

    def plain(rows):
        parts = sets_of([*rows, Example("one at least", "x")], validation=0, test=0)
        return [{(text_key(e.text), e.label) for e in part} for part in parts]

    assert plain(rows) == plain(shuffled)


@given(n=st.integers(8, 60), data=st.data())
def test_assign_divides_alike_in_any_order(n, data):
    rows = [Example(f"text {i}", "xyz"[i % 3]) for i in range(n)]
    shuffled = data.draw(st.permutations(rows), label="shuffled")
    assert sets_of(rows) == sets_of(shuffled)


@given(rows=ROWS)
def test_assign_keeps_each_text_once_and_none_with_two_labels(rows):
    rows = [*rows, Example("one at least", "x")]
    found = assign(rows, validation=0, test=0)
    labels_of = {}
    for text, label in rows:
        if text.strip():
            labels_of.setdefault(" ".join(text.split()), []).append(label)
    conflicting = [v for v in labels_of.values() if len(set(v)) > 1]
    clear = [v for v in labels_of.values() if len(set(v)) == 1]
    assert found.sizes == (len(clear), 0, 0)
    assert found.dropped.conflicts == sum(map(len, conflicting))
    assert found.dropped.duplicates == sum(map(len, clear)) - len(clear)
    assert found.dropped.empty == sum(not text.strip() for text, _ in rows)
    assert found.labels == tuple(sorted({v[0] for v in clear}))
    assert found.parts.count(DROPPED) == len(rows) - len(clear)
    assert sorted(found.order) == [i for i, part in enumerate(found.parts) if part != DROPPED]


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    n_validation=st.integers(0, 20),
    n_test=st.integers(0, 20),
)
def test_assign_gives_the_sizes_asked_for_in_proportion(counts, n_validation, n_test):
    rows = [Example(f"{i} {j}", f"c{i}") for i, n in enumerate(counts) for j in range(n)]
    if n_validation + n_test >= len(rows):
        with pytest.raises(DataError, match=rf"got validation={n_validation} and test={n_test}"):
            assign(rows, validation=n_validation, test=n_test)
        return
    found = assign(rows, validation=n_validation, test=n_test)
    room = sum(n - 1 for n in counts)
    assert found.sizes[TEST] == min(n_test, room)
    assert found.sizes[VALIDATION] == min(n_validation, room - found.sizes[TEST])
    for part, size in ((VALIDATION, n_validation), (TEST, n_test)):
        of_label = Counter(rows[i].label for i, own in enumerate(found.parts) if own == part)
        if all(n > n_validation + n_test for n in counts):
            for i, n in enumerate(counts):
                assert abs(of_label[f"c{i}"] - size * n / len(rows)) < 1
    in_train = {rows[i].label for i, part in enumerate(found.parts) if part == TRAIN}
    assert in_train == set(found.labels)


def test_assign_gives_the_odd_row_to_the_largest_remainder():
    rows = [Example(f"{label} {i}", label) for label, n in (("x", 30), ("y", 10)) for i in range(n)]
    found = assign(rows, validation=0, test=3)
    assert sorted(rows[i].label for i, part in enumerate(found.parts) if part == TEST) == [*"xxy"]


def test_assign_share_above_zero_is_at_least_one_row():
    rows = [Example(f"text {i}", "xy"[i % 2]) for i in range(5)]
    assert assign(rows).sizes == (3, 1, 1)


def test_assign_differs_with_the_seed():
    rows = [Example(f"text {i}", "x") for i in range(40)]
    assert sets_of(rows, seed=0) != sets_of(rows, seed=1)


@pytest.mark.parametrize("value", [-1, 1.0, -0.1, float("nan"), True, "3"])
def test_assign_refuses_a_size_that_is_none(value):
    with pytest.raises(
        ValueError, match=r"validation must be an int >= 0 or a float in \[0, 1\), "
    ):
        assign([Example("a", "x")], validation=value)


def test_assign_refuses_rows_without_a_text():
    rows = [Example(" ", "x"), Example("a", "x"), Example("a", "y")]
    with pytest.raises(DataError, match=r"at least one text, got data=3 rows, 1 empty and 2 with"):
        assign(rows)


def test_assign_refuses_to_leave_nothing_to_train_on():
    rows = [Example("a", "x"), Example("b", "y"), Example("A", "x")]
    with pytest.raises(DataError, match=r"leave rows to train on, with 2 different texts in all"):
        assign(rows)
