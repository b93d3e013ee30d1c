import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stabletx.data import DataError, EncodedSet, Example, Tokenizer, bucketed, collate

LENGTHS = st.lists(st.integers(0, 20), max_size=200)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["a good film", "a bad film of two hours"], 100)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@given(lengths=LENGTHS, max_tokens=st.integers(20, 200), seed=st.none() | st.integers(0, 99))
def test_batches_hold_each_row_once_within_the_budget(lengths, max_tokens, seed):
    generator = None if seed is None else seeded(seed)
    batches = bucketed(lengths, max_tokens=max_tokens, generator=generator)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in batch) <= max_tokens for batch in batches)
    assert all(batches)


@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_batches_repeat_with_the_seed_alone(lengths, seed):
    def make():
        return bucketed(lengths, max_tokens=30, generator=seeded(seed))

    first = make()
    torch.rand(3)  # the global generator plays no part
    assert make() == first


def test_batches_differ_from_epoch_to_epoch():
    generator = seeded(0)
    lengths = [1 + i % 9 for i in range(300)]
    first = bucketed(lengths, max_tokens=40, generator=generator)
    second = bucketed(lengths, max_tokens=40, generator=generator)
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}


def test_batches_without_a_generator_go_from_short_to_long():
    lengths = [5, 1, 4, 2, 3]
    assert bucketed(lengths, max_tokens=5) == [[1, 3], [4], [2], [0]]


def test_batches_hold_rows_of_similar_length():
    draw = seeded(0)
    lengths = torch.randint(1, 200, (5000,), generator=draw).tolist()
    batches = bucketed(lengths, max_tokens=4000, generator=draw)
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert sum(lengths) > 0.9 * padded
    assert sum(lengths) > 0.9 * 4000 * len(batches)


def test_batches_are_not_in_the_order_of_their_lengths():
    lengths = [1 + i % 50 for i in range(500)]
    batches = bucketed(lengths, max_tokens=500, generator=seeded(0))  # all in one pool
    longest = [max(lengths[row] for row in batch) for batch in batches]
    assert longest != sorted(longest)


def test_batches_refuse_a_row_beyond_the_budget():
    match = r"max_tokens must be at least the longest row, which has 9 tokens, got max_tokens=8\. R"
    with pytest.raises(ValueError, match=match):
        bucketed([3, 9], max_tokens=8)
    with pytest.raises(ValueError, match=r"max_tokens must be positive, got max_tokens=0"):
        bucketed([], max_tokens=0)


@given(
    ids=st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=6), max_size=6),
    pad_id=st.integers(0, 9),
)
def test_collate_pads_on_the_right(ids, pad_id):
    batch = collate(ids, list(range(len(ids))), pad_id=pad_id)
    width = max(map(len, ids), default=0)
    assert batch.input_ids.tolist() == [row + [pad_id] * (width - len(row)) for row in ids]
    assert batch.attention_mask.tolist() == [
        [True] * len(row) + [False] * (width - len(row)) for row in ids
    ]
    assert batch.labels.tolist() == list(range(len(ids)))
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.attention_mask.dtype == torch.bool


def test_collate_needs_no_labels_but_as_many_as_rows():
    assert collate([[1]]).labels is None
    with pytest.raises(ValueError, match=r"one entry for each of the 1 rows, got labels=2 entries"):
        collate([[1]], [0, 1])


@given(texts=st.lists(st.text("abgodfilm ", max_size=30), max_size=30), max_len=st.integers(1, 8))
def test_encoded_set_holds_what_the_tokenizer_says(tokenizer, texts, max_len):
    examples = [Example(text, "xy"[len(text) % 2]) for text in texts]
    found = EncodedSet.encode(iter(examples), tokenizer, ("x", "y"), max_len)
    kept = [example for example in examples if example.text.strip()]
    encoded = tokenizer.encode_batch([text for text, _ in kept], max_len)
    assert [list(row) for row in found] == encoded.ids
    assert found.lengths == [len(row) for row in encoded.ids]
    assert list(found.labels) == ["xy".index(label) for _, label in kept]
    assert (found.n_truncated, found.n_empty) == (encoded.n_truncated, len(texts) - len(kept))
    assert len(found) == len(kept)


def test_encoded_set_makes_batches_of_the_rows_asked_for(tokenizer):
    examples = [Example("a good film", "x"), Example("bad", "y"), Example("film", "x")]
    found = EncodedSet.encode(examples, tokenizer, ("x", "y"), 9)
    batch = found.batch([2, 0])
    assert batch.labels.tolist() == [0, 0]
    assert [row[keep].tolist() for row, keep in zip(*batch[:2], strict=True)] == [
        list(found[2]),
        list(found[0]),
    ]
    assert found[-1] == found[2]
    with pytest.raises(IndexError, match=r"row must be below 3, got row=3"):
        found[3]


def test_encoded_set_refuses_a_label_the_model_lacks(tokenizer):
    match = r"label must be one of the model's classes \(x, y\), got label='z'\. Rename it, or"
    with pytest.raises(DataError, match=match):
        EncodedSet.encode([Example("a", "z")], tokenizer, ("x", "y"), 9)


def test_encoded_set_keeps_no_texts_in_memory(tokenizer):
    n, text = 20_000, "a good film of two hours " * 40
    examples = (Example(f"{i} {text}", "x") for i in range(n))
    tracemalloc.start()
    try:
        found = EncodedSet.encode(examples, tokenizer, ("x",), 16)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == n
    # 16 ids of 4 bytes and 12 bytes a row, with the spare room that arrays grow by.
    assert held < 1.25 * n * (16 * 4 + 12)
    assert peak < n * len(text) / 4
