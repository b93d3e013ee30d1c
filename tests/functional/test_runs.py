"""Attention over runs of equal length, by every way of making them, is that of each sequence."""

import pytest
import torch

from stabletx import Mask, attention
from stabletx.functional import _kernels, _runs
from stabletx.functional._kernels import How
from stabletx.functional._runs import ALONE_FROM, attend_runs, is_short
from stabletx.packing import Plan

D = 16  # 64 bytes of float32: every row begins with a cache line
LENGTHS = [3, 0, 5, 3, 1, 5, 5]


def packed(lengths=LENGTHS, h=4, g=4, dtype=torch.float64, d=D):
    generator = torch.Generator().manual_seed(0)
    plan = Plan.of_lengths(torch.tensor(lengths))
    shapes = [(sum(lengths), n, d) for n in (h, g, g)]
    made = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return plan, [x.to(dtype) for x in made]


def one_by_one(plan, q, k, v, how):
    """Attend in each sequence by the formula."""
    outs, start = [], 0
    for run in plan.runs:
        for _ in range(run.n_rows if run.length else 0):
            cut = slice(start, start + run.length)
            heads = [x[cut].transpose(0, 1)[None] for x in (q, k, v)]
            mask = Mask.causal() if how.is_causal else None
            out = attention(*heads, mask=mask, scale=how.scale, method="exact")
            outs.append(out[0].transpose(0, 1))
            start += run.length
    return torch.cat(outs)


@pytest.fixture(params=["short", "together"])
def way(request, monkeypatch):
    """Multiply each sequence out by itself, or a run of them together."""
    monkeypatch.setattr(_runs, "ALONE_FROM", 1 if request.param == "short" else 10**6)
    return request.param


def answers(plan, tensors, how, exact=None):
    """Give what is made without gradients, and with them, and the gradients."""
    plain = attend_runs(*tensors, plan, how, exact)
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = attend_runs(*leaves, plan, how, exact)
    push = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    push = push.to(out.dtype)
    return [plain, out.detach(), *torch.autograd.grad(out, leaves, push)]


@pytest.mark.parametrize("g", [1, 2, 4])
@pytest.mark.parametrize("is_causal", [False, True])
def test_runs_are_the_formula_of_each_sequence(way, g, is_causal):
    plan, tensors = packed(g=g)
    how = How(0.3, is_causal)
    assert is_short(*tensors, plan, how) == (way == "short" and g == 4 and not is_causal)
    found = answers(plan, tensors, how)
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = one_by_one(plan, *leaves, how)
    push = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    push = push.to(out.dtype)
    for a, b in zip(found, [out, out, *torch.autograd.grad(out, leaves, push)], strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [LENGTHS, [4, 4], [4]])
def test_sixteen_bit_runs_are_the_float32_result_rounded_once(way, dtype, lengths):
    plan, tensors = packed(lengths, dtype=dtype, d=2 * D)
    found = answers(plan, tensors, How(0.3))
    wide = answers(plan, [x.float() for x in tensors], How(0.3))
    for a, b in zip(found, wide, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b.to(dtype))


def test_autocast_changes_no_bit_of_runs(way):
    plan, tensors = packed(dtype=torch.float32)
    plain = answers(plan, tensors, How(0.3))
    assert not torch.equal(plain[0], plain[0].bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, answers(plan, tensors, How(0.3)), plain))


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qv", "kv"])
def test_gradients_of_both_orders_go_to_what_wants_them_alone(wanted):
    plan, tensors = packed()
    how = How(0.3, is_causal=True)

    def exact(q, k, v):
        return one_by_one(plan, q, k, v, how)

    found = []
    for function in (lambda *x: attend_runs(*x, plan, how, exact), exact):
        named = dict(zip("qkv", (x.clone() for x in tensors), strict=True))
        leaves = [named[name].requires_grad_() for name in wanted]
        first = torch.autograd.grad(
            function(*named.values()).square().sum(), leaves, create_graph=True
        )
        second = torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
        found.append([*first, *second])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b)


def test_a_second_derivative_through_dropped_weights_of_runs_is_refused():
    plan, (q, k, v) = packed()
    q.requires_grad_()
    out = attend_runs(q, k, v, plan, How(0.3, dropout_p=0.5), None)
    assert torch.autograd.grad(out.sum(), q, retain_graph=True)[0].isfinite().all()
    with pytest.raises(RuntimeError, match=r"dropout_p must be 0 .* got dropout_p=0.5"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def test_sequences_are_short_where_nothing_but_products_is_needed(monkeypatch):
    plan, (q, k, v) = packed([ALONE_FROM, 0, 2 * ALONE_FROM])
    how = How(0.3)
    assert is_short(q, k, v, plan, how)
    assert not is_short(q, k, v, plan, How(0.3, is_causal=True))
    assert not is_short(q, k, v, plan, How(0.3, dropout_p=0.5))
    assert not is_short(q, k[:, :2], v[:, :2], plan, how)
    shorter, tensors = packed([ALONE_FROM, 0, 2 * ALONE_FROM - 1])
    assert not is_short(*tensors, shorter, how)
    for place in range(3):
        tensors = [q, k, v]
        tensors[place] = torch.cat([tensors[place]] * 2, -1)[..., 1 : D + 1]
        assert not is_short(*tensors, plan, how)
    asked = []
    monkeypatch.setattr(_runs, "takes_products", lambda *sizes: asked.append(sizes) is not None)
    assert not is_short(q, k, v, plan, how)
    assert asked == [(2 * ALONE_FROM, 2 * ALONE_FROM)]


def test_long_runs_go_through_the_kernel_one_after_another(monkeypatch):
    monkeypatch.setattr(_kernels, "takes_products", lambda n_queries, n_keys: n_queries < 4)
    plan, tensors = packed()
    found = answers(plan, tensors, How(0.3, is_causal=True))
    assert torch.allclose(found[0], one_by_one(plan, *tensors, How(0.3, is_causal=True)))
