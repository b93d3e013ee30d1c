"""Softmax, log-softmax and logsumexp: what is blocked is absent, and nothing else is lost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stabletx.functional import log_softmax, logsumexp, softmax
from stabletx.testing.assertions import assert_within
from stabletx.testing.rounding import REFERENCE_UNIT
from stabletx.testing.tolerances import (
    gamma,
    log_softmax_error_bound,
    logsumexp_error_bound,
    smallest_subnormal,
    softmax_error_bound,
    unit_roundoff,
)

FUNCTIONS = {"softmax": softmax, "log_softmax": log_softmax, "logsumexp": logsumexp}
BLOCKED = {"softmax": 0.0, "log_softmax": -torch.inf, "logsumexp": -torch.inf}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

each_function = pytest.mark.parametrize("name", FUNCTIONS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def noise(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def forward_and_gradient(function, x, upstream_seed=1):
    """Give the output, and the gradient under a random upstream gradient."""
    x = x.clone().requires_grad_()
    out = function(x)
    upstream = noise(*out.shape, seed=upstream_seed, dtype=out.dtype)
    (gradient,) = torch.autograd.grad(out, x, upstream)
    return out.detach(), gradient


@st.composite
def masked_scores(draw):
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3), label="shape")
    dim = draw(st.integers(-len(shape), len(shape) - 1), label="dim")
    dtype = draw(st.sampled_from(DTYPES), label="dtype")
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]), label="scale")
    seed = draw(st.integers(0, 2**32 - 1), label="seed")
    share = draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]), label="share that may attend")
    allowed = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    return (noise(*shape, seed=seed, dtype=dtype) * scale).to(dtype), dim, allowed


def exactly(x, dim, allowed, upstream):
    """Compute weights, log-weights, lse and the gradient of the weights in float64.

    Blocked scores are taken out before anything is computed.
    """
    x = x.double().masked_fill(~allowed, -torch.inf)
    top = x.amax(dim, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    total = (x - top).exp().sum(dim, keepdim=True)
    weights = (x - top).exp() / torch.where(total == 0, 1.0, total)
    logs = (x - top) - torch.where(total == 0, 1.0, total).log()
    mean = (weights * upstream.double()).sum(dim, keepdim=True)
    lse = (total.log() + top).squeeze(dim)
    return weights, logs, lse, weights * (upstream.double() - mean)


@settings(deadline=None)
@given(case=masked_scores())
def test_values_and_gradients_are_within_the_bound_of_rounding(case):
    x, dim, allowed = case
    upstream = noise(*x.shape, seed=1, dtype=x.dtype)
    weights, logs, lse, slope = exactly(x, dim, allowed, upstream)
    out, gradient = forward_and_gradient(lambda z: softmax(z, dim, allowed=allowed), x)
    assert_within(softmax_error_bound(x, dim, allowed=allowed), out, weights)
    out = log_softmax(x, dim, allowed=allowed)
    assert_within(log_softmax_error_bound(x, dim, allowed=allowed), out, logs)
    out = logsumexp(x, dim, allowed=allowed)
    assert_within(logsumexp_error_bound(x, dim, allowed=allowed), out, lse)

    # weights * (upstream - sum of weights * upstream), with the weights as they were computed.
    work = torch.promote_types(x.dtype, torch.float32)
    bound, push = softmax_error_bound(x.to(work), dim, allowed=allowed), upstream.double().abs()
    mean, lost = ((part * push).sum(dim, keepdim=True) for part in (weights, bound))
    rounding = gamma(x.shape[dim] + 3, unit_roundoff(work) + REFERENCE_UNIT)
    error = bound * (push + mean) + weights * lost + rounding * (weights + bound) * (push + mean)
    error = error + unit_roundoff(x.dtype) * (slope.abs() + error) + smallest_subnormal(x.dtype)
    assert_within(error, gradient, slope)


@settings(deadline=None)
@given(case=masked_scores(), garbage=st.sampled_from([torch.nan, torch.inf, -torch.inf, 6e4]))
def test_blocked_scores_change_no_bit_whatever_they_hold(case, garbage):
    x, dim, allowed = case
    for name, function in FUNCTIONS.items():

        def run(scores, function=function):
            return forward_and_gradient(lambda z: function(z, dim, allowed=allowed), scores)

        out, gradient = run(x)
        spoilt_out, spoilt_gradient = run(torch.where(allowed, x, garbage))
        assert torch.equal(out, spoilt_out)
        assert torch.equal(gradient, spoilt_gradient)
        assert not gradient[~allowed].any()
        if name != "logsumexp":
            assert (out[~allowed] == BLOCKED[name]).all()


@each_function
@each_dtype
@pytest.mark.parametrize("by_mask", [True, False], ids=["mask", "minus_inf"])
def test_empty_rows_have_no_weight_and_no_gradient_when_upstream_is_nan(name, dtype, by_mask):
    x = noise(3, 4, dtype=dtype)
    allowed = torch.tensor([[True] * 4, [False] * 4, [True, False, True, False]])
    x, allowed = (x, allowed) if by_mask else (torch.where(allowed, x, -torch.inf), None)
    x.requires_grad_()
    out = FUNCTIONS[name](x, allowed=allowed)
    assert (out[1] == BLOCKED[name]).all()
    upstream = noise(*out.shape, dtype=dtype)
    upstream[1] = torch.nan
    (gradient,) = torch.autograd.grad(out, x, upstream)
    assert torch.equal(gradient[1], torch.zeros(4, dtype=dtype))
    assert gradient.isfinite().all()


@each_function
@each_dtype
def test_minus_inf_blocks_as_the_mask_does(name, dtype):
    x = noise(5, 7, dtype=dtype)
    allowed = noise(5, 7, seed=3) > 0
    by_mask = forward_and_gradient(lambda z: FUNCTIONS[name](z, allowed=allowed), x)
    by_value = forward_and_gradient(FUNCTIONS[name], torch.where(allowed, x, -torch.inf))
    assert all(map(torch.equal, by_mask, by_value))


@each_function
@each_dtype
def test_mask_and_minus_inf_empty_a_row_together(name, dtype):
    x = torch.tensor([[1.0, -torch.inf, 2.0], [0.0, 1.0, 2.0]], dtype=dtype, requires_grad=True)
    allowed = torch.tensor([[False, True, False], [True, True, True]])
    out = FUNCTIONS[name](x, allowed=allowed)
    assert (out[0] == BLOCKED[name]).all()
    (gradient,) = torch.autograd.grad(out[1].sum(), x)
    assert not gradient[0].any()
    assert gradient.isfinite().all()


@each_function
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_sixteen_bits_are_the_float32_result_rounded_once(name, dtype, masked):
    x = noise(20, 33, dtype=dtype) * 4
    allowed = noise(20, 33, seed=1) > 0 if masked else None
    out = FUNCTIONS[name](x, allowed=allowed)
    assert torch.equal(out, FUNCTIONS[name](x.float(), allowed=allowed).to(dtype))


@each_function
@each_dtype
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_score_that_is_not_finite_makes_its_own_row_nan_and_no_other(name, dtype, bad):
    x = noise(3, 4, dtype=dtype)
    allowed = torch.tensor([True, True, True, False])
    clean = forward_and_gradient(lambda z: FUNCTIONS[name](z, allowed=allowed), x)
    x[1, 2] = bad
    spoilt = forward_and_gradient(lambda z: FUNCTIONS[name](z, allowed=allowed), x)
    row = spoilt[0][1]
    assert (row if name == "logsumexp" else row[:3]).isnan().all()
    assert spoilt[1][1, :3].isnan().all()
    for before, after in zip(clean, spoilt, strict=True):
        assert torch.equal(before[[0, 2]], after[[0, 2]])


@each_function
@each_dtype
def test_nan_is_not_swallowed_where_nothing_is_blocked(name, dtype):
    x = torch.tensor([[torch.nan, 1.0], [-torch.inf, torch.nan]], dtype=dtype)
    out = FUNCTIONS[name](x)
    assert out[0].isnan().all()
    assert out[1].isnan().any()


@each_dtype
def test_scores_of_the_largest_float_give_finite_weights_and_gradients(dtype):
    most = torch.finfo(dtype).max
    x = torch.tensor([[most, most, -most], [-most, -most, -most], [0.0, -most, most]], dtype=dtype)
    weights, gradient = forward_and_gradient(softmax, x)
    assert torch.equal(weights, torch.tensor([[0.5, 0.5, 0], [1 / 3] * 3, [0, 0, 1]], dtype=dtype))
    assert gradient.isfinite().all()
    lse, gradient = forward_and_gradient(logsumexp, x)
    assert torch.equal(lse, torch.tensor([most, -most, most], dtype=dtype))
    assert gradient.isfinite().all()


@each_dtype
def test_the_smallest_score_gets_all_the_weight_when_the_others_are_blocked(dtype):
    least = torch.finfo(dtype).min
    x = torch.tensor([least, 5.0, least], dtype=dtype)
    allowed = torch.tensor([True, False, False])
    assert torch.equal(softmax(x, allowed=allowed), torch.tensor([1.0, 0.0, 0.0], dtype=dtype))
    assert logsumexp(x, allowed=allowed) == least


@each_function
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_no_nan_arises_on_the_way_through_empty_rows(name):
    x = noise(3, 4).requires_grad_()
    allowed = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
    with torch.autograd.detect_anomaly():
        out = FUNCTIONS[name](x, allowed=allowed)
        (gradient,) = torch.autograd.grad(out, x, noise(*out.shape, seed=1), create_graph=True)
        torch.autograd.grad(gradient.square().sum(), x)


@each_function
@pytest.mark.parametrize("blocked", [False, True])
def test_a_common_offset_moves_no_bit_of_weights_or_gradients(name, blocked):
    x = (noise(8, 33) * 256).round() / 32  # exact after the offset
    offset = 2.0**18
    allowed = noise(8, 33, seed=2) > 0 if blocked else None
    out, gradient = forward_and_gradient(lambda z: FUNCTIONS[name](z, allowed=allowed), x)
    moved, moved_gradient = forward_and_gradient(
        lambda z: FUNCTIONS[name](z, allowed=allowed), x + offset
    )
    assert torch.equal(gradient, moved_gradient)
    assert name == "logsumexp" or torch.equal(out, moved)


def test_log_softmax_keeps_what_softmax_rounds_to_zero():
    x = torch.tensor([0.0, -1000.0])
    assert torch.equal(log_softmax(x), x)
    assert torch.equal(log_softmax(x + 2.0**20), x)


@each_function
@pytest.mark.parametrize("masked", [False, True])
def test_first_and_second_derivatives_agree_with_differences(name, masked):
    x = noise(2, 3, 4, dtype=torch.float64).requires_grad_()
    allowed = noise(2, 3, 4, seed=1) > 0 if masked else None
    if masked:
        allowed[0, 0] = False  # an empty row

    def function(z):
        out = FUNCTIONS[name](z, 1, allowed=allowed)
        return out.masked_fill(out == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(function, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, x, check_fwd_over_rev=True)


@each_function
def test_function_transforms_agree_with_loops_and_double_backward(name):
    x = noise(3, 5, dtype=torch.float64)
    allowed = noise(3, 5, seed=1) > -0.5
    allowed[1] = False

    def total(z, may):
        out = FUNCTIONS[name](z, allowed=may)
        return out.masked_fill(out == -torch.inf, 0.0).pow(2).sum()

    batched = torch.func.vmap(torch.func.grad(total))(x, allowed)
    one_by_one = torch.stack([torch.func.grad(total)(*row) for row in zip(x, allowed, strict=True)])
    torch.testing.assert_close(batched, one_by_one)
    for row, may in zip(x, allowed, strict=True):
        forward_over_reverse = torch.func.hessian(total)(row, may)
        twice_reverse = torch.autograd.functional.hessian(lambda z, may=may: total(z, may), row)
        torch.testing.assert_close(forward_over_reverse, twice_reverse)
        _, tangent = torch.func.jvp(lambda z, may=may: total(z, may), (row,), (row,))
        torch.testing.assert_close(tangent, torch.func.grad(total)(row, may) @ row)


@each_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_compiled_equals_eager_to_the_bit(name, dtype, masked):
    allowed = noise(4, 9, seed=1) > 0.3 if masked else None
    if masked:
        allowed[2] = False

    def function(z):
        return FUNCTIONS[name](z, allowed=allowed)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = noise(4, 9, dtype=dtype) * 8
    eager = forward_and_gradient(function, x)
    assert all(map(torch.equal, eager, forward_and_gradient(compiled, x)))


@each_function
@each_dtype
def test_autocast_changes_no_bit(name, dtype):
    x = noise(4, 9, dtype=dtype) * 8
    eager = forward_and_gradient(FUNCTIONS[name], x)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, eager, forward_and_gradient(FUNCTIONS[name], x)))


@each_function
@each_dtype
def test_an_axis_of_no_scores_is_an_empty_row(name, dtype):
    x = torch.zeros(2, 0, dtype=dtype, requires_grad=True)
    out = FUNCTIONS[name](x)
    assert out.dtype == dtype
    assert out.shape == ((2,) if name == "logsumexp" else (2, 0))
    assert (out == BLOCKED[name]).all()
    assert torch.autograd.grad(out.sum(), x)[0].shape == (2, 0)
    assert FUNCTIONS[name](torch.zeros(0, 3)).numel() == 0


@each_function
def test_allowed_broadcasts_to_the_scores(name):
    x = noise(2, 3, 4)
    allowed = torch.tensor([[True], [False], [True]])
    out = FUNCTIONS[name](x, allowed=allowed)
    assert torch.equal(out, FUNCTIONS[name](x, allowed=allowed.expand(2, 3, 4)))


@each_function
def test_wrong_arguments_are_refused_by_name(name):
    function, x = FUNCTIONS[name], torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got x=list"):
        function([0.0])
    with pytest.raises(TypeError, match=r"x must have a floating-point dtype, got x=torch.int64"):
        function(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"dim must be an axis of x with shape \(2, 3\), got dim=2"
    ):
        function(x, 2)
    with pytest.raises(
        ValueError, match=r"dim must be an axis of x with shape \(2, 3\), got dim=-3"
    ):
        function(x, -3)
    with pytest.raises(TypeError, match=r"dim must be an int, got dim=True"):
        function(x, True)
    with pytest.raises(TypeError, match=r"allowed must be boolean .*got allowed=torch.uint8"):
        function(x, allowed=torch.ones(2, 3, dtype=torch.uint8))
    for shape in ((2, 2), (3, 1), (1, 2, 3)):
        with pytest.raises(
            ValueError, match=r"allowed must broadcast to x with shape \(2, 3\), got"
        ):
            function(x, allowed=torch.ones(shape, dtype=torch.bool))
    with pytest.raises(
        ValueError, match=r"allowed must have the device of x, got allowed with met"
    ):
        function(x, allowed=torch.ones(2, 3, dtype=torch.bool, device="meta"))
