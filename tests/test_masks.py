"""A mask says who may attend to whom; every way of writing it out says the same."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stabletx import Mask
from stabletx._mask_rules import Band
from stabletx.functional._sight import Sight


def loop(rule, b, t, s):
    """Write a mask out pair by pair, from a plain predicate (b, i, j) -> bool."""
    return torch.tensor(
        [[[[bool(rule(n, i, j)) for j in range(s)] for i in range(t)]] for n in range(b)]
    ).reshape(b, 1, t, s)


@st.composite
def masks(draw, b, t, s):
    """Draw a mask and the predicate that it must mean."""
    seed = draw(st.integers(0, 2**32 - 1), label="seed")
    generator = torch.Generator().manual_seed(seed)
    kind = draw(
        st.sampled_from(["causal", "window", "lengths", "padding", "segments", "dense", "offset"]),
        label="kind",
    )
    offset = draw(st.integers(-3, 6), label="offset")
    if kind == "causal":
        return Mask.causal(offset), lambda n, i, j: j <= i + offset
    if kind == "offset":
        offsets = torch.randint(-2, 5, (b,), generator=generator, dtype=torch.int32)
        return Mask.causal(offsets), lambda n, i, j: j <= i + int(offsets[n])
    if kind == "window":
        left = draw(st.none() | st.integers(0, 4), label="left")
        right = draw(st.none() | st.integers(0, 4), label="right")

        def inside(n, i, j):
            at = i + offset
            return (left is None or j >= at - left) and (right is None or j <= at + right)

        return Mask.window(left, right, offset), inside
    if kind == "lengths":
        lengths = torch.randint(-1, s + 3, (b,), generator=generator)
        return Mask.lengths(lengths), lambda n, i, j: j < lengths[n]
    if kind == "padding":
        keep = torch.rand(b, s, generator=generator) > 0.4
        return Mask.padding(keep), lambda n, i, j: keep[n, j]
    if kind == "segments":
        q_ids = torch.randint(0, 3, (b, t), generator=generator)
        k_ids = torch.randint(0, 3, (b, s), generator=generator)
        return Mask.segments(q_ids, k_ids), lambda n, i, j: q_ids[n, i] == k_ids[n, j]
    allowed = torch.rand(b, 1, t, s, generator=generator) > 0.5
    return Mask.dense(allowed), lambda n, i, j: allowed[n, 0, i, j]


@st.composite
def joined_masks(draw):
    b, t, s = (draw(st.integers(1, n), label=name) for name, n in (("b", 3), ("t", 9), ("s", 9)))
    mask, rule = draw(masks(b, t, s))
    for _ in range(draw(st.integers(0, 2), label="joins")):
        other, other_rule = draw(masks(b, t, s))
        how = draw(st.sampled_from(["and", "or", "and not"]), label="how")
        if how == "and":
            mask, rule = mask & other, (lambda a, c: lambda *x: a(*x) and c(*x))(rule, other_rule)
        elif how == "or":
            mask, rule = mask | other, (lambda a, c: lambda *x: a(*x) or c(*x))(rule, other_rule)
        else:
            mask = mask & ~other
            rule = (lambda a, c: lambda *x: a(*x) and not c(*x))(rule, other_rule)
    return mask, rule, b, t, s


def plain_masks(b, t, s):
    """Give masks of every kind for two examples, each with the predicate that it must mean."""
    lengths, keep = torch.tensor([1, s]), (torch.arange(b * s).reshape(b, s) % 3) > 0
    q_ids, k_ids = torch.arange(b * t).reshape(b, t) % 3, torch.arange(b * s).reshape(b, s) % 2
    pairs = (torch.arange(b * t * s).reshape(b, 1, t, s) % 5) > 1
    offsets = torch.tensor([0, 2])
    banded = [
        (Mask.causal(1), lambda n, i, j: j <= i + 1),
        (Mask.causal(-1), lambda n, i, j: j <= i - 1),
        (Mask.window(1, 0, 1), lambda n, i, j: i <= j <= i + 1),
        (Mask.window(2, None, -1), lambda n, i, j: j >= i - 3),
        (Mask.window(None, 2, 0), lambda n, i, j: j <= i + 2),
        (Mask.everything(), lambda n, i, j: True),
        (Mask.lengths(lengths), lambda n, i, j: j < lengths[n]),
        (Mask.padding(keep), lambda n, i, j: keep[n, j]),
    ]
    if t <= s:
        banded.append((Mask.causal(), lambda n, i, j: j <= i + s - t))
        banded.append((Mask.window(1, 1), lambda n, i, j: abs(j - i - s + t) <= 1))
    others = [
        (Mask.causal(offsets), lambda n, i, j: j <= i + offsets[n]),
        (Mask.window(1, 0, offsets), lambda n, i, j: -1 <= j - i - offsets[n] <= 0),
        (Mask.segments(q_ids, k_ids), lambda n, i, j: q_ids[n, i] == k_ids[n, j]),
        (Mask.dense(pairs), lambda n, i, j: pairs[n, 0, i, j]),
        (Mask.dense(pairs[:1, :, :, :1]), lambda n, i, j: pairs[0, 0, i, 0]),
        (Mask.dense(pairs[:, :, :1]), lambda n, i, j: pairs[n, 0, 0, j]),
    ]
    return banded, others


def written_out(band, b, t, s):
    """Write a band out pair by pair."""

    def seen(n, i, j):
        above = band.lower is None or j >= i + band.lower
        below = band.upper is None or j <= i + band.upper
        return above and below and (band.keep is None or band.keep[n % len(band.keep), j])

    return loop(seen, b, t, s)


@pytest.mark.parametrize(("t", "s"), [(1, 1), (3, 4), (4, 3)])
def test_every_mask_and_every_join_of_two_means_what_its_rules_say(t, s):
    banded, others = plain_masks(2, t, s)
    every = [(mask, loop(rule, 2, t, s), mask.band(t, s)) for mask, rule in banded + others]
    rows, cols = torch.arange(t // 2, t), torch.arange((s + 1) // 2)

    def check(mask, expected):
        dense = mask.to_dense(t, s)
        assert dense.shape[2:] == (t, s)
        assert torch.equal(dense.expand(2, 1, t, s), expected)
        tile = mask.tile(rows, cols, t, s).expand(2, 1, len(rows), len(cols))
        assert torch.equal(tile, expected[:, :, t // 2 :, : len(cols)])
        band = mask.band(t, s)
        assert band is None or torch.equal(written_out(band, 2, t, s), expected)

    for mask, seen, band in every:
        check(mask, seen)
        check(~mask, ~seen)
        assert (~mask).band(t, s) is None
        for other, other_seen, other_band in every:
            check(mask & other, seen & other_seen)
            check(mask | other, seen | other_seen)
            assert (mask | other).band(t, s) is None
            both = band is not None and other_band is not None
            assert ((mask & other).band(t, s) is not None) == both
    assert all(band is not None for _, _, band in every[: len(banded)])
    assert all(band is None for _, _, band in every[len(banded) :])


@pytest.mark.parametrize(
    ("lower", "upper"),
    [(None, None), (None, -3), (None, 2), (-2, None), (1, None), (-2, 0), (0, 0), (1, 2), (-5, -3)],
)
def test_band_knows_which_keys_some_queries_see(lower, upper):
    n = 4
    seen = written_out(Band(lower, upper, None), 1, n, n)[0, 0]
    for first in range(n):
        for last in range(first, n):
            part = seen[first : last + 1]
            start, stop = Band(lower, upper, None).keys_of(first, last, n)
            assert 0 <= start <= n
            assert 0 <= stop <= n
            keys = part.any(0).nonzero()
            if len(keys):
                assert (start, stop) == (int(keys[0]), int(keys[-1]) + 1)
            else:
                assert start >= stop
            for a in range(n):
                for b in range(a + 1, n + 1):
                    full = Band(lower, upper, None).is_full(first, last, a, b)
                    assert full == bool(part[:, a:b].all())


def test_joined_masks_know_their_sizes():
    one, two = torch.ones(1, 3, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)
    heads = torch.ones(1, 4, 3, 3, dtype=torch.bool)
    assert Mask.causal().sizes() == (None, None)
    assert Mask.padding(two).sizes() == (2, None)
    assert (Mask.causal() & Mask.lengths(torch.tensor([1]))).sizes() == (1, None)
    for join in (lambda a, b: a & b, lambda a, b: a | b):
        assert join(Mask.padding(one), Mask.dense(heads)).sizes() == (1, 4)
        assert join(Mask.dense(heads), Mask.padding(two)).sizes() == (2, 4)
        assert (~join(Mask.causal(), Mask.causal(0))).sizes() == (None, None)
        assert join(Mask.padding(two), Mask.causal(torch.tensor([1]))).sizes() == (2, None)


def test_masks_know_the_device_of_their_tensors():
    offset, keep = torch.tensor([1, 1]), torch.ones(2, 2, dtype=torch.bool)
    for mask in (
        Mask.causal(offset), Mask.window(1, None, offset), Mask.lengths(offset),
        Mask.padding(keep), Mask.segments(keep.long()), Mask.dense(keep[None, None]),
        Mask.causal() & Mask.padding(keep), Mask.padding(keep) | Mask.causal(), ~Mask.padding(keep),
    ):  # fmt: skip
        assert mask.devices() == {torch.device("cpu")}
    assert Mask.causal().devices() == set()


def test_to_dense_is_written_where_the_tensors_are_or_where_it_is_asked_for():
    away = Mask.lengths(torch.ones(2, dtype=torch.int64, device="meta"))
    assert away.to_dense(2, 2).device == torch.device("meta")
    assert Mask.causal().to_dense(2, 2).device == torch.device("cpu")
    assert Mask.causal().to_dense(2, 2, "meta").device == torch.device("meta")
    assert Mask.everything().to_dense(2, 2, "meta").device == torch.device("meta")
    assert away.band(2, 2).keep.device == torch.device("meta")


@given(case=joined_masks())
def test_to_dense_means_what_the_rule_says(case):
    mask, rule, b, t, s = case
    dense = mask.to_dense(t, s)
    assert dense.dtype == torch.bool
    assert torch.equal(dense.expand(b, 1, t, s), loop(rule, b, t, s))


@given(case=joined_masks())
def test_band_says_the_same_as_to_dense_where_there_is_one(case):
    mask, rule, b, t, s = case
    band = mask.band(t, s)
    if band is None:
        return
    i, j = torch.arange(t)[:, None], torch.arange(s)[None]
    seen = torch.ones(t, s, dtype=torch.bool)
    if band.lower is not None:
        seen &= j >= i + band.lower
    if band.upper is not None:
        seen &= j <= i + band.upper
    seen = seen[None, None]
    if band.keep is not None:
        seen = seen & band.keep[:, None, None]
    assert torch.equal(seen.expand(b, 1, t, s), loop(rule, b, t, s))
    first, last = band.keys_of(0, t - 1, s)
    assert not loop(rule, b, t, s)[..., :first].any()
    assert not loop(rule, b, t, s)[..., last:].any()
    if band.keep is None and band.is_full(0, t - 1, first, last):
        assert loop(rule, b, t, s)[..., first:last].all()


@given(case=joined_masks())
def test_sight_answers_as_the_dense_mask_does(case):
    mask, rule, b, t, s = case
    dense = loop(rule, b, t, s)
    sight = Sight.of(mask, None, t, s, torch.device("cpu"))

    rows = sight.rows_with_a_key()
    rows = torch.ones(1, 1, 1, dtype=torch.bool) if rows is None else rows
    assert torch.equal(rows.expand(b, 1, t), dense.any(-1))
    keys = sight.keys_with_a_row()
    keys = torch.ones(1, 1, 1, dtype=torch.bool) if keys is None else keys
    assert torch.equal(keys.expand(b, 1, s), dense.any(-2))

    flags = torch.rand(b, 1, s, generator=torch.Generator().manual_seed(t)) > 0.7
    assert torch.equal(sight.sees_any(flags).expand(b, 1, t), (dense & flags[:, :, None]).any(-1))
    marks = torch.rand(b, 1, t, generator=torch.Generator().manual_seed(s)) > 0.7
    marked = (dense & marks[..., None]).any(-2)
    assert torch.equal(sight.seen_by_any(marks).expand(b, 1, s), marked)
    values = torch.rand(b, 1, s, generator=torch.Generator().manual_seed(s))
    largest = torch.where(dense, values[:, :, None], 0.0).amax(-1)
    assert torch.equal(sight.largest_seen(values).expand(b, 1, t), largest)


@given(case=joined_masks())
def test_tile_is_a_part_of_to_dense(case):
    mask, _, b, t, s = case
    rows, cols = torch.arange(t // 2, t), torch.arange(0, (s + 1) // 2)
    tile = mask.tile(rows, cols, t, s).expand(b, 1, len(rows), len(cols))
    assert torch.equal(tile, mask.to_dense(t, s).expand(b, 1, t, s)[:, :, t // 2 :, : len(cols)])


def test_causal_without_offset_puts_the_last_query_on_the_last_key():
    assert torch.equal(Mask.causal().to_dense(2, 4), Mask.causal(2).to_dense(2, 4))


def test_everything_lets_every_query_see_every_key():
    assert Mask.everything().to_dense(2, 3).all()
    assert Mask.from_mha().to_dense(2, 3).all()


def test_from_mha_turns_the_polarity_round():
    blocked = torch.rand(4, 5) > 0.5
    padded = torch.rand(2, 5) > 0.5
    expected = ~(blocked[None, None] | padded[:, None, None])
    assert torch.equal(Mask.from_mha(blocked, padded).to_dense(4, 5), expected)
    as_float = torch.zeros(4, 5).masked_fill(blocked, -torch.inf)
    padded_float = torch.zeros(2, 5).masked_fill(padded, -torch.inf)
    assert torch.equal(Mask.from_mha(as_float, padded_float).to_dense(4, 5), expected)
    padding = ~padded[:, None, None]
    for alone in (padded, padded_float):
        assert torch.equal(Mask.from_mha(key_padding_mask=alone).to_dense(4, 5)[:, :, :1], padding)
    per_head = torch.rand(6, 4, 5) > 0.5
    dense = Mask.from_mha(per_head, n_heads=3).to_dense(4, 5)
    assert torch.equal(dense, ~per_head.reshape(2, 3, 4, 5))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_from_huggingface_reads_one_as_a_real_token(dtype):
    keep = torch.tensor([[1, 1, 0], [0, 1, 1]])
    dense = Mask.from_huggingface(keep.to(dtype)).to_dense(2, 3)
    assert torch.equal(dense[:, 0, 0], keep.bool())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_from_huggingface_reads_additive_masks(dtype):
    allowed = torch.rand(2, 1, 3, 4) > 0.5
    added = torch.zeros(2, 1, 3, 4, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    assert torch.equal(Mask.from_huggingface(added).to_dense(3, 4), allowed)
    assert torch.equal(Mask.from_huggingface(allowed).to_dense(3, 4), allowed)


def test_from_cu_seqlens_keeps_sequences_apart():
    dense = Mask.from_cu_seqlens(torch.tensor([0, 2, 2, 5])).to_dense(5, 5)[0, 0]
    assert torch.equal(dense, torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_from_cu_seqlens_lets_each_sequence_see_its_own_keys(dtype):
    cu_q, cu_k = (torch.tensor(x, dtype=dtype) for x in ([0, 2, 3], [0, 1, 5]))
    dense = Mask.from_cu_seqlens(cu_q, cu_k).to_dense(3, 5)[0, 0]
    assert torch.equal(dense, torch.block_diag(torch.ones(2, 1), torch.ones(1, 4)).bool())


def test_repr_says_what_the_mask_is():
    mask = (Mask.causal() & Mask.lengths(torch.tensor([1, 2]))) | ~Mask.window(1, 0, 2)
    assert repr(mask) == (
        "((Mask.causal() & Mask.lengths(key_lengths of shape (2,))) "
        "| ~Mask.window(left=1, right=0, offset=2))"
    )
    ids = torch.zeros(1, 2, dtype=torch.int64)
    assert repr(Mask.segments(ids)) == "Mask.segments(ids of shapes (1, 2) and (1, 2))"
    assert repr(Mask.dense(ids.bool()[None, None])) == "Mask.dense(allowed of shape (1, 1, 1, 2))"
    assert repr(Mask.causal(torch.tensor([1]))) == "Mask.causal(offset of shape (1,))"
    assert repr(Mask.causal(-1)) == "Mask.causal(offset=-1)"
    assert repr(Mask.everything()) == "Mask.everything()"
    assert repr(Mask.window(right=1)) == "Mask.window(left=None, right=1)"


keep = torch.ones(2, 3, dtype=torch.bool)
REFUSED = [
    (
        lambda: Mask.from_mha([1]),
        TypeError,
        "attn_mask must be a torch.Tensor, got attn_mask=list. Use torch.as_tensor.",
    ),
    (
        lambda: Mask.from_mha(key_padding_mask=1),
        TypeError,
        "key_padding_mask must be a torch.Tensor, got key_padding_mask=int. Use torch.as_tensor.",
    ),
    (
        lambda: Mask.dense(keep),
        ValueError,
        "allowed must have 4 axes (b, h, t, s), got allowed=a tensor of shape (2, 3). (b, s) "
        "and (t, s) look alike: use Mask.padding(keep) for (b, s), allowed[None, None] for "
        "(t, s).",
    ),
    (
        lambda: Mask.dense(keep.float()),
        TypeError,
        "allowed must be boolean (True = may attend), got allowed=torch.float32. A float mask"
        " is a bias: pass it as bias=, where -inf blocks.",
    ),
    (
        lambda: Mask.dense(keep.to(torch.uint8)),
        TypeError,
        "allowed must be boolean (True = may attend), got allowed=torch.uint8. Where a non-"
        "zero entry means True, pass allowed.bool().",
    ),
    (
        lambda: Mask.padding(keep.long()),
        TypeError,
        "keep must be boolean (True = may attend), got keep=torch.int64. For a 0/1 "
        "attention_mask use Mask.from_huggingface(attention_mask).",
    ),
    (
        lambda: Mask.padding(keep[0]),
        ValueError,
        "keep must have 2 axes (b, s), got keep=a tensor of shape (3,). For a mask of pairs "
        "use Mask.dense.",
    ),
    (
        lambda: Mask.lengths(torch.ones(2)),
        TypeError,
        "key_lengths must hold integers, got key_lengths=torch.float32.",
    ),
    (
        lambda: Mask.lengths(keep[0]),
        TypeError,
        "key_lengths must hold integers, got key_lengths=torch.bool.",
    ),
    (
        lambda: Mask.lengths(torch.ones(2, 1).long()),
        ValueError,
        "key_lengths must have 1 axes (b), got key_lengths=a tensor of shape (2, 1). Pass one"
        " length per batch row.",
    ),
    (
        lambda: Mask.causal(1.5),
        TypeError,
        "offset must be None, an int or an integer tensor (b,), got offset=1.5.",
    ),
    (
        lambda: Mask.causal(True),
        TypeError,
        "offset must be None, an int or an integer tensor (b,), got offset=True.",
    ),
    (
        lambda: Mask.causal(torch.ones(2)),
        TypeError,
        "offset must hold integers, got offset=torch.float32.",
    ),
    (
        lambda: Mask.causal(torch.ones(2, 1).long()),
        ValueError,
        "offset must have 1 axes (b), got offset=a tensor of shape (2, 1). Pass one offset "
        "per batch row.",
    ),
    (
        lambda: Mask.causal().to_dense(4, 3),
        ValueError,
        "n_queries must be at most n_keys where offset is None, got n_queries=4 and n_keys=3."
        " Pass offset=0 to align the first query with the first key.",
    ),
    (
        lambda: Mask.window(left=-1),
        ValueError,
        "left must be at least 0, got left=-1. None means no limit.",
    ),
    (
        lambda: Mask.window(right=0.5),
        TypeError,
        "right must be None or an int, got right=0.5.",
    ),
    (
        lambda: Mask.window(1, 0, 1.5),
        TypeError,
        "offset must be None, an int or an integer tensor (b,), got offset=1.5.",
    ),
    (
        lambda: Mask.segments(keep),
        TypeError,
        "query_ids must hold integers, got query_ids=torch.bool.",
    ),
    (
        lambda: Mask.segments(keep.long(), keep),
        TypeError,
        "key_ids must hold integers, got key_ids=torch.bool.",
    ),
    (
        lambda: Mask.segments(keep.long()[0]),
        ValueError,
        "query_ids must have 2 axes (b, n), got query_ids=a tensor of shape (3,). Pass one id"
        " per token.",
    ),
    (
        lambda: Mask.segments(keep.long(), keep.long()[:1]),
        ValueError,
        "query_ids and key_ids must have the same batch size, got query_ids=(2, 3) and "
        "key_ids=(1, 3).",
    ),
    (
        lambda: Mask.segments(keep.long()).to_dense(4, 3),
        ValueError,
        "query_ids must cover the 4 queries, got query_ids=a mask over 3.",
    ),
    (
        lambda: Mask.segments(keep.long()).to_dense(3, 4),
        ValueError,
        "key_ids must cover the 4 keys, got key_ids=a mask over 3.",
    ),
    (
        lambda: Mask.padding(keep).to_dense(3, 4),
        ValueError,
        "keep must cover the 4 keys, got keep=a mask over 3.",
    ),
    (
        lambda: Mask.padding(keep).band(3, 4),
        ValueError,
        "keep must cover the 4 keys, got keep=a mask over 3.",
    ),
    (
        lambda: Mask.dense(keep[None, None]).to_dense(2, 4),
        ValueError,
        "allowed must cover the 4 keys, got allowed=a mask over 3.",
    ),
    (
        lambda: Mask.dense(keep[None, None]).to_dense(1, 3),
        ValueError,
        "allowed must cover the 1 queries, got allowed=a mask over 2.",
    ),
    (
        lambda: Mask.causal() & keep,
        TypeError,
        "other must be a Mask, got other=Tensor. Wrap a boolean tensor of 4 axes in "
        "Mask.dense first.",
    ),
    (
        lambda: Mask.causal() | None,
        TypeError,
        "other must be a Mask, got other=NoneType. Wrap a boolean tensor of 4 axes in "
        "Mask.dense first.",
    ),
    (
        lambda: Mask.padding(keep) & Mask.lengths(torch.ones(3).long()),
        ValueError,
        "other must have batch size 1 or 2, got other=a mask with batch size 3.",
    ),
    (
        lambda: Mask.dense(keep[:, :, None, None]) & Mask.dense(keep[:, :2, None, None]),
        ValueError,
        "other must have heads 1 or 3, got other=a mask with heads 2.",
    ),
    (
        lambda: Mask.from_mha(torch.ones(3, 3)),
        ValueError,
        "attn_mask must hold only 0 and -inf where it is a float, got attn_mask=a tensor with"
        " other values. Pass those values as bias=.",
    ),
    (
        lambda: Mask.from_mha(torch.ones(3, 3).long()),
        TypeError,
        "attn_mask must have a floating-point dtype, got attn_mask=torch.int64.",
    ),
    (
        lambda: Mask.from_mha(keep[None]),
        ValueError,
        "n_heads must be given with an attn_mask of three axes (b * h, t, s), got n_heads=None.",
    ),
    (
        lambda: Mask.from_mha(keep[None], n_heads=2),
        ValueError,
        "n_heads must divide attn_mask.shape[0], got n_heads=2 and attn_mask.shape[0]=1.",
    ),
    (
        lambda: Mask.from_huggingface(keep[0]),
        ValueError,
        "attention_mask must have 4 axes (b, h, t, s), got attention_mask=a tensor of shape "
        "(3,). Or pass (b, s) with 1 = a real token.",
    ),
    (
        lambda: Mask.from_huggingface(keep.long()[None, None]),
        TypeError,
        "attention_mask must have a floating-point dtype, got attention_mask=torch.int64.",
    ),
    (
        lambda: Mask.from_huggingface([1]),
        TypeError,
        "attention_mask must be a torch.Tensor, got attention_mask=list. Use torch.as_tensor.",
    ),
    (
        lambda: Mask.from_cu_seqlens(torch.ones(2)),
        TypeError,
        "cu_q must hold integers, got cu_q=torch.float32.",
    ),
    (
        lambda: Mask.from_cu_seqlens(torch.tensor([0, 1]), torch.ones(2)),
        TypeError,
        "cu_k must hold integers, got cu_k=torch.float32.",
    ),
    (
        lambda: Mask.from_cu_seqlens(keep.long()),
        ValueError,
        "cu_q must have 1 axes (n+1), got cu_q=a tensor of shape (2, 3). Pass the starts and "
        "the total.",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), REFUSED)
def test_mask_refuses_what_can_be_misread(call, error, text):
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        call()
