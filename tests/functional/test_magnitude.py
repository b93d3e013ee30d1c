"""A look at the magnitudes of q, k and v together sees what looks at each would see."""

import pytest
import torch

from stabletx.functional._magnitude import extremes, side_by_side, surely_within


def projected(b=2, t=3, h=4, g=2, d=5):
    whole = torch.randn(b, t, (h + 2 * g) * d)
    parts = whole.split([h * d, g * d, g * d], -1)
    return whole, [x.unflatten(-1, (-1, d)).transpose(1, 2) for x in parts]


@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize("g", [1, 4])
def test_columns_of_one_projection_are_seen_as_it(b, g):
    whole, heads = projected(b=b, g=g)
    assert torch.equal(side_by_side(*heads), whole.flatten(0, 1))


def test_keys_of_another_length_are_not_taken_for_one_projection():
    _, (q, k, v) = projected(b=1)
    for n in (1, 2):
        assert side_by_side(q[:, :, :n], k, v) is None
        assert side_by_side(q, k[:, :, :n], v[:, :, :n]) is None
    assert side_by_side(q, k, v[:, :1]) is None


def test_anything_else_is_not_taken_for_one_projection():
    _, (q, k, v) = projected()
    wider = torch.randn(2, 3, 50).split([20, 10, 10, 10], -1)
    tall = torch.randn(2, 4, 40)[:, :3].split([20, 10, 10], -1)
    others = [
        (q, v, k),
        (q, k, k),
        (q.clone(), k, v),
        (q, k.contiguous(), v),
        (q, k, projected()[1][2]),
        (q[:, :, 1:], k, v),
        (q[:1], k[1:], v[1:]),
        *([x.unflatten(-1, (-1, 5)).transpose(1, 2) for x in part[:3]] for part in (wider, tall)),
    ]
    assert all(side_by_side(*other) is None for other in others)
    assert side_by_side(*(x[:, :, :0] for x in (q, k, v))) is None


@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.T], ids=["whole", "view"])
def test_numbers_up_to_the_limit_are_surely_within_it(layout):
    x = layout(torch.tensor([[-2.0, 1.0, 0.5], [0.0, -1.0, 1.5]], requires_grad=True))
    assert extremes(x) == (-2.0, 1.5)
    assert surely_within(x, 2.0)
    assert surely_within(-x, 2.0)
    assert not surely_within(x, 1.9)
    assert not surely_within(-x, 1.9)
    for bad in (torch.nan, torch.inf, -torch.inf):
        assert not surely_within(torch.tensor([0.0, bad]), 2.0)
    assert not surely_within(x[:0], 2.0)
    assert not surely_within(x.to("meta"), 2.0)
