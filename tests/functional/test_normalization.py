"""Layer and RMS norm: right from constant rows to the largest float, in the gradients too."""

import pytest
import torch

from stabletx.functional import layer_norm, rms_norm

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
def test_layouts_and_leading_axes_change_no_bit(name):
    x = noise(6, 4, 10, dtype=torch.float32)
    out = FUNCTIONS[name](x)
    assert torch.equal(FUNCTIONS[name](x.transpose(0, 1)), out.transpose(0, 1))
    assert torch.equal(FUNCTIONS[name](x[2, 1]), out[2, 1])
    assert FUNCTIONS[name](x[:0]).shape == (0, 4, 10)


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
    for eps in (0.0, -1e-5, 1e-31, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"eps must be in \[1e-30, 1\], got eps={eps}"):
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
