"""The bounds: no correct implementation breaks them, and they are not empty."""

import math
from collections import defaultdict
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch.nn.attention import SDPBackend, sdpa_kernel

from stabletx.testing import (
    FAMILIES,
    AttentionCase,
    Profile,
    assert_within,
    attention_cases,
    attention_error_bound,
    condition_scales,
    condition_ulps,
    is_vacuous,
    occupancies,
    reference_attention,
)
from stabletx.testing import tolerances as bounds
from stabletx.testing._masks import MASKS

ORDINARY = [name for name, family in FAMILIES.items() if not family.extreme]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def plain(case, q, k, v):
    """Attention by the textbook with every option, at least in float32, rounded once."""
    repeat = q.shape[1] // k.shape[1]
    keys, values = (wide(x).repeat_interleave(repeat, 1) for x in (k, v))
    scores = wide(q) @ keys.mT * (q.shape[-1] ** -0.5 if case.scale is None else case.scale)
    if case.softcap is not None:
        scores = case.softcap * (scores / case.softcap).tanh()
    if case.bias is not None:
        scores = scores + wide(case.bias)
    if case.mask is not None:
        scores = scores.masked_fill(~case.mask, -math.inf)
    dead = scores.isneginf().all(-1, keepdim=True)
    scores = scores.masked_fill(dead, 0.0)
    if case.sinks is not None:
        sinks = wide(case.sinks)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]].masked_fill(dead, 0.0)
    return (weights @ values).to(q.dtype)


def online(case, q, k, v):
    """One key at a time with a running maximum: the order of sums that fused kernels take."""
    repeat = q.shape[1] // k.shape[1]
    keys, values = (wide(x).repeat_interleave(repeat, 1) for x in (k, v))
    scores = wide(q) @ keys.mT * (q.shape[-1] ** -0.5 if case.scale is None else case.scale)
    if case.mask is not None:
        scores = scores.masked_fill(~case.mask, -math.inf)
    top = torch.full_like(scores[..., :1], -math.inf)
    total, out = torch.zeros_like(top), torch.zeros(*scores.shape[:3], v.shape[3]).to(scores)
    for j in range(k.shape[2]):
        one = scores[..., j : j + 1]
        new = torch.maximum(top, one)
        safe = new.masked_fill(new.isneginf(), 0.0)
        old, weight = (top - safe).exp(), (one - safe).exp()
        total, out = total * old + weight, out * old + weight * values[:, :, j : j + 1]
        top = new
    return (out / total.masked_fill(total == 0, 1.0)).to(q.dtype)


def torch_kernel(backend):
    def run(case, q, k, v):
        repeat = q.shape[1] // k.shape[1]
        keys, values = (wide(x).repeat_interleave(repeat, 1) for x in (k, v))
        mask = None if case.mask is None else case.mask.expand(*q.shape[:3], k.shape[2])
        with sdpa_kernel([backend]):
            out = F.scaled_dot_product_attention(
                wide(q), keys, values, attn_mask=mask, scale=case.scale
            )
        return out.to(q.dtype)

    return run


IMPLEMENTATIONS = {
    "plain": (plain, Profile()),
    "online": (online, Profile()),
    "math": (torch_kernel(SDPBackend.MATH), Profile()),
    # Its backward pass keeps one rounded logsumexp a row, and says so.
    "flash": (torch_kernel(SDPBackend.FLASH_ATTENTION), Profile(recompute_from_lse=True)),
}


def results(run, case):
    q, k, v = (x.detach().clone().requires_grad_() for x in (case.q, case.k, case.v))
    out = run(case, q, k, v)
    return (out, *torch.autograd.grad(out, (q, k, v), case.grad_out), None, None)


def build(family, dtype, seed):
    """Spread sizes, masks and amplitudes over the seeds."""
    t, s = (1, 5, 33, 64)[seed % 4], (1, 7, 65, 129)[seed // 2 % 4]
    d = (8, 1, 33)[seed % 3]
    return AttentionCase.build(
        family=family, seed=seed, shape=(1 + seed % 2, 2, 1 + seed % 2, t, s, d, d), dtype=dtype,
        mask=MASKS[seed * 5 % len(MASKS)], amplitude=(1.0, 8.0, 0.125)[seed // 3 % 3],
    )  # fmt: skip


@cache
def judged(family, dtype, seed, profile):
    case = build(family, dtype, seed)
    return case, case.bound(profile), (case.reference().out, *case.gradients())


@pytest.mark.parametrize(("sink", "lost"), [(0.0, False), (-80.0, False), (-100.0, True)])
def test_bound_lets_a_sink_be_lost_only_below_the_normal_range(sink, lost):
    # exp(-80) is a normal float32, exp(-100) is not: a kernel may take it for 0.
    x, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    case = replace(AttentionCase.build(), q=x, k=x, v=one, grad_out=one, sinks=torch.tensor([sink]))
    judged = case.judged()
    assert bool(judged.gradients.dsinks.abs() <= judged.bound.dsinks) == lost


def test_bound_counts_the_sink_among_the_values_where_scores_say_nothing():
    """Rounding decides whether a sink near such scores takes all of a row or nothing."""
    generator = torch.Generator().manual_seed(0)
    q, k = (3e4 * (1 + torch.rand(1, 1, n, 64, generator=generator)) for n in (1, 3))
    v = torch.ones(1, 1, 3, 2)
    sinks = (q @ k.mT).amax().reshape(1) / 8
    exact = reference_attention(q, k, v, sinks=sinks).out
    bound = attention_error_bound(q, k, v, sinks=sinks).out
    assert ((exact - bound <= 0.0) & (exact + bound >= 1.0)).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bound_holds_for_every_correct_implementation(name, dtype, record_property):
    run, profile = IMPLEMENTATIONS[name]
    if name == "flash" and dtype == torch.float64:
        profile = Profile(compute=torch.float64, recompute_from_lse=True)
    worst = defaultdict(float)
    for index, family in enumerate(ORDINARY):
        for seed in (index, index + 7):
            case, limit, exact = judged(family, dtype, seed, profile)
            actual = results(run, case)
            assert_within(limit, actual, exact)
            for key, b, a, x in zip(("out", "dq", "dk", "dv"), limit, actual, exact, strict=False):
                worst[key] = max(worst[key], float(occupancies(b, a, x).max()))
    for key, value in worst.items():
        record_property(f"occupancy_{key}", value)
    # As tight as the derivation: one rounding fills it in 16 bits, sums leave room otherwise.
    assert worst["out"] > (0.9 if dtype in (torch.bfloat16, torch.float16) else 0.01)


@settings(max_examples=40, deadline=None)
@given(
    case=attention_cases(max_len=33, bias=True, softcap=True, sinks=True, poison=False, empty=True)
)
def test_bound_holds_for_every_option(case):
    leaves = [x.detach().clone().requires_grad_() for x in (case.q, case.k, case.v)]
    extra = [None if x is None else x.clone().requires_grad_() for x in (case.bias, case.sinks)]
    one = AttentionCase(**{**case.__dict__, "bias": extra[0], "sinks": extra[1]})
    out = plain(one, *leaves)
    wanted = [*leaves, *(x for x in extra if x is not None)]
    found = iter(torch.autograd.grad(out, wanted, case.grad_out))
    grads = [next(found) for _ in range(3)]
    rest = [None if x is None else next(found) for x in extra]
    assert_within(case.bound(), (out, *grads, *rest), (case.reference().out, *case.gradients()))


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(100))
def test_bound_raises_no_false_alarm_in_a_hundred_seeds(seed):
    for family in ORDINARY:
        for dtype in DTYPES:
            case, limit, exact = judged.__wrapped__(family, dtype, seed, None)
            for name in ("plain", "online", "math"):
                assert_within(limit, results(IMPLEMENTATIONS[name][0], case), exact)
            run, profile = IMPLEMENTATIONS["flash"]
            assert_within(case.bound(profile), results(run, case), exact)


def wrong(case, change):
    one = AttentionCase(**{**case.__dict__, **change(case)})
    return plain(one, one.q, one.k, one.v)


WRONG = {
    "scale off by 1e-4": lambda c: {"scale": 8**-0.5 * (1 + 1e-4)},
    "keys in float16": lambda c: {"k": c.k.half().float()},
    "values in float16": lambda c: {"v": c.v.half().float()},
    "queries in bfloat16": lambda c: {"q": c.q.bfloat16().float()},
    "mask ignored": lambda c: {"mask": None},
    "last key dropped": lambda c: {"mask": c.mask & (torch.arange(c.k.shape[2]) < 32)},
}


@pytest.mark.parametrize("name", WRONG)
def test_bound_catches_what_is_wrong(name):
    case = AttentionCase.build(seed=1, shape=(1, 2, 1, 9, 33, 8, 8), mask="causal")
    with pytest.raises(AssertionError, match="beyond its bound"):
        assert_within(case.bound(), wrong(case, WRONG[name]), case.reference())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bound_catches_weights_in_16_bits_and_a_profile_allows_them(dtype):
    case = AttentionCase.build(seed=2, shape=(1, 1, 1, 16, 65, 16, 16), dtype=dtype)
    scores = wide(case.q) @ wide(case.k).mT * 16**-0.5
    actual = (wide(scores.softmax(-1).to(dtype)) @ wide(case.v)).to(dtype)
    with pytest.raises(AssertionError):
        assert_within(case.bound(), actual, case.reference())
    assert assert_within(case.bound(Profile(weights=dtype)), actual, case.reference()) > 0.1


def test_bound_catches_a_common_offset_that_is_lost_in_a_logsumexp():
    case = AttentionCase.build(family="logit_offset", seed=1, shape=(1, 1, 1, 33, 64, 8, 8))
    exact = (case.reference().out, *case.gradients())
    actual = results(IMPLEMENTATIONS["flash"][0], case)
    with pytest.raises(AssertionError, match="dv is beyond its bound"):
        assert_within(case.bound(), actual, exact)
    assert_within(case.bound(Profile(recompute_from_lse=True)), actual, exact)
    assert_within(case.bound(), results(IMPLEMENTATIONS["math"][0], case), exact)


@pytest.mark.parametrize("family", ORDINARY)
def test_bound_is_not_vacuous(family):
    case = AttentionCase.build(family=family, seed=1, shape=(1, 2, 1, 9, 17, 8, 8))
    if family != "subnormal":
        assert not is_vacuous(case.bound().out, case.reference().out)
    assert not is_vacuous(case.bound().dv, case.gradients().dv)


def test_bound_is_zero_where_a_row_is_empty_and_where_a_key_is_unseen():
    case = AttentionCase.build(shape=(2, 2, 1, 7, 4, 4, 4), mask="causal&padding_right", seed=2)
    limit = case.bound()
    full = case.mask.expand(2, 2, 7, 4)
    assert limit.out[~full.any(-1)].eq(0).all()
    assert limit.dq[~full.any(-1)].eq(0).all()
    unseen = ~full.any(2).any(1, keepdim=True)
    assert unseen.any()
    assert limit.dk[unseen].eq(0).all()
    assert limit.dv[unseen].eq(0).all()


@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].extreme])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bound_is_a_number_at_the_ends_of_the_range(family, dtype):
    case = AttentionCase.build(family=family, dtype=dtype, shape=(1, 2, 1, 3, 5, 4, 4))
    for limit in case.bound()[:4]:
        assert limit.ge(0).all()
    # The distance between the two largest float64 numbers of either sign is itself too large.
    assert case.bound().out.isfinite().all() or (family, dtype) == ("dtype_max", torch.float64)


def test_probable_bound_is_tighter_for_long_rows():
    case = AttentionCase.build(shape=(1, 1, 1, 4, 1000, 64, 8))
    probable = case.bound(mode="probable")
    assert (probable.out < case.bound().out).all()
    assert_within(probable, results(plain, case), (case.reference().out, *case.gradients()))


def test_stated_precision_only_ever_widens_the_bound():
    case = AttentionCase.build(shape=(1, 2, 1, 9, 33, 8, 8), mask="random")
    strict = case.bound()
    for profile in (
        Profile(scores=torch.float16), Profile(weights=torch.bfloat16), Profile(exp_ulps=64),
        Profile(accumulate=torch.float16), Profile(compute=torch.float16),
        Profile(recompute_from_lse=True), Profile(delta_from_output=True),
    ):  # fmt: skip
        loose = case.bound(profile)
        assert all(bool((a >= b).all()) for a, b in zip(loose[:4], strict[:4], strict=True))


def test_gamma_holds_everything_and_nothing():
    assert bounds.gamma(0, 0.1) == 0
    assert bounds.gamma(10, 0.1) == math.inf
    assert bounds.gamma(100, 2**-24, "probable") < bounds.gamma(100, 2**-24)


def test_condition_ulps_is_half_for_a_correct_rounding():
    numbers = torch.rand(1000, dtype=torch.float64) + 1
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        # A conversion to 16 bits goes through float32 and would round twice.
        exact = numbers if dtype == torch.float32 else numbers.float().double()
        found = condition_ulps(exact.to(dtype), exact, exact)
        assert 0.4 < found.max() <= 0.5


def test_condition_scales_are_at_least_the_results():
    case = AttentionCase.build(shape=(1, 4, 2, 5, 7, 4, 4), mask="random")
    scales = condition_scales(case.q, case.k, case.v, mask=case.mask, grad_out=case.grad_out)
    exact = (case.reference().out, *case.gradients()[:3])
    for scale, x in zip(scales[:4], exact, strict=True):
        assert (scale * (1 + 2**-40) >= x.abs()).all()


def test_bound_takes_tensors_that_want_a_gradient():
    case = AttentionCase.build()
    q = case.q.clone().requires_grad_()
    assert not attention_error_bound(q, case.k, case.v).out.requires_grad


def rows(dtype, n, offset=0.0, amplitude=1.0):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(16, n, generator=generator, dtype=torch.float64) * amplitude + offset
    return x.to(dtype), torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)


def exact_layer_norm(x, weight, bias, eps):
    """Centre twice in float64: torch's own float64 layer norm errs by more than this bound."""
    x = x.double()
    x = x - x.mean(-1, keepdim=True)
    x = x - x.mean(-1, keepdim=True)
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight + bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("n", "offset", "amplitude"), [(5, 0, 1), (64, 0, 10), (300, 3, 1), (64, 1000, 1)]
)
def test_function_bounds_hold(dtype, n, offset, amplitude):
    x, weight = rows(dtype, n, offset, amplitude)
    u, w, f64 = wide(x), wide(weight), x.double()
    assert_within(bounds.softmax_error_bound(x), u.softmax(-1).to(dtype), f64.softmax(-1))
    assert_within(bounds.softmax_error_bound(x, 0), u.softmax(0).to(dtype), f64.softmax(0))
    assert_within(
        bounds.log_softmax_error_bound(x), u.log_softmax(-1).to(dtype), f64.log_softmax(-1)
    )
    assert_within(bounds.logsumexp_error_bound(x), u.logsumexp(-1).to(dtype), f64.logsumexp(-1))
    exact = exact_layer_norm(x, weight.double(), weight.double(), 1e-5)
    norm = F.layer_norm(u, (n,), w, w, 1e-5).to(dtype)
    loose = bounds.layer_norm_error_bound(x, weight, weight, centred_twice=False)
    assert_within(loose, norm, exact)
    centred = u - u.mean(-1, keepdim=True)
    twice = F.layer_norm(centred, (n,), w, w, 1e-5).to(dtype)
    assert_within(bounds.layer_norm_error_bound(x, weight, weight), twice, exact)
    rms = F.rms_norm(u, (n,), w, 1e-6).to(dtype)
    exact_rms = F.rms_norm(f64, (n,), weight.double(), 1e-6)
    assert_within(bounds.rms_norm_error_bound(x, weight), rms, exact_rms)
    product = F.linear(u, u[:3] / n, w[:3]).to(dtype)
    limit = bounds.matmul_error_bound(u, (u[:3] / n).mT, w[:3])
    if dtype == torch.float32:
        assert_within(limit, product, f64 @ (u[:3] / n).double().mT + weight[:3].double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cross_entropy_bound_holds(dtype, smoothing, reduction):
    x, weight = rows(dtype, 50, 0, 8)
    labels = torch.arange(16) % 50
    labels[3] = -100
    options = {"label_smoothing": smoothing, "reduction": reduction}
    weights = weight.abs()
    actual = F.cross_entropy(wide(x), labels, weight=wide(weights), **options).to(dtype)
    exact = F.cross_entropy(x.double(), labels, weight=weights.double(), **options)
    limit = bounds.cross_entropy_error_bound(x, labels, class_weights=weights, **options)
    assert_within(limit, actual, exact)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotate_bound_holds_and_leaves_the_rest_alone(interleaved):
    x, _ = rows(torch.float32, 10)
    angle = torch.rand(16, 4, dtype=torch.float64)
    cos, sin = angle.cos().float(), angle.sin().float()

    def rotate(x, cos, sin):
        turned, rest = x[..., :8], x[..., 8:]
        a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
        parts = (a * cos - b * sin, b * cos + a * sin)
        joined = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
        return torch.cat([joined, rest], -1)

    limit = bounds.rotate_error_bound(x, cos, sin, interleaved=interleaved)
    exact = rotate(x.double(), cos.double(), sin.double())
    assert assert_within(limit, rotate(x, cos, sin), exact) > 0.1
    assert limit[:, 8:].eq(0).all()


def test_softmax_bounds_are_zero_where_nothing_is_allowed():
    x = torch.randn(2, 3)
    allowed = torch.tensor([[True, False, True], [False, False, False]])
    assert bounds.softmax_error_bound(x, allowed=allowed)[~allowed].eq(0).all()
    assert bounds.log_softmax_error_bound(x, allowed=allowed)[~allowed].eq(0).all()
    assert bounds.logsumexp_error_bound(x, allowed=allowed)[1] == 0
