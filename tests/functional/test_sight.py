"""Every question about who sees whom is answered as the pairs written out would answer it."""

import pytest
import torch

from stabletx import Mask
from stabletx.functional import _sight
from stabletx.functional._sight import Sight, is_traced, values_may_be_read
from tests.test_masks import plain_masks

CPU = torch.device("cpu")
SIZES = [(1, 1), (5, 4), (4, 7), (3, 0)]


def biases(t, s):
    """Give biases of every shape; all but the first block some pairs."""
    generator = torch.Generator().manual_seed(1)
    yield torch.zeros(1, 1, t, s)
    for shape in ((1, 1, t, s), (2, 3, t, s), (1, 3, 1, s), (2, 1, t, 1), (1, 1, 1, 1)):
        bias = torch.randn(shape, generator=generator)
        yield bias.masked_fill(torch.rand(shape, generator=generator) > 0.6, -torch.inf)


def sights(t, s):
    """Give sights of every kind, each with the pairs (2, 3, t, s) that it must mean."""
    everything = torch.ones(2, 3, t, s, dtype=torch.bool)
    kinds = [(None, everything)]
    if t and s:
        banded, others = plain_masks(2, t, s)
        masks = [mask for mask, _ in banded + others]
        masks += [Mask.causal(-3), Mask.window(0, 0, -3), Mask.window(0, 0, 9)]
        masks += [Mask.padding(torch.arange(2 * s).view(2, s) % 2 == 0) & Mask.causal(0)]
        kinds += [(mask, mask.to_dense(t, s).expand(2, 3, t, s)) for mask in masks]
    for mask, allowed in kinds:
        yield Sight.of(mask, None, t, s, CPU), allowed
        for bias in biases(t, s):
            yield Sight.of(mask, bias, t, s, CPU), allowed & (bias != -torch.inf)


def flags(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.6


@pytest.fixture(params=["at once", "by blocks", "traced"])
def reading(request, monkeypatch):
    """Read all rows together, a few at a time, and as where nothing may be read."""
    if request.param == "by blocks":
        monkeypatch.setattr(_sight, "ROWS_AT_ONCE", 2)
    if request.param == "traced":
        monkeypatch.setattr(_sight, "is_traced", lambda: True)


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize(("t", "s"), SIZES)
def test_every_question_is_answered_as_by_the_pairs(t, s):
    of_keys, of_rows = flags(2, 3, s), flags(2, 3, t)
    values = torch.rand(2, 3, s, generator=torch.Generator().manual_seed(4))
    for sight, allowed in sights(t, s):

        def check(found, expected, shape):
            found = torch.ones((), dtype=torch.bool) if found is None else found
            assert torch.equal(found.expand(shape), expected)

        check(sight.dense(), allowed, allowed.shape)
        check(sight.rows_with_a_key(), allowed.any(-1), (2, 3, t))
        check(sight.keys_with_a_row(), allowed.any(-2), (2, 3, s))
        check(sight.sees_any(of_keys), (allowed & of_keys[:, :, None]).any(-1), (2, 3, t))
        check(sight.seen_by_any(of_rows), (allowed & of_rows[..., None]).any(-2), (2, 3, s))
        seen = torch.where(allowed, values[:, :, None], 0.0)
        check(sight.largest_seen(values), seen.amax(-1) if s else torch.zeros(2, 3, t), (2, 3, t))
        assert sight.largest_seen(values).shape == (2, 3, t)
        assert not sight.is_everything or bool(allowed.all())


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize(("t", "s"), [(5, 4), (4, 7)])
def test_a_tile_is_a_part_of_the_pairs(t, s):
    rows, cols = slice(1, 3), torch.tensor([0, 2, 3])
    for sight, allowed in sights(t, s):
        tile = sight.tile(rows, cols)
        if tile is None:
            assert sight.mask is None
            assert allowed.all()
        else:
            assert torch.equal(tile.expand(2, 3, 2, 3), allowed[:, :, rows, cols])


def test_what_sees_everything_is_not_written_out():
    for mask in (None, Mask.everything()):
        for bias in (None, torch.zeros(1, 1, 4, 5)):
            sight = Sight.of(mask, bias, 4, 5, CPU)
            assert sight.is_everything
            assert sight.dense() is None
            assert sight.rows_with_a_key() is None


@pytest.mark.parametrize(
    ("mask", "all_have_one"),
    [
        (Mask.causal(), True),
        (Mask.causal(0), True),
        (Mask.causal(-1), False),
        (Mask.window(1, 1), True),
        (Mask.window(0, 0, 1), True),
        (Mask.window(0, 0, 2), False),
        (Mask.window(0, None, -1), True),
        (Mask.causal(0) & Mask.window(0, None, 0), True),
        (Mask.causal(0) & Mask.window(0, None, 1), False),
    ],
)
def test_bands_in_which_every_row_has_a_key_are_known_without_a_look(mask, all_have_one):
    found = Sight.of(mask, None, 4, 5, CPU).rows_with_a_key()
    assert (found is None) == all_have_one


@pytest.mark.parametrize("mask", [Mask.causal(0), Mask.window(1, 1, 0), ~Mask.causal(0)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("s", [5, 0])
def test_answers_lie_where_the_sight_does(mask, with_bias, s):
    meta = torch.device("meta")
    bias = torch.zeros(1, 1, 4, s, device=meta) if with_bias else None
    sight = Sight.of(mask, bias, 4, s, meta)
    of_keys, of_rows = (flags(1, 1, n).to(meta) for n in (s, 4))
    for answer in (
        sight.dense(), sight.rows_with_a_key(), sight.keys_with_a_row(), sight.sees_any(of_keys),
        sight.seen_by_any(of_rows), sight.largest_seen(torch.zeros(1, 1, s, device=meta)),
    ):  # fmt: skip
        assert answer is None or answer.device == meta


def test_values_are_read_on_the_cpu_alone_and_never_under_a_transform(monkeypatch):
    found = []

    def ask(x):
        found.append((is_traced(), values_may_be_read(x)))
        return x

    ask(torch.zeros(1))
    torch.func.vmap(ask)(torch.zeros(1))
    ask(torch.zeros(1, device="meta"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    ask(torch.zeros(1))
    assert found == [(False, True), (True, False), (False, False), (True, False)]


@pytest.mark.parametrize("mask", [None, Mask.causal(0), Mask.window(1, 1, 0), ~Mask.causal(0)])
def test_without_a_query_nothing_is_seen(mask):
    sight = Sight.of(mask, None, 0, 5, CPU)
    rows = sight.rows_with_a_key()
    assert rows is None or rows.shape[-1] == 0
    assert sight.sees_any(flags(2, 3, 5)).shape == (2, 3, 0)
    assert sight.largest_seen(torch.rand(2, 3, 5)).shape == (2, 3, 0)
    seen = sight.seen_by_any(flags(2, 3, 0))
    assert seen.shape == (2, 3, 5)
    assert not seen.any()
