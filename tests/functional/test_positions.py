"""Rotary positions: right phases at every position, whatever happens to the model around them."""

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stabletx.functional import rotary_tables, rotate
from stabletx.testing.assertions import assert_within
from stabletx.testing.tolerances import rotate_error_bound

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_pairing = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])


def noise(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def paired(x, interleaved):
    """Give the two members of every pair, each (..., p)."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


# The positions at which tables with float32 angles, and tables cast with the model, were measured
# to be off by up to 1e-3 and by 2.
@pytest.mark.parametrize("position", [1, 257, 2049, 8191, 65535, 131071, 2**24 + 1])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_rotary_tables_are_within_one_rounding_of_the_exact_phase(position, base):
    cos, sin = rotary_tables(torch.tensor([position]), 64, base=base)
    with mpmath.workdps(40):
        for i in range(32):
            angle = position * mpmath.mpf(base) ** (-mpmath.mpf(2 * i) / 64)
            # Half a float32 spacing below 1, and the angle's own float64 rounding: frequency,
            # product and reduction, one each, and two for the power.
            bound = mpmath.mpf(2) ** -25 + 5 * angle * mpmath.mpf(2) ** -53
            assert abs(mpmath.cos(angle) - mpmath.mpf(cos[0, i].item())) <= bound
            assert abs(mpmath.sin(angle) - mpmath.mpf(sin[0, i].item())) <= bound


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64]
)
def test_rotary_tables_do_not_depend_on_the_dtype_or_the_company_of_positions(dtype):
    positions = torch.tensor([[0, 3], [100, 7]])
    cos, sin = rotary_tables(positions.to(dtype), 6)
    assert cos.shape == sin.shape == (2, 2, 3)
    assert cos.dtype == sin.dtype == torch.float32
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
        alone = rotary_tables(positions[tuple(index)], 6)
        assert torch.equal(alone[0], cos[tuple(index)])
        assert torch.equal(alone[1], sin[tuple(index)])


def test_rotary_tables_stay_exact_under_autocast_and_default_dtype():
    positions = torch.arange(4000, 4032)
    plain = rotary_tables(positions, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, plain, rotary_tables(positions, 16)))
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert all(map(torch.equal, plain, rotary_tables(positions, 16)))
    finally:
        torch.set_default_dtype(torch.float32)


def test_rotary_tables_stretch_with_fractional_positions():
    half = rotary_tables(torch.tensor([1.5]), 8)
    cos, sin = rotary_tables(torch.tensor([3]), 8)
    assert torch.equal(half[0][0, 0], torch.tensor(1.5, dtype=torch.float64).cos().float())
    doubled = torch.cos(2 * torch.arccos(half[0].double()))
    assert torch.equal(doubled.half(), cos.half())
    assert not torch.equal(half[1], sin)


@each_pairing
def test_rotate_turns_each_pair_by_a_quarter_exactly(interleaved):
    x = noise(2, 3, 8)
    zero, one = torch.zeros(3, 4), torch.ones(3, 4)
    first, second = paired(x, interleaved)
    turned_first, turned_second = paired(rotate(x, zero, one, interleaved=interleaved), interleaved)
    assert torch.equal(turned_first, -second)
    assert torch.equal(turned_second, first)
    assert torch.equal(rotate(x, one, zero, interleaved=interleaved), x)


@each_pairing
@each_dtype
def test_rotate_is_within_the_bound_of_rounding(interleaved, dtype):
    x, (cos, sin) = noise(4, 9, 16, dtype=dtype), rotary_tables(torch.arange(300, 309), 16)
    out = rotate(x, cos, sin, interleaved=interleaved)
    a, b = paired(x.double(), interleaved)
    bound = paired(rotate_error_bound(x, cos, sin, interleaved=interleaved), interleaved)
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin])
    assert_within(torch.stack(bound), torch.stack(paired(out, interleaved)), turned)


def test_pairings_differ_only_in_the_order_of_features():
    x, (cos, sin) = noise(2, 3, 5, 8), rotary_tables(torch.arange(5), 8)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    halves = rotate(x[..., order], cos, sin)
    assert torch.equal(rotate(x, cos, sin, interleaved=True)[..., order], halves)


@each_pairing
@each_dtype
def test_rotate_leaves_features_beyond_the_tables_as_they_are(interleaved, dtype):
    x, (cos, sin) = noise(2, 5, 10, dtype=dtype), rotary_tables(torch.arange(5), 6)
    x[..., 6] = torch.nan
    out = rotate(x, cos, sin, interleaved=interleaved)
    assert out.dtype == dtype
    assert out.shape == x.shape
    assert torch.equal(out[..., 6:].nan_to_num(7.0), x[..., 6:].nan_to_num(7.0))
    assert torch.equal(out[..., :6], rotate(x[..., :6], cos, sin, interleaved=interleaved))


@each_pairing
@pytest.mark.parametrize("shape", [(10,), (5, 10), (2, 0, 10), (2, 3, 5, 10), (0, 5, 10)])
def test_rotate_takes_any_leading_axes(interleaved, shape):
    x, (cos, sin) = noise(*shape), rotary_tables(torch.arange(5), 6)
    n = 1 if len(shape) == 1 else shape[-2]
    cos, sin = (table[0] if len(shape) == 1 else table[:n] for table in (cos, sin))
    out = rotate(x, cos, sin, interleaved=interleaved)
    assert out.shape == x.shape
    assert torch.equal(out[..., 6:], x[..., 6:])


def test_rotary_tables_lie_where_the_positions_do_with_a_base_of_ten_thousand():
    positions = torch.arange(5)
    away = rotary_tables(positions.to("meta"), 6)
    assert all(table.device == torch.device("meta") for table in away)
    given = rotary_tables(positions, 6, base=10000.0)
    assert all(map(torch.equal, rotary_tables(positions, 6), given))


@each_pairing
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_feature_that_is_not_finite_spoils_its_own_pair_only(interleaved, bad):
    x, (cos, sin) = noise(5, 8), rotary_tables(torch.arange(1, 6), 8)
    clean = rotate(x, cos, sin, interleaved=interleaved)
    x[2, 0] = bad
    spoilt = rotate(x, cos, sin, interleaved=interleaved)
    changed = clean != spoilt
    first, second = paired(changed, interleaved)
    assert changed.sum() == 2
    assert first[2, 0]
    assert second[2, 0]
    assert not spoilt[changed].isfinite().any()


@each_pairing
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rotate_in_sixteen_bits_is_the_float32_result_rounded_once(interleaved, dtype):
    x, (cos, sin) = noise(2, 33, 8, dtype=dtype), rotary_tables(torch.arange(9000, 9033), 8)
    out = rotate(x, cos, sin, interleaved=interleaved)
    assert torch.equal(out, rotate(x.float(), cos, sin, interleaved=interleaved).to(dtype))


@each_dtype
def test_rotate_of_the_largest_float_is_finite_where_it_fits(dtype):
    most = torch.finfo(dtype).max
    x = torch.tensor([[most, most], [most, -most]], dtype=dtype, requires_grad=True)
    cos, sin = rotary_tables(torch.tensor([0.7, -0.7]), 2)
    out = rotate(x, cos, sin)
    assert out[0, 0].isfinite()
    assert out[1, 0].isfinite()
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.isfinite().all()


@settings(deadline=None)
@given(
    b=st.integers(1, 3), h=st.integers(1, 3), n=st.integers(0, 5), seed=st.integers(0, 2**32 - 1)
)
def test_rotate_broadcasts_tables_over_batch_and_heads(b, h, n, seed):
    x = noise(b, h, n, 4, seed=seed)
    positions = torch.randint(0, 1000, (b, n), generator=torch.Generator().manual_seed(seed))
    cos, sin = rotary_tables(positions, 4)
    out = rotate(x, cos[:, None], sin[:, None])
    for i in range(b):
        for j in range(h):
            assert torch.equal(out[i, j], rotate(x[i, j], cos[i], sin[i]))


@each_pairing
def test_derivatives_of_rotate_agree_with_differences_and_transforms(interleaved):
    x = noise(2, 3, 6, dtype=torch.float64).requires_grad_()
    cos, sin = rotary_tables(torch.arange(3), 4)

    def function(z):
        return rotate(z, cos, sin, interleaved=interleaved)

    assert torch.autograd.gradcheck(function, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda z: function(z) ** 2, x)
    batched = torch.func.vmap(lambda z, c, s: rotate(z, c, s, interleaved=interleaved))
    tables = cos.expand(2, 3, 2), sin.expand(2, 3, 2)
    assert torch.equal(batched(x, *tables), function(x))
    _, tangent = torch.func.jvp(function, (x,), (x,))
    assert torch.equal(tangent, function(x))


@each_pairing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_and_autocast_rotate_equal_eager_to_the_bit(interleaved, dtype):
    def function(x, positions):
        return rotate(x, *rotary_tables(positions, 8), interleaved=interleaved)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, positions = noise(2, 5, 8, dtype=dtype), torch.arange(4000, 4005)
    eager = function(x, positions)
    assert torch.equal(compiled(x, positions), eager)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(function(x, positions), eager)


def test_rotary_tables_refuse_wrong_arguments_by_name():
    with pytest.raises(TypeError, match=r"positions must be a torch.Tensor, got positions=int"):
        rotary_tables(5, 4)
    for dtype in (torch.bool, torch.bfloat16, torch.float16, torch.complex64):
        with pytest.raises(
            TypeError, match=rf"positions must hold integers, got positions={dtype}"
        ):
            rotary_tables(torch.ones(2, dtype=dtype), 4)
    for head_dim in (0, -2):
        with pytest.raises(
            ValueError, match=rf"head_dim must be positive, got head_dim={head_dim}"
        ):
            rotary_tables(torch.arange(2), head_dim)
    with pytest.raises(TypeError, match=r"head_dim must be an int, got head_dim=4.0"):
        rotary_tables(torch.arange(2), 4.0)
    with pytest.raises(ValueError, match=r"2 must divide head_dim, got 2=2 and head_dim=5"):
        rotary_tables(torch.arange(2), 5)
    for base in (0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"base must be in \[1, 1e\+30\], got base={base}"):
            rotary_tables(torch.arange(2), 4, base=base)


def test_rotate_refuses_wrong_arguments_by_name():
    x, (cos, sin) = noise(2, 3, 8), rotary_tables(torch.arange(3), 8)
    with pytest.raises(TypeError, match=r"x must have a floating-point dtype, got x=torch.int64"):
        rotate(x.long(), cos, sin)
    with pytest.raises(TypeError, match=r"cos must be float32 or float64, got cos=torch.bfloat16"):
        rotate(x, cos.bfloat16(), sin)
    with pytest.raises(TypeError, match=r"sin must be float32 or float64, got sin=torch.float16"):
        rotate(x, cos, sin.half())
    with pytest.raises(ValueError, match=r"cos must have at most half the width of x .*\(3, 5\)"):
        rotate(x, noise(3, 5), noise(3, 5))
    with pytest.raises(
        ValueError, match=r"cos must have at most half .*got cos=a tensor of shape \(\)"
    ):
        rotate(x, torch.tensor(1.0), sin)
    with pytest.raises(ValueError, match=r"must have at most half the width of x with shape \(\)"):
        rotate(torch.tensor(1.0), cos, sin)
    with pytest.raises(
        ValueError, match=r"must broadcast to the rows of x with shape \(2, 3\), got"
    ):
        rotate(x, cos[:2], sin[:2])
    with pytest.raises(
        ValueError, match=r"must broadcast to the rows of x with shape \(2, 3\), got"
    ):
        rotate(x, cos.expand(1, 2, 3, 4), sin.expand(1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"sin must have the shape of cos, got sin with \(3, 2\)"):
        rotate(x, cos, sin[:, :2])
    with pytest.raises(ValueError, match=r"cos must have the device of x, got cos with meta"):
        rotate(x, cos.to("meta"), sin)
