"""The float64 reference, held to 50 digits, to autograd, and to its contract."""

import dataclasses
import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from mpmath import mpf

from stabletx.testing import (
    AttentionCase,
    Bound,
    assert_within,
    attention_cases,
    attention_error_bound,
    condition_scales,
    condition_ulps,
    reference_attention,
    reference_gradients,
)

FINITE = ("gaussian", "outlier", "resonant", "tied", "dominant", "one_hot", "logit_offset")
EXTREME = ("dtype_max", "huge_values", "huge_keys", "subnormal")


def fifty_digits(case):
    """Attention and its gradients by the textbook, one number at a time, in 50 digits."""
    b, h, g, t, s, d, e = case.shape
    scale = mpf(case.scale) if case.scale is not None else 1 / mpmath.sqrt(mpf(d))
    if case.scale is None:
        scale = mpf(d**-0.5)  # the scale is an input, given as a float
    full = (b, h, t, s)
    allowed = torch.ones(full).bool() if case.mask is None else case.mask.expand(full)
    bias = torch.zeros(full).double() if case.bias is None else case.bias.double().expand(full)
    q, k, v, grad = (x.double().tolist() for x in (case.q, case.k, case.v, case.grad_out))
    out = mpmath_zeros(b, h, t, e)
    dq, dk, dv = (mpmath_zeros(*x.shape) for x in (case.q, case.k, case.v))
    for bb in range(b):
        for hh in range(h):
            gg = hh * g // h
            for i in range(t):
                keys = [
                    j for j in range(s)
                    if allowed[bb, hh, i, j] and bias[bb, hh, i, j] != -math.inf
                ]  # fmt: skip
                x = {j: scale * dot(q[bb][hh][i], k[bb][gg][j]) for j in keys}
                tanh = {j: mpf(0) for j in keys}
                scores = dict(x)
                if case.softcap is not None:
                    tanh = {j: mpmath.tanh(x[j] / case.softcap) for j in keys}
                    scores = {j: case.softcap * tanh[j] for j in keys}
                scores = {j: scores[j] + mpf(float(bias[bb, hh, i, j])) for j in keys}
                sink = None if case.sinks is None else mpf(float(case.sinks[hh]))
                top = max([*scores.values(), *([] if sink is None else [sink])], default=mpf(0))
                total = sum((mpmath.exp(scores[j] - top) for j in keys), mpf(0))
                total += 0 if sink is None else mpmath.exp(sink - top)
                p = {j: mpmath.exp(scores[j] - top) / total for j in keys}
                pulls = {j: dot(grad[bb][hh][i], v[bb][gg][j]) for j in keys}
                mean = sum((p[j] * pulls[j] for j in keys), mpf(0))
                for j in keys:
                    ds = p[j] * (pulls[j] - mean) * (1 - tanh[j] ** 2) * scale
                    for c in range(e):
                        out[bb][hh][i][c] += p[j] * mpf(v[bb][gg][j][c])
                        dv[bb][gg][j][c] += p[j] * mpf(grad[bb][hh][i][c])
                    for c in range(d):
                        dq[bb][hh][i][c] += ds * mpf(k[bb][gg][j][c])
                        dk[bb][gg][j][c] += ds * mpf(q[bb][hh][i][c])
    return [tensor(x) for x in (out, dq, dk, dv)]


def mpmath_zeros(a, b, c, d):
    return [[[[mpf(0) for _ in range(d)] for _ in range(c)] for _ in range(b)] for _ in range(a)]


def dot(x, y):
    return sum((mpf(a) * mpf(b) for a, b in zip(x, y, strict=True)), mpf(0))


def tensor(nested):
    flat = [[[[float(x) for x in c] for c in b] for b in a] for a in nested]
    return torch.tensor(flat, dtype=torch.float64)


def bounded(case):
    """Twice the bound's units: the reference joins it once, and here it is on trial itself."""
    return attention_error_bound(
        case.q.double(), case.k.double(), case.v.double(), grad_out=case.grad_out.double(),
        mask=case.mask, scale=case.scale, softcap=case.softcap,
        bias=None if case.bias is None else case.bias.double(),
        sinks=None if case.sinks is None else case.sinks.double(),
    )  # fmt: skip


@pytest.mark.parametrize("family", FINITE + EXTREME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_agrees_with_fifty_digits(family, dtype):
    with mpmath.workdps(50):
        case = AttentionCase.build(
            family=family, seed=3, shape=(1, 2, 1, 3, 4, 3, 2), dtype=dtype, mask="random"
        )
        exact = fifty_digits(case)
    actual = (case.reference().out, *case.gradients()[:3], None, None)
    assert_within(bounded(case), actual, (*exact, None, None))


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"sinks": True}, {"bias": "blocking"}])
def test_reference_agrees_with_fifty_digits_with_every_option(options):
    with mpmath.workdps(50):
        case = AttentionCase.build(seed=4, shape=(1, 2, 1, 3, 4, 3, 2), mask="causal", **options)
        exact = fifty_digits(case)
    actual = (case.reference().out, *case.gradients()[:3], None, None)
    assert_within(bounded(case), actual, (*exact, None, None))


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("keys", [slice(0, 4), slice(1, 4), slice(0, 1)])
def test_reference_tells_ordinary_scores_beside_the_largest_floats(keys, with_bias, with_sinks):
    """Products of the largest floats cancel to nothing, and what is added to them counts."""
    largest = torch.finfo(torch.float64).max
    q = [[largest, largest], [1.0, 0.5], [largest, 1.0], [0.0, 1.0], [-largest, 0.25]]
    k = [[largest, -largest], [0.5, 0.25], [-largest, 0.75], [0.125, -0.25]][keys]
    gaussian = AttentionCase.build(
        seed=5, shape=(1, 1, 1, 5, len(k), 2, 3), dtype=torch.float64,
        bias="gaussian" if with_bias else "none", sinks=with_sinks,
    )  # fmt: skip
    case = dataclasses.replace(
        gaussian, q=gaussian.q.new_tensor([[q]]), k=gaussian.k.new_tensor([[k]]), scale=0.5
    )
    with mpmath.workdps(50):
        exact = fifty_digits(case)
    actual = (case.reference().out, *case.gradients()[:3], None, None)
    assert_within(bounded(case), actual, (*exact, None, None))


@pytest.mark.parametrize("family", FINITE)
def test_reference_errs_by_few_units_of_the_condition_scale(family):
    with mpmath.workdps(50):
        case = AttentionCase.build(
            family=family, seed=6, shape=(1, 2, 2, 3, 5, 4, 3), dtype=torch.float64, amplitude=0.125
        )
        exact = fifty_digits(case)
    scales = condition_scales(case.q, case.k, case.v, scale=case.scale, grad_out=case.grad_out)
    products = case.q.abs() @ case.k.abs().mT * (case.scale or case.q.shape[-1] ** -0.5)
    largest = 4 + case.shape.d * products.max()
    actual = (case.reference().out, *case.gradients()[:3])
    for x, y, scale in zip(actual, exact, scales[:4], strict=True):
        # A score summed from d terms of size S carries up to d S units into its weight.
        assert condition_ulps(x, y, scale).max() <= largest


@settings(max_examples=25, deadline=None)
@given(
    case=attention_cases(
        dtypes=(torch.float64,),
        max_len=9,
        softcap=True,
        sinks=True,
        bias=True,
        families=("gaussian", "tied", "one_hot", "equal"),
        poison=False,
    )
)
def test_reference_gradients_agree_with_autograd(case):
    h, g = case.q.shape[1], case.k.shape[1]
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    bias = None if case.bias is None else case.bias.clone().requires_grad_()
    sinks = None if case.sinks is None else case.sinks.clone().requires_grad_()
    q, k, v = leaves
    scores = q @ k.repeat_interleave(h // g, 1).mT
    scores = scores * (case.scale if case.scale is not None else q.shape[-1] ** -0.5)
    if case.softcap is not None:
        scores = case.softcap * (scores / case.softcap).tanh()
    allowed = torch.ones_like(scores).bool() if case.mask is None else case.mask.expand_as(scores)
    if bias is not None:
        allowed = allowed & ~bias.isneginf()
        scores = scores + bias.masked_fill(bias.isneginf(), 0.0)
    scores = scores.masked_fill(~allowed, -1e30)
    column = torch.full((h,), -1e30).double() if sinks is None else sinks
    scores = torch.cat([scores, column[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., :-1].masked_fill(~allowed, 0.0)
    out = weights @ v.repeat_interleave(h // g, 1)
    wanted = [*leaves, *(x for x in (bias, sinks) if x is not None)]
    grads = iter(torch.autograd.grad(out, wanted, case.grad_out))
    dq, dk, dv = next(grads), next(grads), next(grads)
    actual = (
        out,
        dq,
        dk,
        dv,
        None if bias is None else next(grads),
        None if sinks is None else next(grads),
    )
    assert_within(case.bound(), actual, (case.reference().out, *case.gradients()))


@settings(max_examples=30, deadline=None)
@given(case=attention_cases(max_len=17, sinks=True, bias=True, empty=True, extremes=True))
def test_reference_statistics_hang_together(case):
    found = case.reference()
    full = (*case.q.shape[:3], case.k.shape[2])
    allowed = torch.ones(full).bool() if case.mask is None else case.mask.expand(full)
    if case.bias is not None:
        allowed = allowed & ~case.bias.isneginf()
    empty = ~allowed.any(-1)
    assert found.weights[~allowed].eq(0).all()
    assert found.out[empty].eq(0).all()
    assert found.entropy[empty].eq(0).all()
    assert found.max_score[empty].isneginf().all()
    sums = found.weights.sum(-1)
    room = 4 * (full[3] + 1) * torch.finfo(torch.float64).eps
    if case.sinks is None:
        assert found.lse[empty].isneginf().all()
        assert (sums[~empty] - 1).abs().le(room).all()
    else:
        assert sums.le(1 + room).all()
    assert found.entropy.ge(-room).all()
    assert (found.lse >= found.max_score).all()


def test_reference_never_touches_what_no_query_may_attend():
    plain = AttentionCase.build(seed=1, shape=(2, 4, 2, 5, 7, 4, 4), mask="padding_right")
    for garbage in ("nan", "inf", "max", "big"):
        other = AttentionCase.build(
            seed=1, shape=(2, 4, 2, 5, 7, 4, 4), mask="padding_right", garbage=garbage
        )
        assert other.poison.any()
        assert torch.equal(plain.reference().out, other.reference().out)
        for a, b in zip(plain.gradients()[:3], other.gradients()[:3], strict=True):
            assert torch.equal(a, b)
        assert other.gradients().dk[other.poison].eq(0).all()
        assert other.gradients().dv[other.poison].eq(0).all()


def test_reference_makes_exactly_the_rows_nan_that_attend_one():
    case = AttentionCase.build(shape=(1, 1, 1, 4, 4, 3, 3), mask="causal")
    k, v = case.k.clone(), case.v.clone()
    k[0, 0, 2, 1] = math.nan
    rows = reference_attention(case.q, k, v, mask=case.mask).out.isnan()
    assert rows[0, 0].tolist() == [[False] * 3] * 2 + [[True] * 3] * 2
    v[0, 0, 1, 2] = math.inf
    channels = reference_attention(case.q, case.k, v, mask=case.mask).out.isnan()
    assert channels[0, 0].tolist() == [[False] * 3] + [[False, False, True]] * 3


def test_reference_gradients_keep_a_nan_to_what_it_touches():
    case = AttentionCase.build(shape=(1, 1, 1, 4, 4, 3, 3), mask="causal")
    q = case.q.clone()
    q[0, 0, 1, 0] = math.nan
    found = reference_gradients(q, case.k, case.v, case.grad_out, mask=case.mask)
    clean = case.gradients()
    assert found.dq[0, 0, 1].isnan().all()
    assert torch.equal(found.dq[0, 0, [0, 2, 3]], clean.dq[0, 0, [0, 2, 3]])
    assert found.dk[0, 0, :2].isnan().all()
    assert torch.equal(found.dk[0, 0, 2:], clean.dk[0, 0, 2:])
    grad = case.grad_out.clone()
    grad[0, 0, 3, 1] = math.nan
    spoiled = reference_gradients(case.q, case.k, case.v, grad, mask=case.mask)
    assert spoiled.dv.isnan().all(2)[0, 0].tolist() == [False, True, False]
    assert torch.equal(spoiled.dq[0, 0, :3], clean.dq[0, 0, :3])


def test_reference_takes_no_keys_and_no_width():
    empty = reference_attention(
        torch.ones(1, 2, 3, 4), torch.ones(1, 1, 0, 4), torch.ones(1, 1, 0, 5)
    )
    assert empty.out.shape == (1, 2, 3, 5)
    assert empty.out.eq(0).all()
    assert empty.lse.isneginf().all()
    flat = reference_attention(
        torch.ones(1, 1, 1, 0), torch.ones(1, 1, 2, 0), torch.tensor([[[[1.0], [3.0]]]])
    )
    assert flat.out.item() == 2.0


@pytest.mark.parametrize(
    ("shapes", "error", "match"),
    [
        (((1, 1, 4), (1, 1, 2, 4), (1, 1, 2, 4)), ValueError, r"q must have 4 axes .*\(1, 1, 4\)"),
        (((1, 1, 2, 4), (1, 1, 2, 3), (1, 1, 2, 4)), ValueError, r"got q=\(1, 1, 2, 4\), k="),
        (
            ((1, 3, 2, 4), (1, 2, 2, 4), (1, 2, 2, 4)),
            ValueError,
            r"k.shape\[1\]=2 and q.shape\[1\]=3",
        ),
    ],
)
def test_reference_refuses_shapes_that_do_not_fit(shapes, error, match):
    with pytest.raises(error, match=match):
        reference_attention(*(torch.zeros(shape) for shape in shapes))


def test_reference_refuses_a_float_mask():
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(TypeError, match=r"mask=torch.float32 .*bias"):
        reference_attention(x, x, x, mask=torch.zeros(1, 1, 2, 2))


def test_bound_is_a_tuple_in_the_order_of_the_gradients():
    case = AttentionCase.build(bias="gaussian", sinks=True)
    assert isinstance(case.bound(), Bound)
    shapes = [None if x is None else x.shape for x in case.bound()[1:]]
    assert shapes == [x.shape for x in case.gradients()]
