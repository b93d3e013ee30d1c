"""Float64 attention near the largest float is the same attention, whatever the magnitudes."""

import re

import pytest
import torch

from stabletx import Mask
from stabletx.functional._extended import ROOM, Scaled, extended, times_power
from stabletx.functional._problem import checked_problem
from stabletx.testing.cases import AttentionCase
from stabletx.testing.tolerances import gamma, unit_roundoff
from tests.ways import METHODS, attention, attention_details

LARGEST = torch.finfo(torch.float64).max
OPTIONS = [
    {},
    {"mask": "causal&padding_right", "shape": (2, 4, 2, 5, 7, 4, 3)},
    {"mask": "empty_rows", "sinks": True},
    {"bias": "gaussian", "softcap": 5.0, "sinks": True, "mask": "random"},
    {"bias": "blocking", "scale": 1.0},
    {"bias": "alibi", "sinks": True, "scale": 0.05},
    {"shape": (1, 2, 1, 3, 0, 4, 3)},
    {"shape": (1, 2, 1, 3, 0, 4, 3), "sinks": True},
    {"shape": (1, 2, 1, 0, 3, 4, 3)},
    {"shape": (1, 6, 3, 7, 1, 8, 8), "sinks": True},
]


FAMILIES = ["gaussian", "tied", "huge_values", "huge_keys", "dtype_max"]
CASES = [(family, options) for family in FAMILIES for options in OPTIONS]


@pytest.mark.parametrize(("family", "options"), CASES, ids=str)
def test_extended_attention_is_inside_the_bound_at_every_magnitude(family, options):
    case = AttentionCase.build(
        family=family, seed=3, dtype=torch.float64, **{"shape": (2, 4, 2, 5, 6, 4, 3), **options}
    )
    names = [name for name in ("q", "k", "v", "bias", "sinks") if getattr(case, name) is not None]
    leaves = {name: getattr(case, name).detach().requires_grad_() for name in names}
    q, k, v = (leaves[name] for name in "qkv")
    extras = [leaves.get("bias"), case.scale, case.softcap, leaves.get("sinks")]
    problem = checked_problem(q, k, v, case.mask, *extras, 0.0, None)
    out, lse, top, entropy, weights = extended(problem, problem.sight().dense())
    grads = torch.autograd.grad(out, list(leaves.values()), case.grad_out)

    judged, exact = case.judged(), case.reference()
    found = {"out": out.detach(), **dict(zip((f"d{name}" for name in names), grads, strict=True))}
    right = {"out": judged.out, **judged.gradients._asdict()}
    for name, actual in found.items():
        held = right[name].isfinite()
        bound = getattr(judged.bound, name)[held]
        assert actual.shape == right[name].shape
        assert ((actual[held] - right[name][held]).abs() <= bound).all(), name
    for actual, expected in ((lse, exact.lse), (top, exact.max_score), (entropy, exact.entropy)):
        assert torch.allclose(actual.detach(), expected, equal_nan=True)
    assert torch.allclose(weights, exact.weights)
    assert not top.requires_grad
    assert not entropy.requires_grad


def test_extended_lse_has_the_weights_as_its_gradient():
    case = AttentionCase.build(shape=(2, 4, 2, 5, 6, 4, 3), dtype=torch.float64, bias="gaussian")
    bias = case.bias.clone().requires_grad_()
    problem = checked_problem(
        case.q, case.k, case.v, None, bias, None, None, None, 0.0, None
    )  # fmt: skip
    lse = extended(problem, None)[1]
    (grad,) = torch.autograd.grad(lse.sum(), bias)
    assert torch.allclose(grad, case.reference().weights.sum_to_size(bias.shape))


@pytest.mark.parametrize("method", METHODS)
def test_the_largest_numbers_of_another_row_cost_a_row_nothing(method):
    # Beside what the other queries meet, 2**2000 both ways, the numbers of the first are nothing.
    large = 2.0**1000
    q, k, v, grad_out = (
        torch.tensor(x, dtype=torch.float64)[None, None, :, None]
        for x in (
            [large, 1 / large, large],
            [1 / large, 2 / large, large, 2 * large],
            [1.0, 2.0, 1.0, large],
            [1.0, 1.0, large],
        )
    )
    allowed = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    mask = Mask.dense(allowed[None, None])
    found = run(q, k, v, mask, grad_out, method)
    alone = run(q[:, :, :1], k[:, :, :2], v[:, :, :2], None, grad_out[:, :, :1], method)
    assert torch.equal(found[0][:, :, :1], alone[0])
    assert torch.equal(found[1][:, :, :1], alone[1])
    assert found[0][0, 0, 2] == large


def run(q, k, v, mask, grad_out, method):
    """Attend; give the output and the gradient of q."""
    q = q.clone().requires_grad_()
    out = attention(q, k, v, mask=mask, method=method, scale=1.0)
    return out.detach(), torch.autograd.grad(out, q, grad_out)[0]


WITH_BIAS = {"shape": (2, 4, 2, 5, 7, 4, 3), "dtype": torch.float64, "bias": "gaussian"}


def answers(case, powers, batch=slice(None)):
    """Give out and all gradients, with (q, k, v, grad_out) times powers of two."""
    tensors = (case.q, case.k, case.v, case.grad_out)
    q, k, v, grad_out = (
        (x * 2.0 ** torch.tensor(p, dtype=torch.float64).view(-1, 1, 1, 1))[batch]
        for x, p in zip(tensors, powers, strict=True)
    )
    bias = case.bias[:, :1, :1].expand(2, -1, -1, -1)[batch]
    leaves = [x.detach().requires_grad_() for x in (q, k, v, bias)]
    out = attention(*leaves[:3], bias=leaves[3], mask=Mask.causal(), method="exact")
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def test_powers_of_two_scale_out_exactly_beyond_the_room():
    case = AttentionCase.build(**WITH_BIAS)
    near = answers(case, ([300], [-300], [0], [260]))
    far = answers(case, ([400], [-400], [50], [330]))
    shifts = (50, 120 - 100, 120 + 100, 70, 120)  # of out, dq, dk, dv and the bias's gradient
    for a, b, shift in zip(near, far, shifts, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a * 2.0**shift, b)


def test_the_largest_numbers_of_another_batch_row_move_no_bit():
    case = AttentionCase.build(**WITH_BIAS)
    powers = ([260, 1000], [-260, -1000], [-100, 1000], [-650, 1000])
    together, alone = answers(case, powers), answers(case, powers, slice(0, 1))
    for a, b in zip(together, alone, strict=True):
        assert b.abs().amax(-1).gt(0).any()
        assert torch.equal(a[:1], b)


@pytest.mark.parametrize("n_keys", range(1, 30))
def test_the_mean_of_the_largest_float_is_the_largest_float(n_keys):
    q = k = torch.zeros(1, 1, n_keys, 1, dtype=torch.float64)
    v = torch.full((1, 1, n_keys, 2), LARGEST, dtype=torch.float64)
    v[..., 1] *= -1
    out = attention(q, k, v, method="exact")
    assert out.isfinite().all()
    assert torch.equal(out[..., 0], -out[..., 1])
    assert (out[..., 0] >= LARGEST * (1 - gamma(n_keys, unit_roundoff(torch.float64)))).all()


@pytest.mark.parametrize("method", ["auto", "exact"])
def test_what_has_no_meaning_near_the_largest_float_is_refused(method):
    q = torch.full((1, 1, 1, 1), ROOM * 2, dtype=torch.float64, requires_grad=True)
    text = (
        "dropout_p must be 0 where float64 inputs exceed 2**250, got dropout_p=0.5. "
        "Scale the inputs down."
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(text)}$"):
        attention(q, q, q, dropout_p=0.5, training=True, method=method)
    text = (
        "create_graph must be False where float64 inputs exceed 2**250, got create_graph=True. "
        "Scale the inputs down."
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(text)}$"):
        torch.autograd.grad(attention(q, q, q, method=method), q, create_graph=True)


def test_weights_near_the_largest_float_refuse_a_gradient_that_nobody_computes():
    q = torch.ones(1, 1, 2, 1, dtype=torch.float64, requires_grad=True)
    v = torch.tensor([1.0, ROOM * 2], dtype=torch.float64)[None, None, :, None]
    found = attention_details(q, q, v, mask=Mask.causal(), weights=True)
    assert found.out.requires_grad
    torch.autograd.grad(found.out.sum(), q, retain_graph=True)
    text = (
        "weights must be left out of the loss where float64 inputs exceed 2**250, got "
        "weights=a gradient. Scale the inputs down."
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(text)}$"):
        torch.autograd.grad(found.weights[..., 0].sum(), q)


def test_gradients_of_output_and_lse_add_up_where_both_are_huge():
    case = AttentionCase.build(shape=(2, 4, 2, 5, 6, 4, 3), dtype=torch.float64, bias="gaussian")
    bias, large = case.bias.clone().requires_grad_(), 2.0**600
    problem = checked_problem(
        case.q, case.k, case.v * large, None, bias, None, None, None, 0.0, None
    )  # fmt: skip
    parts = extended(problem, None)[:2]
    upstream = (case.grad_out, torch.full_like(parts[1], large))
    apart = [
        torch.autograd.grad(part, bias, up, retain_graph=True)[0]
        for part, up in zip(parts, upstream, strict=True)
    ]
    (together,) = torch.autograd.grad(parts, bias, upstream)
    assert torch.allclose(together, sum(apart))


def test_times_power_reaches_every_float_without_leaving_the_range():
    tiny = torch.tensor([2.0**-1074, 1.5, -LARGEST, 0.0], dtype=torch.float64)
    power = torch.tensor([2097, -1074, -2097, 5000])
    expected = torch.tensor([2.0**1023, 2.0**-1073, -(2.0**-1073), 0.0], dtype=torch.float64)
    assert torch.equal(times_power(tiny, power), expected)
    assert torch.equal(times_power(tiny, torch.zeros(4, dtype=torch.int32)), tiny)
    assert times_power(tiny[1], torch.tensor(4999)) == torch.inf


def test_rows_beyond_the_room_are_brought_near_one_and_others_left_alone():
    rows = [[3.0, -ROOM, 1.0], [0.0, ROOM * 2, -LARGEST], [0.0, 0.0, 0.0]]
    x = torch.tensor(rows, dtype=torch.float64)
    scaled = Scaled.rows(x)
    assert scaled.power.flatten().tolist() == [0, 1024, 0]
    assert torch.equal(scaled.x[[0, 2]], x[[0, 2]])
    assert scaled.x[1].abs().max() == LARGEST / 2.0**1000 / 2.0**24
    assert torch.equal(scaled.value(), x)
    assert Scaled.rows(x[None, :, :0]).power.tolist() == [[[0], [0], [0]]]


def test_levelled_lines_share_one_power_and_keep_their_numbers():
    x = torch.tensor([[1.0, 2.0**30], [0.0, 0.75], [0.0, 0.0]], dtype=torch.float64)
    power = torch.tensor([[900, 10], [3, 600], [0, 700]])
    level = Scaled(x, power).levelled(-1)
    assert level.power.tolist() == [[401], [100], [0]]
    assert torch.equal(level.value(), Scaled(x, power).value())
    assert level.x.abs().max() < 2.0**501
    assert Scaled(x[:0], power[:0]).levelled(-1).power.shape == ()
