"""Attention stays inside the derived bound, forward and gradients, on every method and dtype."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stabletx.testing.cases import AttentionCase
from stabletx.testing.reference import reference_attention, reference_gradients
from stabletx.testing.strategies import attention_cases
from stabletx.testing.tolerances import condition_scales, condition_ulps, spacing
from tests.many_cases import PARTS, answers, hold_to_the_bound, run
from tests.ways import METHODS, attention

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIXTEEN_BIT = [torch.bfloat16, torch.float16]
every_method = pytest.mark.parametrize("method", METHODS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_dtype
def test_every_method_stays_inside_the_bound(dtype):
    # 2,000 cases, and fewer while mutants are tested.
    hold_to_the_bound(dtype, part=0, n_cases=40 * settings.default.max_examples)


@pytest.mark.nightly
@every_dtype
@pytest.mark.parametrize("part", range(PARTS))
def test_a_hundred_thousand_cases_stay_inside_the_bound(dtype, part, record_property):
    record_property("occupancy", hold_to_the_bound(dtype, part).occupancy)


@every_dtype
@settings(max_examples=500)
@given(data=st.data())
def test_extreme_magnitudes_stay_finite_where_the_answer_is(dtype, data):
    case = data.draw(
        attention_cases(dtypes=[dtype], max_len=9, extremes=True, bias=True, sinks=True)
    )
    largest = torch.finfo(dtype).max
    expected, bound = answers(case)
    for method in METHODS:
        for name, actual in run(case, method).items():
            # Where the bound is past the largest value, rounding alone decides: a sum that cancels.
            representable = expected[name].abs() + bound[name] <= largest
            assert actual[representable].isfinite().all(), (method, name)


@every_method
def test_sums_over_rows_may_pass_the_largest_value_on_their_way(method):
    # The terms of the sink's gradient alternate in sign and lie near float64's largest value.
    case = AttentionCase.build(
        family="huge_values", seed=65536, shape=(1, 6, 3, 7, 1, 16, 16), dtype=torch.float64,
        sinks=True,
    )  # fmt: skip
    found, exact = run(case, method), case.gradients()
    assert exact.dsinks.isfinite().all()
    assert found["dsinks"].isfinite().all()
    assert (found["dsinks"] - exact.dsinks).abs().le(case.bound().dsinks).all()


@pytest.mark.parametrize("shape", [(3, 1, 1, 4, 4, 1, 1), (1, 2, 1, 6, 4, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_cancels_exactly_cancels_in_the_kernel_too(shape, dtype):
    # Scores of 1024 and 0: a float32 logsumexp is off by up to 6e-5 there.
    case = AttentionCase.build(family="exact", shape=shape, dtype=dtype, mask="causal")
    exact, _ = answers(case)
    for name, actual in run(case, "kernel").items():
        assert torch.equal(actual.double(), exact[name]), name


@every_method
def test_sinks_whose_weight_is_below_the_normal_range_stay_inside_the_bound(method):
    # The scores lie near 100: a sink weighs about e**-100, which float32 rounds to few digits.
    case = AttentionCase.build(family="dominant", shape=(2, 6, 2, 1, 2, 64, 64), sinks=True)
    found, judged = run(case, method), case.judged()
    assert (found["dsinks"] - judged.gradients.dsinks).abs().le(judged.bound.dsinks).all()


@every_method
def test_sums_over_grouped_heads_may_pass_the_largest_value_on_their_way(method):
    # Two query heads read one key: their parts of its gradient have opposite signs.
    case = AttentionCase.build(
        family="huge_values", seed=24, shape=(1, 2, 1, 2, 1, 8, 8), dtype=torch.float64,
        bias="gaussian", sinks=True, amplitude=8.0,
    )  # fmt: skip
    found, judged = run(case, method), case.judged()
    exact = judged.gradients.dk
    near = (exact.abs() > 1.7e308) & exact.isfinite()
    assert near.any()
    assert (found["dk"] - exact).abs()[near].le(judged.bound.dk[near]).all()


def tied_maxima(dtype):
    """Give half of the keys one and the same direction and the values one sign."""
    r = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 256, 64, generator=r)
    k = torch.randn(1, 1, 1, 64, generator=r).expand(1, 4, 256, 64).clone()
    k[:, :, 128:] = 0.1 * torch.randn(1, 4, 128, 64, generator=r)
    v = -torch.randn(1, 4, 256, 64, generator=r).abs() - 0.5
    return [x.to(dtype) for x in (q, k, v)]


def dominant_key(dtype):
    r = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 4, 256, 64, generator=r) for _ in range(2))
    k[:, :, 3] = 20 * q.mean(2)
    v = -torch.randn(1, 4, 256, 64, generator=r).abs() - 0.5
    return [x.to(dtype) for x in (q, k, v)]


def measured(q, k, v, method, scale=None):
    """Give the errors of the output and of three gradients in cULP, and the signed output error."""
    grad_out = torch.randn(q.shape[:3] + v.shape[3:], generator=torch.Generator().manual_seed(1))
    grad_out = grad_out.to(q.dtype)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, scale=scale, method=method)
    found = [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]
    exact = reference_attention(q, k, v, scale=scale).out
    expected = [exact, *reference_gradients(q, k, v, grad_out, scale=scale)[:3]]
    scales = condition_scales(q, k, v, scale=scale, grad_out=grad_out)[:4]
    ulps = [
        float(condition_ulps(*triple).max()) for triple in zip(found, expected, scales, strict=True)
    ]
    return ulps, (found[0].double() - exact) / spacing(exact, q.dtype)


@every_method
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("family", [tied_maxima, dominant_key])
def test_sixteen_bit_results_are_rounded_once_and_without_bias(method, dtype, family):
    ulps, signed = measured(*family(dtype), method)
    assert max(ulps) <= 0.51
    z = signed.mean() / (signed.std() / math.sqrt(signed.numel()))
    assert abs(z) < 3


@every_method
@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6])
def test_a_common_logit_offset_costs_nothing_in_the_gradients(method, offset):
    r = torch.Generator().manual_seed(0)
    small = torch.randint(-2, 3, (2, 1, 2, 256, 15), generator=r).float()
    ones = torch.ones(1, 2, 256, 1)
    q, k = torch.cat([ones, small[0]], -1), torch.cat([offset * ones, small[1] / 4], -1)
    v = torch.randn(1, 2, 256, 16, generator=r)
    ulps, _ = measured(q, k, v, method, scale=1.0)
    plain, _ = measured(q, torch.cat([0 * ones, small[1] / 4], -1), v, method, scale=1.0)
    assert max(ulps) <= max(5.0, *plain)


@every_method
@pytest.mark.parametrize("strength", [100.0, 1000.0])
def test_a_common_direction_of_the_keys_costs_nothing(method, strength):
    r = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 256, 64, generator=r) for _ in range(3))
    k = k + strength * torch.randn(1, 1, 1, 64, generator=r)
    ulps, _ = measured(q, k, v, method)
    assert max(ulps) <= 10


@every_method
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_outliers_cost_no_more_than_one_rounding(method, dtype):
    r = torch.Generator().manual_seed(0)

    def outliers():
        hit = torch.rand(1, 2, 512, 64, generator=r) < 0.001
        plain = torch.randn(1, 2, 512, 64, generator=r)
        return (plain + 10 * hit * torch.randn(1, 2, 512, 64, generator=r)).to(dtype)

    q, k, v = outliers(), outliers(), outliers()
    exact = reference_attention(q, k, v).out
    error = (attention(q, k, v, method=method).double() - exact).square().mean().sqrt()
    floor = (exact.to(dtype).double() - exact).square().mean().sqrt()
    assert error <= 1.02 * floor
