"""A problem is cut into pieces that hold every pair that may attend, once, and little else."""

import pytest
import torch

from stabletx import Mask, attention
from stabletx.functional import fused as module
from stabletx.functional._problem import checked_problem
from tests.test_masks import plain_masks

B, H, T, S, D = 2, 4, 7, 9, 3
KEEP = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1]]).bool()
HOLES = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 0, 1], [0, 1, 0, 1, 1, 1, 1, 1, 0]]).bool()
SAME = KEEP[:1].expand(2, S)


def every_mask(t, s):
    banded, others = plain_masks(B, t, s)
    yield None
    yield Mask.window(1, 0, 0)
    yield from (mask for mask, _ in banded + others)
    for keep in (KEEP, HOLES, SAME, ~KEEP & False, KEEP[:1]):
        yield Mask.padding(keep[:, :s])
        yield Mask.padding(keep[:, :s]) & Mask.causal(0)
        yield Mask.padding(keep[:, :s]) & Mask.window(1, 1, 0)


def problem_of(mask, *, bias=None, t=T, s=S, g=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, t, D), (B, g, s, D), (B, g, s, D))
    q, k, v = (torch.randn(x, generator=generator, dtype=torch.float64).to(dtype) for x in shapes)
    return checked_problem(q, k, v, mask, bias, None, None, None, 0.0, None)


@pytest.fixture(params=[(128, 768, 2**20), (2, 768, 1), (3, 4, 2**20), (2, 6, 200)], ids=str)
def cuts(request, monkeypatch):
    """Cut into rows at other places."""
    names = ("SPLIT_ROWS", "KERNEL_IS_CAUSAL_FROM", "CONVERTED_AT_ONCE")
    for name, value in zip(names, request.param, strict=True):
        monkeypatch.setattr(module, name, value)


def columns(piece, s):
    every = torch.arange(s)
    return every[piece.keys] if isinstance(piece.keys, slice) else piece.keys


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("t", "s"), [(T, S), (7, 7), (9, 4)])
def test_pieces_hold_every_pair_that_may_attend_once(cuts, dtype, t, s):
    for mask in every_mask(t, s):
        problem = problem_of(mask, t=t, s=s, dtype=dtype)
        sight = problem.sight()
        dense = sight.dense()
        allowed = torch.ones(B, t, s, dtype=torch.bool)
        if dense is not None:
            allowed = dense.expand(B, 1, t, s)[:, 0]
        held = torch.zeros(B, t, s, dtype=torch.int64)
        for piece in module._pieces(sight, problem.q):
            cols = columns(piece, s)
            part = allowed[piece.batch, piece.rows][..., cols]
            assert part.numel()
            if piece.is_causal:
                assert torch.equal(part, torch.ones_like(part).tril())
            elif piece.is_full:
                assert part.all()
            else:
                assert not part.all() or mask is not None
            held[piece.batch, piece.rows] += torch.zeros(s).index_fill(0, cols, 1).long()
        assert (held[allowed] == 1).all(), mask
        assert (held <= 1).all()


def number_of_pairs(mask, **options):
    problem = problem_of(mask, **options)
    pieces = list(module._pieces(problem.sight(), problem.q))
    sizes = [problem.q[x.batch, 0, x.rows].shape[:2].numel() * len(columns(x, S)) for x in pieces]
    return len(pieces), sum(sizes)


def test_keys_that_a_batch_row_may_not_see_are_cut_off():
    assert number_of_pairs(None) == (1, B * T * S)
    assert number_of_pairs(Mask.padding(KEEP)) == (2, T * 3 + T * 7)
    assert number_of_pairs(Mask.padding(HOLES)) == (2, T * 5 + T * 6)
    assert number_of_pairs(Mask.padding(SAME)) == (1, B * T * 3)
    assert number_of_pairs(Mask.padding(KEEP & False)) == (0, 0)


def test_blocked_keys_cost_nothing_where_rows_are_split(monkeypatch):
    monkeypatch.setattr(module, "SPLIT_ROWS", 2)
    window = Mask.window(0, 0, 0)
    assert number_of_pairs(window) == (4, B * (2 * 2 * 3 + 1))
    assert number_of_pairs(Mask.causal(0)) == (4, B * (2 * (2 + 4 + 6) + 7))
    assert number_of_pairs(Mask.window(0, 0, 7)) == (1, B * 2 * 2)
    keys_of_both = Mask.padding(KEEP) & window
    assert number_of_pairs(keys_of_both) == (5, 2 * 2 + 2 * 1 + (2 * 2 + 2 * 2 + 1))


def test_sixteen_bit_rows_are_converted_in_parts(monkeypatch):
    assert number_of_pairs(None, dtype=torch.bfloat16) == (1, B * T * S)
    monkeypatch.setattr(module, "CONVERTED_AT_ONCE", H * T * D * 4 * 2 - 1)
    assert number_of_pairs(None, dtype=torch.bfloat16) == (2, B * T * S)
    assert number_of_pairs(None, dtype=torch.float32) == (1, B * T * S)
    monkeypatch.setattr(module, "CONVERTED_AT_ONCE", H * T * D * 4 * 2)
    assert number_of_pairs(None, dtype=torch.float16) == (1, B * T * S)


def biases(t, s):
    generator = torch.Generator().manual_seed(1)
    for shape in ((1, 1, t, s), (B, H, t, s), (B, 1, 1, s), (1, H, t, 1)):
        yield torch.randn(shape, generator=generator, dtype=torch.float64)


def answers(problem, method, wanted="qkv"):
    leaves = {name: getattr(problem, name).detach().clone() for name in "qkv"}
    for name in wanted:
        leaves[name].requires_grad_()
    out = attention(**leaves, mask=problem.mask, bias=problem.bias, method=method)
    push = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    found = [leaves[name] for name in wanted]
    return [out.detach(), *torch.autograd.grad(out, found, push)]


@pytest.mark.parametrize(("g", "t", "s"), [(2, T, S), (1, 7, 7), (4, 9, 4)])
def test_pieces_are_the_formula_forward_and_backward(cuts, g, t, s):
    problems = [problem_of(mask, t=t, s=s, g=g) for mask in every_mask(t, s)]
    for bias in biases(t, s):
        for mask in (None, Mask.causal(0), Mask.padding(HOLES[:, :s]), Mask.padding(KEEP[:, :s])):
            problems.append(problem_of(mask, bias=bias, t=t, s=s, g=g))
    for problem in problems:
        pairs = zip(answers(problem, "fused"), answers(problem, "exact"), strict=True)
        for a, b in pairs:
            assert a.shape == b.shape
            assert torch.allclose(a, b), problem.mask
        with torch.no_grad():
            q, k, v = problem.q, problem.k, problem.v
            out = attention(q, k, v, mask=problem.mask, bias=problem.bias, method="fused")
        assert torch.equal(out, answers(problem, "fused")[0])


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qv", "kv"])
def test_gradients_of_both_orders_go_to_what_wants_them_alone(wanted):
    found = []
    for method in ("fused", "exact"):
        tensors = {name: getattr(problem_of(None), name).clone() for name in "qkv"}
        leaves = [tensors[name].requires_grad_() for name in wanted]
        out = attention(**tensors, mask=Mask.causal(), method=method)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
        found.append([*first, *second])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b)
