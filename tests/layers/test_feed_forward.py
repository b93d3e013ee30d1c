import pytest
import torch

from stabletx.functional import gelu, swiglu
from stabletx.layers import FeedForward
from stabletx.layers import feed_forward as module


def test_feed_forward_is_its_formula():
    x = torch.randn(3, 8)
    plain, gated = FeedForward(8, 12), FeedForward(8, 12, activation="swiglu", use_bias=False)
    assert torch.equal(plain(x), plain.out(gelu(plain.widen(x))))
    gate, up = gated.widen(x).split(12, dim=-1)
    assert torch.equal(gated(x), gated.out(swiglu(gate, up)))


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("gelu_tanh", lambda x: gelu(x, approximate="tanh")),
        ("relu", torch.relu),
        ("silu", torch.nn.functional.silu),
        ("geglu", lambda x: gelu(x[:, :12]) * x[:, 12:]),
        ("geglu_tanh", lambda x: gelu(x[:, :12], approximate="tanh") * x[:, 12:]),
    ],
)
def test_every_activation_is_its_formula_in_every_dtype(name, formula):
    layer = FeedForward(8, 12, activation=name)
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), layer.out(formula(layer.widen(x))))
    half = layer.bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    for value in (-3e38, 3e38):
        wide = torch.full((1, 24), value, requires_grad=True)
        bent = module.bend(wide / 1e30 if "glu" in name else wide, name)
        bent.sum().backward()
        assert bent.isfinite().all()
        assert wide.grad.isfinite().all()


def test_swiglu_has_about_the_weights_of_gelu_by_default():
    assert FeedForward(96).widen.out_features == 384
    assert FeedForward(96, activation="swiglu").widen.out_features == 2 * 256
    assert FeedForward(100, activation="swiglu").out.in_features % 8 == 0


@pytest.mark.parametrize("shape", [(10, 8), (2, 5, 8), (0, 8)])
def test_long_inputs_in_pieces_are_the_whole(same_function, monkeypatch, shape):
    @torch.no_grad()
    def run(dtype, at_once):
        monkeypatch.setattr(module, "TOKENS_AT_ONCE", at_once)
        torch.manual_seed(0)
        layer = FeedForward(8).to(dtype)
        return [layer(torch.randn(shape, dtype=torch.float64).to(dtype))]

    same_function(lambda dtype: run(dtype, 100), lambda dtype: run(dtype, 3))


def test_feed_forward_refuses_another_activation():
    with pytest.raises(ValueError, match=r"activation must be one of 'gelu', .*, got .*='mish'"):
        FeedForward(8, activation="mish")


def test_feed_forward_refuses_a_size_that_is_not_positive():
    with pytest.raises(ValueError, match=r"d_ff must be positive, got d_ff=0"):
        FeedForward(8, 0)


def kept_for_backward(layer, x):
    """Count the numbers that autograd keeps, and give the gradients."""
    kept = {}

    def keep(y):
        kept[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
        return y

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda y: y):
        out = layer(x)
    return sum(kept.values()), [out, *torch.autograd.grad(out.sum(), list(layer.parameters()))]


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_recomputed_feed_forward_has_the_same_bits_and_keeps_less(activation):
    torch.manual_seed(0)
    plain = FeedForward(8, 64, activation=activation)
    frugal = FeedForward(8, 64, activation=activation, recompute=True)
    frugal.load_state_dict(plain.state_dict())
    x = torch.randn(1000, 8, requires_grad=True)
    much, expected = kept_for_backward(plain, x)
    little, found = kept_for_backward(frugal, x)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert little <= x.nbytes
    assert much >= 64 * x.shape[0] * 4
    with torch.no_grad():
        assert torch.equal(frugal(x), plain(x))


def test_recomputed_feed_forward_has_second_derivatives():
    layer = FeedForward(2, 3, recompute=True).double()
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (x,))
