"""Layer and RMS norm: right from constant rows to the largest float, in the gradients too."""

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stabletx.functional import layer_norm, rms_norm
from stabletx.functional.normalization import _are_easy, are_ordinary
from stabletx.testing.assertions import assert_within
from stabletx.testing.tolerances import (
    condition_ulps,
    gamma,
    layer_norm_error_bound,
    rms_norm_error_bound,
    smallest_subnormal,
    unit_roundoff,
)

FUNCTIONS = {"layer_norm": layer_norm, "rms_norm": rms_norm}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WIDE = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
)  # squares may overflow where they are computed

each_function = pytest.mark.parametrize("name", FUNCTIONS)
both_ways = pytest.mark.usefixtures("values")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def noise(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def parameters(name, width, dtype):
    vectors = {"weight": (0.5 + noise(width, seed=5).abs()).to(dtype)}
    if name == "layer_norm":
        vectors["bias"] = noise(width, seed=6, dtype=dtype)
    return vectors


def forward_and_gradients(function, x, upstream=None, **vectors):
    """Give the output and the gradients of x and of each vector."""
    x = x.detach().clone().requires_grad_()
    vectors = {key: value.detach().clone().requires_grad_() for key, value in vectors.items()}
    out = function(x, **vectors)
    upstream = noise(*out.shape, seed=9, dtype=out.dtype) if upstream is None else upstream
    return out.detach(), *torch.autograd.grad(out, [x, *vectors.values()], upstream)


def read_nothing(monkeypatch):
    """Make every function run as on a GPU, where no branch may depend on a value."""
    for module in ("normalization", "_magnitude"):
        monkeypatch.setattr(f"stabletx.functional.{module}.values_may_be_read", lambda x: False)


@pytest.fixture(params=["read", "unread"])
def values(request, monkeypatch):
    """Run a test both where values may be read and where they may not."""
    if request.param == "unread":
        read_nothing(monkeypatch)


def exactly(name, x, upstream, weight, bias=None, eps=1e-5):
    """Compute output and gradients with 60 digits, each with the sum of its terms' magnitudes.

    Returns:
        (output, gradient of x, of weight, of bias) and their condition scales, float64.
    """
    width, centred = x.shape[-1], name == "layer_norm"
    w = [mpmath.mpf(value) for value in weight.double().tolist()]
    b = [mpmath.mpf(0)] * width if bias is None else list(map(mpmath.mpf, bias.double().tolist()))
    values, scales = ([[], [], [], []] for _ in range(2))
    for row, push in zip(x.double().tolist(), upstream.double().tolist(), strict=True):
        z, g = list(map(mpmath.mpf, row)), list(map(mpmath.mpf, push))
        mean = mpmath.fsum(z) / width if centred else mpmath.mpf(0)
        square = mpmath.fsum((value - mean) ** 2 for value in z) / width
        rstd = 1 / mpmath.sqrt(square + mpmath.mpf(eps))
        n = [(value - mean) * rstd for value in z]
        h = [gi * wi for gi, wi in zip(g, w, strict=True)]
        gn, hn = ([a * c for a, c in zip(side, n, strict=True)] for side in (g, h))
        nw = [a * c for a, c in zip(n, w, strict=True)]
        total, size = mpmath.fsum(h) * centred, mpmath.fsum(map(abs, h)) * centred
        peak = max(map(abs, n))
        along, along_size = mpmath.fsum(hn), peak * mpmath.fsum(map(abs, h))
        dx = [rstd * (h[i] - (total + n[i] * along) / width) for i in range(width)]
        dx_size = [rstd * (abs(h[i]) + (size + peak * along_size) / width) for i in range(width)]
        out = [a + c for a, c in zip(nw, b, strict=True)]
        largest = max(map(abs, nw))
        for k, (value, scale) in enumerate(
            [
                (out, [largest + abs(c) for c in b]),
                (dx, dx_size),
                (gn, [abs(a) * peak for a in g]),
                (g, map(abs, g)),
            ]
        ):
            values[k].append(list(value))
            scales[k].append(list(scale))
    for rows in (values, scales):  # what all rows share adds up over them
        rows[2:] = [[[mpmath.fsum(column) for column in zip(*r, strict=True)]] for r in rows[2:]]
    return [
        [torch.tensor([[float(v) for v in row] for row in r], dtype=torch.float64) for r in rows]
        for rows in (values, scales)
    ]


def assert_right(name, x, eps=1e-5, most=None):
    """Hold output and gradients to the bound of rounding.

    A gradient is a product of at most 20 roundings, the sums over the row (mean, variance, and
    the same in the backward pass) and those over the rows, on terms as large as their scale says.
    """
    dtype, width = x.dtype, x.shape[-1]
    vectors = parameters(name, width, dtype)
    upstream = noise(*x.shape, seed=9, dtype=dtype) / 1024
    results = forward_and_gradients(
        lambda z, **v: FUNCTIONS[name](z, eps=eps, **v), x, upstream, **vectors
    )
    assert all(result.dtype == dtype for result in results)
    with mpmath.workdps(60):
        expected, scales = exactly(name, x, upstream, eps=eps, **vectors)
    bound = {"layer_norm": layer_norm_error_bound, "rms_norm": rms_norm_error_bound}[name]
    assert_within(bound(x, eps=eps, **vectors), results[0], expected[0])
    u = unit_roundoff(torch.promote_types(dtype, torch.float32)) + 2.0**-53
    for actual, exact, scale in zip(results, expected, scales, strict=False):
        error = gamma(4 * width + len(x) + 20, u) * scale
        error = error + unit_roundoff(dtype) * (exact.abs() + error) + smallest_subnormal(dtype)
        assert_within(error, actual.reshape(exact.shape), exact)
        ulps = condition_ulps(actual.reshape(exact.shape), exact, scale)
        assert most is None or (ulps <= most).all(), ulps


# Inputs on which torch's kernels were measured to return zeros, NaN, or hundreds of ulps of error.
REGRESSIONS = {
    "root_of_the_largest_float": (lambda x: x * 1e19, 1e-5),
    "beyond_that_root": (lambda x: x * 1e20, 1e-5),
    "largest_float": (lambda x: x.sign() * torch.finfo(torch.float32).max, 1e-5),
    "float16_squares_overflow": (lambda x: x * 300, 1e-5),
    "zero_row_and_bert_eps": (lambda x: x * 0, 1e-12),
    "small_row_and_bert_eps": (lambda x: x * 1e-5, 1e-12),
    "offset_12": (lambda x: x + 12, 1e-5),
    "offset_1e3": (lambda x: x + 1e3, 1e-5),
    "offset_1e4": (lambda x: x + 1e4, 1e-5),
    "large_row_of_small_deviations": (lambda x: x + 2.0**100, 1e-12),
    "large_row_of_large_deviations": (lambda x: x * 2.0**90 + 2.0**100, 1e-12),
    "large_row_and_large_eps": (lambda x: x * 2.0**40, 1.0),
    "one_large_feature": (lambda x: x + 1e4 * (torch.arange(x.shape[-1]) == 3), 1e-5),
    "row_far_below_the_root_of_eps": (lambda x: x * 1e-30, 1e-12),
}


@each_function
@each_dtype
@both_ways
@pytest.mark.parametrize("case", REGRESSIONS)
def test_norms_are_right_where_kernels_were_wrong(name, dtype, case):
    change, eps = REGRESSIONS[case]
    x = change(noise(3, 64)).to(dtype)
    if not x.isfinite().all():  # beyond the dtype: the largest there is
        x = noise(3, 64).sign().to(dtype) * torch.finfo(dtype).max
    # The contract: half a unit in 16 bits, and what float32 adds to it; a few units elsewhere.
    assert_right(name, x, eps, most=0.51 if dtype in (torch.bfloat16, torch.float16) else 5)


def test_layer_norm_is_right_in_long_rows_with_an_offset():
    assert_right("layer_norm", (noise(1, 4096) + 1e3).float(), most=5)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(FUNCTIONS)),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 3),
    width=st.integers(1, 40),
    exponent=st.integers(-40, 40),
    offset=st.sampled_from([0.0, 1.0, 3.0, 100.0]),
    eps=st.sampled_from([1e-12, 1e-6, 1e-3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_norms_are_right_at_every_size(name, dtype, rows, width, exponent, offset, eps, seed):
    x = (noise(rows, width, seed=seed) + offset) * 2.0**exponent
    if dtype == torch.float16:
        x = x.clamp(-60000, 60000)
    assert_right(name, x.to(dtype), eps)


@each_function
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_sixteen_bit_parameters_are_added_up_in_float32(name, dtype):
    x, upstream = noise(600, 4, dtype=dtype), noise(600, 4, seed=3, dtype=dtype).abs()
    vectors = parameters(name, 4, dtype)
    wide = {key: value.float() for key, value in vectors.items()}
    narrow = forward_and_gradients(FUNCTIONS[name], x, upstream, **vectors)
    exact = forward_and_gradients(FUNCTIONS[name], x.float(), upstream.float(), **wide)
    for low, high in zip(narrow, exact, strict=True):
        assert torch.equal(low, high.to(dtype))


@each_function
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@both_ways
def test_rows_beyond_the_root_of_the_largest_float_scale_out_exactly(name, dtype):
    function = FUNCTIONS[name]
    x, vectors = noise(5, 24, seed=1, dtype=dtype), parameters(name, 24, dtype)
    reach = 1024 if dtype == torch.float64 else 128
    near, far = (
        forward_and_gradients(function, x * 2.0**k, **vectors)
        for k in (reach // 2 + 8, reach // 2 + reach // 4)
    )
    shrink = 2.0 ** (8 - reach // 4)
    assert near[0].isfinite().all()
    assert near[0].abs().amax(-1).min() > 1
    for this, other in zip(near, [far[0], far[1] / shrink, *far[2:]], strict=True):
        assert torch.equal(this, other)


@each_function
@each_dtype
def test_rows_of_the_largest_float_are_finite_with_finite_gradients(name, dtype):
    x = noise(6, 32).sign() * torch.finfo(dtype).max
    results = forward_and_gradients(FUNCTIONS[name], x.to(dtype), **parameters(name, 32, dtype))
    assert all(result.isfinite().all() for result in results)


@each_dtype
@pytest.mark.parametrize("value", [0.0, 1000.1, 60000.0, 1e38])
@both_ways
def test_layer_norm_of_a_constant_row_is_exactly_the_bias(dtype, value):
    value = min(value, torch.finfo(dtype).max)
    bias = noise(768, dtype=dtype)
    function = layer_norm
    out = function(torch.full((2, 768), value, dtype=dtype), None, bias, eps=1e-12)
    assert torch.equal(out, bias.expand(2, 768))


@each_function
@each_dtype
@both_ways
@pytest.mark.parametrize("value", [0.0, 60000.0])
def test_eps_of_1e_12_gives_right_gradients_where_the_row_has_no_deviation(name, dtype, value):
    # Where x does not deviate, the derivative is that of (x - mean) / sqrt(eps), exactly linear.
    if name == "rms_norm" and value:
        value = 0.0
    function = FUNCTIONS[name]
    x = torch.full((2, 4), value, dtype=dtype, requires_grad=True)
    upstream = torch.tensor([[3.0, -1.0, -1.0, -1.0], [1.0, -1.0, 2.0, -2.0]], dtype=dtype) / 1024
    (gradient,) = torch.autograd.grad(function(x, eps=2.0**-40), x, upstream)
    assert torch.equal(gradient, upstream * 2.0**20)


@each_function
@each_dtype
@both_ways
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, "large"])
def test_one_row_moves_no_bit_of_another(name, dtype, bad):
    if bad == "large":
        bad = torch.finfo(dtype).max
    function = FUNCTIONS[name]
    vectors = parameters(name, 16, dtype)
    x = noise(4, 16, dtype=dtype)
    before = forward_and_gradients(function, x, **vectors)
    x[1, 3] = bad
    after = forward_and_gradients(function, x, **vectors)
    others = [0, 2, 3]
    for this, other in zip(before[:2], after[:2], strict=True):
        assert torch.equal(this[others], other[others])
    if not x[1].isfinite().all():
        assert after[0][1].isnan().all()
        assert after[1][1].isnan().all()


def test_layer_norm_forgets_a_common_offset_to_the_bit_when_it_is_exact():
    x = (noise(16, 64) * 8).round() / 8  # all sums are exact, with and without the offset
    x = (x - x[:, :1]).float()
    x[:, 0] -= x.sum(-1)  # mean 0 exactly
    centred = forward_and_gradients(layer_norm, x + 2.0**9)
    further = forward_and_gradients(layer_norm, x + 2.0**13)
    assert all(map(torch.equal, centred, further))


@each_function
@pytest.mark.parametrize("offset", [0.0, 50.0], ids=["easy", "hard"])
def test_first_and_second_derivatives_agree_with_differences(name, offset):
    x = (noise(2, 3, 5) + offset).requires_grad_()
    vectors = [v.requires_grad_() for v in parameters(name, 5, torch.float64).values()]

    def function(z, *vectors):
        return FUNCTIONS[name](z, *vectors, eps=1e-3)

    assert torch.autograd.gradcheck(function, (x, *vectors), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (x, *vectors))


@each_function
def test_function_transforms_agree_with_loops_and_double_backward(name):
    x, vectors = noise(3, 5), parameters(name, 5, torch.float64).values()

    def total(z):
        return (FUNCTIONS[name](z, *vectors) ** 2 * torch.arange(1.0, 6.0).double()).sum()

    batched = torch.func.vmap(torch.func.grad(total))(x)
    torch.testing.assert_close(batched, torch.stack([torch.func.grad(total)(row) for row in x]))
    twice_reverse = torch.autograd.functional.hessian(total, x[0])
    torch.testing.assert_close(torch.func.hessian(total)(x[0]), twice_reverse)
    _, tangent = torch.func.jvp(total, (x[0],), (x[1],))
    torch.testing.assert_close(tangent, torch.func.grad(total)(x[0]) @ x[1])


@each_function
@each_dtype
def test_the_dtype_of_the_parameters_does_not_lower_that_of_the_statistics(name, dtype):
    # A model cast to 16 bits, and one whose norms were kept in float32, agree with each other.
    x, vectors = noise(4, 32, dtype=dtype), parameters(name, 32, torch.bfloat16)
    kept = {key: value.float() for key, value in vectors.items()}
    narrow, wide = (forward_and_gradients(FUNCTIONS[name], x, **v) for v in (vectors, kept))
    assert narrow[0].dtype == wide[0].dtype == dtype
    assert torch.equal(narrow[0], wide[0])
    assert torch.equal(narrow[1], wide[1])
    for low, high in zip(narrow[2:], wide[2:], strict=True):
        assert torch.equal(low, high.bfloat16())


@each_function
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_float64_parameters_count_as_float32_for_other_inputs(name, dtype):
    x, vectors = noise(4, 32, dtype=dtype), parameters(name, 32, torch.float64)
    rounded = {key: value.float() for key, value in vectors.items()}
    assert torch.equal(FUNCTIONS[name](x, **vectors), FUNCTIONS[name](x, **rounded))


@each_function
@each_dtype
def test_no_parameters_mean_weight_one_and_bias_zero(name, dtype):
    x = noise(4, 32, dtype=dtype)
    ones = {"weight": torch.ones(32, dtype=dtype)}
    if name == "layer_norm":
        ones["bias"] = torch.zeros(32, dtype=dtype)
    assert torch.equal(FUNCTIONS[name](x), FUNCTIONS[name](x, **ones))


@each_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_equals_eager_to_the_bit(name, dtype, monkeypatch):
    torch.compiler.reset()
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend="aot_eager")
    x, vectors = noise(4, 32, dtype=dtype), parameters(name, 32, dtype)
    x[2] = torch.finfo(dtype).max
    results = forward_and_gradients(compiled, x, **vectors)
    read_nothing(monkeypatch)
    eager = forward_and_gradients(FUNCTIONS[name], x, **vectors)
    assert all(map(torch.equal, results, eager))


@each_function
@each_dtype
def test_autocast_and_inference_change_no_bit(name, dtype):
    x, vectors = noise(4, 32, dtype=dtype), parameters(name, 32, dtype)
    plain = forward_and_gradients(FUNCTIONS[name], x, **vectors)
    with torch.autocast("cpu", torch.bfloat16):
        cast = forward_and_gradients(FUNCTIONS[name], x, **vectors)
    assert all(map(torch.equal, plain, cast))
    with torch.inference_mode():
        out = FUNCTIONS[name](x, **vectors)
    assert out.dtype == dtype
    assert dtype in (torch.float16, torch.bfloat16) or torch.equal(plain[0], out)


@each_function
@both_ways
@pytest.mark.parametrize("offset", [0.0, 50.0, 2.0**100], ids=["easy", "hard", "large"])
def test_layouts_and_leading_axes_change_no_bit(name, offset):
    x = (noise(6, 4, 10) * max(1.0, offset / 64) + offset).float()
    out = FUNCTIONS[name](x)
    assert torch.equal(FUNCTIONS[name](x.transpose(0, 1)), out.transpose(0, 1))
    assert torch.equal(FUNCTIONS[name](x[2, 1]), out[2, 1])
    assert FUNCTIONS[name](x[:0]).shape == (0, 4, 10)


@pytest.mark.parametrize("rows", [2, 16, 17, 40])
@pytest.mark.parametrize("change", [50.0, -50.0, 2.0**40, torch.nan, 0.0, 1.0])
def test_ordinary_rows_are_told_from_others_by_their_moments(rows, change):
    x = noise(rows, 64, dtype=torch.float32)
    x[1] = x[1] * change if change in (0.0, 1.0, 2.0**40) else x[1] + change
    _, mean, rstd = torch.native_layer_norm(x, [64], None, None, 1e-5)
    assert _are_easy(mean, rstd, 1e-5) == (change == 1.0)
    apart = torch.stack([mean[:1], rstd[:1], mean[1:2], rstd[1:2]])  # of two norms
    assert are_ordinary(apart, 1e-5) == (change == 1.0)
    assert not are_ordinary(apart, 1.0)


@pytest.mark.parametrize("rows", [1, 3, 16, 17, 40])
@pytest.mark.parametrize("scale", [0.0, 1e-2, 1.0, 1e4])
def test_ordinary_rows_are_normalized_in_one_pass(monkeypatch, rows, scale):
    x = noise(rows, 64, dtype=torch.float32) * scale
    x[0] = 0.0  # as padding often is
    expected = torch.nn.functional.layer_norm(x, x.shape[-1:])
    for name in ("_guarded_layer_norm", "_exponent_to_ordinary"):
        monkeypatch.delattr(f"stabletx.functional.normalization.{name}")
    assert torch.equal(layer_norm(x), expected)
    assert rms_norm(x).shape == x.shape


@each_function
def test_wrong_arguments_are_refused_by_name(name):
    function, x = FUNCTIONS[name], torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got x=list"):
        function([0.0])
    with pytest.raises(TypeError, match=r"x must have a floating-point dtype, got x=torch.int64"):
        function(torch.zeros(2, 3, dtype=torch.int64))
    for shape in ((), (2, 0)):
        with pytest.raises(ValueError, match=r"x must have a last axis of features, got x=\("):
            function(torch.zeros(shape))
    for eps in (0.0, -1e-5, 1e-25, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"eps must be in \[1e-24, 1\], got eps={eps}"):
            function(x, eps=eps)
    with pytest.raises(TypeError, match=r"eps must be a number, got eps=True"):
        function(x, eps=True)
    for vector in ("weight", "bias")[: 1 + (name == "layer_norm")]:
        with pytest.raises(
            ValueError, match=rf"{vector} must have shape \(3,\), got {vector}=a te"
        ):
            function(x, **{vector: torch.ones(2)})
        with pytest.raises(TypeError, match=rf"{vector} must have a floating-point dtype, got"):
            function(x, **{vector: torch.ones(3, dtype=torch.int64)})
        with pytest.raises(ValueError, match=rf"{vector} must have the device of the input, got"):
            function(x, **{vector: torch.ones(3, device="meta")})
