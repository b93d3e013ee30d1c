"""Attention by tiles is attention, wherever the tiles are cut."""

import itertools

import pytest
import torch

from stabletx import Mask, attention, attention_details
from stabletx.functional import tiled as module

T, S, H, G, D, E = 5, 7, 4, 2, 3, 2
KEEP = torch.tensor([[1, 0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1]]).bool()
MASKS = {
    "none": None,
    "causal": Mask.causal(),
    "from the left": Mask.causal(-1),
    "window": Mask.window(1, 0),
    "far window": Mask.window(0, 1, 4),
    "padding": Mask.padding(KEEP),
    "padding and causal": Mask.padding(KEEP) & Mask.causal(),
    "pairs": Mask.dense(
        torch.rand(2, 4, T, S, generator=torch.Generator().manual_seed(0)) > 0.4,
    ),
}
BIASES = [None, (2, H, T, S), (1, 1, 1, S), (1, H, T, 1)]


@pytest.fixture(params=[(128, 256), (2, 3), (1, 1)], ids=str)
def tiles(request, monkeypatch):
    """Cut into tiles of (queries, keys)."""
    monkeypatch.setattr(module, "QUERIES", request.param[0])
    monkeypatch.setattr(module, "KEYS", request.param[1])


def inputs(bias=None, sinks=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, H, T, D), (2, G, S, D), (2, G, S, E), bias, (H,) if sinks else None]
    return [
        None if shape is None else torch.randn(shape, generator=generator, dtype=dtype)
        for shape in shapes
    ]


def details_and_gradients(tensors, method, **options):
    leaves = [None if x is None else x.clone().requires_grad_() for x in tensors]
    q, k, v, bias, sinks = leaves
    found = attention_details(q, k, v, bias=bias, sinks=sinks, method=method, **options)
    lse = torch.where(found.lse == -torch.inf, 0.0, found.lse)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (found.out, lse)]
    given = [x for x in leaves if x is not None]
    grads = torch.autograd.grad((found.out, lse), given, upstream)
    stats = [found.out, found.lse, found.max_score, found.entropy, found.empty_rows.double()]
    return [x.detach() for x in (*stats, *grads)]


@pytest.mark.parametrize(
    ("mask", "bias", "softcap", "sinks"),
    list(itertools.product(MASKS, BIASES, [None, 1.5], [False, True])),
)
def test_tiles_are_the_formula_forward_and_backward(tiles, mask, bias, softcap, sinks):
    tensors = inputs(bias, sinks)
    options = {"mask": MASKS[mask], "softcap": softcap, "scale": 0.7}
    found = details_and_gradients(tensors, "tiled", **options)
    exact = details_and_gradients(tensors, "exact", **options)
    for a, b in zip(found, exact, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b)


@pytest.mark.parametrize("mask", ["none", "window", "pairs"])
def test_tiles_drop_the_same_weights_in_every_pass(tiles, mask):
    q, k, v, _, _ = inputs()
    eye = torch.eye(S, dtype=torch.float64).expand(2, G, S, S)
    options = {"mask": MASKS[mask], "dropout_p": 0.5, "training": True, "method": "tiled"}
    torch.manual_seed(0)
    dropped = attention(q, k, eye, **options)
    weights = attention_details(q, k, eye, mask=MASKS[mask], weights=True).weights
    left = torch.where(weights > 0, dropped / weights, 0.0)
    assert torch.allclose(left, left.round())  # 0 or 1 / (1 - p), which is 2
    assert set(left.round().unique().tolist()) == {0.0, 2.0}
    torch.manual_seed(0)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, **options)
    again = [x.clone().requires_grad_() for x in (q, k, v)]
    again_weights = attention_details(*again, mask=MASKS[mask], weights=True).weights
    expected = (again_weights * left.round()) @ again[2].repeat_interleave(H // G, 1)
    assert torch.allclose(out, expected)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).double()
    pairs = (torch.autograd.grad(x, y, upstream) for x, y in ((out, leaves), (expected, again)))
    for a, b in zip(*pairs, strict=True):
        assert torch.allclose(a, b)


def test_no_two_tiles_drop_alike(tiles):
    q = torch.zeros(1, 1, 64, 1)
    eye = torch.eye(64)[None, None]
    kept = attention(q, q, eye, dropout_p=0.5, training=True, method="tiled")[0, 0] > 0
    assert len({tuple(row) for row in kept.tolist()}) == 64
    assert len({tuple(column) for column in kept.T.tolist()}) == 64


@pytest.mark.parametrize("wanted", ["q", "k", "v", "bias", "sinks", "q v", "bias sinks"])
def test_second_derivatives_go_to_what_wants_them_alone(wanted):
    found = []
    for method in ("tiled", "exact"):
        names = ("q", "k", "v", "bias", "sinks")
        tensors = dict(zip(names, inputs((1, H, T, S), sinks=True), strict=True))
        leaves = [tensors[name].requires_grad_() for name in wanted.split()]
        q, k, v = (tensors.pop(name) for name in "qkv")
        out = attention(q, k, v, **tensors, method=method, mask=Mask.causal())
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(x.square().sum() for x in first), leaves))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b)
