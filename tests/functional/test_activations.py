"""GELU and SwiGLU: every 16-bit number there is, and the largest of the others."""

import math

import pytest
import torch

from stabletx.functional import gelu, swiglu
from stabletx.testing.tolerances import condition_ulps

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FORMS = ("none", "tanh")

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_form = pytest.mark.parametrize("form", FORMS)


def every_number(dtype):
    """Give every finite number of a 16-bit dtype."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    return numbers[numbers.isfinite()]


def ends(dtype):
    """Give numbers from the smallest to the largest of a dtype, of both signs."""
    if dtype in (torch.bfloat16, torch.float16):
        return every_number(dtype)
    info = torch.finfo(dtype)
    low, high = torch.tensor([info.tiny, info.max], dtype=torch.float64).log2().tolist()
    sizes = torch.exp2(torch.linspace(low, high, 4001, dtype=torch.float64)[:-1])
    sizes = torch.cat([sizes.new_zeros(1), sizes, sizes.new_full((1,), info.max)]).to(dtype)
    return torch.cat([-sizes, sizes])


def forward_and_gradient(function, *inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out.sum(), inputs)


@each_form
@each_dtype
def test_gelu_and_its_gradient_are_finite_for_every_finite_number(form, dtype):
    out, gradient = forward_and_gradient(lambda x: gelu(x, approximate=form), ends(dtype))
    assert out.isfinite().all()
    assert gradient.isfinite().all()


@each_form
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gelu_is_right_to_a_few_units_of_its_input(form, dtype):
    # In 16 bits: the last rounding, and what float32 adds to it. In float32: erf, its sum with 1
    # and two products, half a unit each or one.
    x = ends(dtype)
    wide = x.double()
    if form == "none":
        expected = wide * 0.5 * torch.special.erfc(-wide * math.sqrt(0.5))
    else:
        inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
        expected = wide * torch.sigmoid(2 * inner)
    ulps = condition_ulps(gelu(x, approximate=form), expected, wide)
    assert (ulps <= (3 if dtype == torch.float32 else 0.51)).all()


@each_form
@each_dtype
def test_gelu_is_flat_or_the_identity_far_from_zero(form, dtype):
    x = ends(dtype)
    out, gradient = forward_and_gradient(lambda z: gelu(z, approximate=form), x)
    high, low = x > 60, x < -60
    assert torch.equal(out[high], x[high])
    assert (gradient[high] == 1).all()
    assert not out[low].any()
    assert not gradient[low].any()


@each_form
def test_one_large_number_moves_no_bit_of_another(form):
    x = torch.linspace(-8, 8, 1000)
    before = forward_and_gradient(lambda z: gelu(z, approximate=form), x)
    for bad in (3e38, torch.inf, torch.nan):
        spoilt = torch.cat([x, torch.full((24,), bad)])
        after = forward_and_gradient(lambda z: gelu(z, approximate=form), spoilt)
        assert torch.equal(before[0], after[0][:1000])
        assert torch.equal(before[1], after[1][:1000])


@each_form
@each_dtype
def test_gelu_does_not_swallow_what_is_not_finite(form, dtype):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0], dtype=dtype)
    assert torch.equal(gelu(x, approximate=form).isfinite(), torch.tensor([False] * 3 + [True]))


@each_form
def test_gelu_forms_differ_as_they_are_defined(form):
    x = torch.tensor([0.5, 1.0, -2.0], dtype=torch.float64)
    expected = torch.nn.functional.gelu(x, approximate=form)
    assert torch.equal(gelu(x, approximate=form), expected)
    other = FORMS[1 - FORMS.index(form)]
    assert not torch.equal(gelu(x, approximate=other), expected)


@each_dtype
def test_swiglu_and_its_gradients_are_finite_for_every_finite_gate(dtype):
    gate = ends(dtype)
    for size in (1.0, 0.25):
        up = torch.full_like(gate, size)
        results = forward_and_gradient(swiglu, gate, up)
        assert all(result.isfinite().all() for result in results)
    high, low = gate > 120, gate < -800
    assert torch.equal(results[0][high], gate[high] * 0.25)
    assert not results[0][low].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_the_float32_result_rounded_once(dtype):
    x = every_number(dtype)
    for form in FORMS:
        wide = gelu(x.float(), approximate=form)
        assert torch.equal(gelu(x, approximate=form), wide.to(dtype))
    gate = x[x.abs() < 100]
    up = gate.flip(0)
    assert torch.equal(swiglu(gate, up), swiglu(gate.float(), up.float()).to(dtype))


@each_form
@pytest.mark.parametrize("large", [False, True])
def test_derivatives_agree_with_differences_and_transforms(form, large):
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    x = (torch.cat([x, torch.tensor([2.0**21, -(2.0**21)])]) if large else x).requires_grad_()
    up = x.detach().flip(0).clamp(-2, 2).requires_grad_()

    def function(z):
        return gelu(z, approximate=form)

    assert torch.autograd.gradcheck(function, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, x)
    if not large:
        assert torch.autograd.gradcheck(swiglu, (x, up), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(swiglu, (x, up))
    torch.testing.assert_close(torch.func.vmap(function)(x), function(x))
    slopes = torch.autograd.grad(function(x).sum(), x)[0]
    _, tangent = torch.func.jvp(function, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, slopes)
    curvature = torch.func.hessian(lambda z: function(z).sum())(x).diagonal()
    twice = torch.autograd.functional.hessian(lambda z: function(z).sum(), x.detach())
    torch.testing.assert_close(curvature, twice.diagonal())


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_and_autocast_equal_eager_to_the_bit(form, dtype):
    def function(x, up):
        return gelu(x, approximate=form) + swiglu(x, up)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = torch.linspace(-4, 4, 64, dtype=dtype)
    x[5] = torch.finfo(dtype).max
    up = x.flip(0).clamp(-2, 2)
    eager = forward_and_gradient(function, x, up)
    assert all(map(torch.equal, eager, forward_and_gradient(compiled, x, up)))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, eager, forward_and_gradient(function, x, up)))


def test_any_shape_is_taken():
    for shape in ((), (0,), (2, 0, 3), (2, 3)):
        x = torch.ones(shape)
        assert gelu(x).shape == swiglu(x, x).shape == shape


def test_wrong_arguments_are_refused_by_name():
    x = torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"x must have a floating-point dtype, got x=torch.int64"):
        gelu(x.long())
    with pytest.raises(
        ValueError, match=r"approximate must be one of 'none', 'tanh', got .*='erf'"
    ):
        gelu(x, approximate="erf")
    with pytest.raises(TypeError, match=r"gate must be a torch.Tensor, got gate=float"):
        swiglu(1.0, x)
    with pytest.raises(TypeError, match=r"up must have a floating-point dtype, got up=torch.int64"):
        swiglu(x, x.long())
    with pytest.raises(
        TypeError, match=r"up must have the dtype of gate, got up with torch.float64"
    ):
        swiglu(x, x.double())
    with pytest.raises(ValueError, match=r"up must have the shape of gate, got up with \(3,\) and"):
        swiglu(x, x[0])
