"""The promises of attention that are kept to the bit, on every method and dtype."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stabletx import Mask
from stabletx.testing.reference import reference_attention
from tests.ways import METHODS, attention, attention_details

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every_method = pytest.mark.parametrize("method", METHODS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def draw(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def qkv(dtype, b=2, h=4, g=2, t=9, s=9, d=8, e=8):
    return (
        draw(b, h, t, d, dtype=dtype, seed=1),
        draw(b, g, s, d, dtype=dtype, seed=2),
        draw(b, g, s, e, dtype=dtype, seed=3),
    )


def run(q, k, v, grad_out=None, **options):
    """Attend; return the output and the gradients of q, k and v."""
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*inputs, **options)
    grad_out = draw(*out.shape, dtype=out.dtype, seed=4) if grad_out is None else grad_out
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def all_finite(tensors):
    return all(bool(x.isfinite().all()) for x in tensors)


def garbage(dtype):
    top = torch.finfo(dtype).max
    return [math.nan, math.inf, -math.inf, top, -top, min(1e30, top), 1e4]


KEEP = torch.ones(2, 9, dtype=torch.bool)
KEEP[0, 5:] = False
KEEP[1, :3] = False
HOLES = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 0, 1], [0, 1, 0, 1, 1, 1, 1, 1, 0]]).bool()
BLOCKING = {
    "padding": (KEEP, Mask.padding(KEEP)),
    "padding and causal": (KEEP, Mask.padding(KEEP) & Mask.causal()),
    "holes": (HOLES, Mask.padding(HOLES)),
    "holes and causal": (HOLES, Mask.padding(HOLES) & Mask.causal()),
    "dense": (HOLES, Mask.dense(HOLES[:, None, None].expand(2, 1, 9, 9).contiguous())),
    "or": (KEEP, Mask.padding(KEEP) | (Mask.padding(KEEP) & Mask.causal())),
    "window": (HOLES, Mask.padding(HOLES) & Mask.window(2, 2)),
}


@every_method
@every_dtype
@pytest.mark.parametrize("blocking", BLOCKING)
def test_garbage_where_no_query_looks_changes_no_bit(method, dtype, blocking):
    keep, mask = BLOCKING[blocking]
    q, k, v = qkv(dtype)
    clean = run(q, k, v, mask=mask, method=method)
    here = keep[:, None, :, None]
    for value in garbage(dtype):
        junk = torch.full((), value, dtype=dtype)
        spoilt = run(
            q, torch.where(here, k, junk), torch.where(here, v, junk), mask=mask, method=method
        )
        assert same_bits(clean, spoilt), value
        assert not spoilt[2].masked_fill(here, 0.0).any()
        assert not spoilt[3].masked_fill(here, 0.0).any()


@every_dtype
@pytest.mark.parametrize("grad", [False, True])
def test_garbage_beside_a_view_of_wider_memory_changes_no_bit(dtype, grad):
    for n, d in ((9, 7), (64, 16), (64, 64), (100, 33)):

        def inside_wider(x, n=n, d=d):
            wide = torch.zeros(*x.shape[:2], n + 3, d + 5, dtype=dtype)
            wide[:, :, 1 : n + 1, 2 : d + 2] = x
            return wide[:, :, 1 : n + 1, 2 : d + 2].requires_grad_(grad)

        q, k, v = qkv(dtype, t=n, s=n, d=d, e=d)
        junk_k, junk_v = k.clone(), v.clone()
        junk_k[:, :, n // 2 :], junk_v[:, :, n // 2 :] = math.nan, math.inf
        mask = Mask.lengths(torch.tensor([n // 2, n // 2]))
        found = []
        for keys, values in ((k, v), (junk_k, junk_v)):
            heads = [inside_wider(x) for x in (q, keys, values)]
            out = attention(*heads, mask=mask)
            grads = torch.autograd.grad(out, heads, draw_like(out)) if grad else ()
            found.append((out, *grads))
        assert same_bits(*found), (n, d)


@every_method
@every_dtype
def test_garbage_behind_minus_infinity_in_the_bias_changes_no_bit(method, dtype):
    q, k, v = qkv(dtype)
    bias = draw(1, 4, 9, 9, dtype=dtype, seed=5)
    bias[..., 6:] = -math.inf
    clean = run(q, k, v, bias=bias, method=method)
    for value in garbage(dtype):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, 6:], v2[:, :, 6:] = value, value
        assert same_bits(clean, run(q, k2, v2, bias=bias, method=method)), value


@every_method
@every_dtype
def test_garbage_in_a_query_without_keys_changes_no_bit(method, dtype):
    q, k, v = qkv(dtype)
    mask = Mask.dense((torch.arange(9) != 4)[None, None, :, None])
    clean = run(q, k, v, mask=mask, method=method)
    for value in garbage(dtype):
        q2 = q.clone()
        q2[:, :, 4] = value
        spoilt = run(q2, k, v, mask=mask, method=method)
        assert same_bits(clean, spoilt), value
        assert not spoilt[0][:, :, 4].any()
        assert not spoilt[1][:, :, 4].any()


EMPTY = {
    "lengths": Mask.lengths(torch.tensor([0, 9])),
    "causal from the left": Mask.causal(-3),
    "dense": Mask.dense(torch.rand(2, 4, 9, 9, generator=torch.Generator().manual_seed(0)) > 0.8),
    "nothing": Mask.lengths(torch.tensor([0, 0])),
    "left padding and causal": Mask.padding(KEEP) & Mask.causal(),
}


@every_method
@every_dtype
@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("sinks", [False, True])
def test_empty_rows_give_zero_and_pass_no_gradient(method, dtype, empty, sinks):
    mask, (q, k, v) = EMPTY[empty], qkv(dtype)
    options = {"sinks": draw(4, dtype=dtype, seed=6)} if sinks else {}
    blind = ~mask.to_dense(9, 9).expand(2, 4, 9, 9).any(-1)
    grad_out = draw(2, 4, 9, 8, dtype=dtype, seed=4)
    found = run(q, k, v, grad_out, mask=mask, method=method, **options)
    poisoned = grad_out.masked_fill(blind[..., None], math.nan)
    assert same_bits(found, run(q, k, v, poisoned, mask=mask, method=method, **options))
    assert all_finite(found)
    assert not found[0][blind].any()
    assert not found[1][blind].any()
    details = attention_details(q, k, v, mask=mask, weights=method != "tiled", **options)
    assert torch.equal(details.empty_rows, blind.sum(-1))
    if not sinks:
        assert (details.lse[blind] == -math.inf).all()
    if details.weights is not None:
        assert not details.weights[blind].any()


def spoilt_rows(what, e):
    """Say which outputs must be NaN when position 6 of key/value head 1, batch row 0 is bad."""
    bad = torch.zeros(2, 4, 9, e, dtype=torch.bool)
    if what == "q":
        bad[0, 1, 6] = True
    elif what == "k":
        bad[0, 2:, 6:] = True
    else:
        bad[0, 2:, 6:, 2] = True
    return bad


@every_method
@every_dtype
@pytest.mark.parametrize("what", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("banded", [True, False])
def test_nan_reaches_the_rows_that_attend_to_it_and_no_other(method, dtype, what, value, banded):
    tensors = dict(zip("qkv", qkv(dtype), strict=True))
    mask = Mask.causal() if banded else Mask.dense(Mask.causal().to_dense(9, 9))
    clean = run(**tensors, mask=mask, method=method)
    tensors[what] = tensors[what].clone()
    tensors[what][0, 1, 6, 2] = value
    spoilt = run(**tensors, mask=mask, method=method)
    bad = spoilt_rows(what, 8)
    assert torch.equal(spoilt[0].isnan(), bad)
    assert torch.equal(spoilt[0][~bad], clean[0][~bad])
    good_rows = ~bad.any(-1)
    assert torch.equal(spoilt[1][good_rows], clean[1][good_rows])
    assert spoilt[1][bad.any(-1)].isnan().any(-1).all()
    assert spoilt[2][1].isfinite().all()
    assert spoilt[3][1].isfinite().all()


@every_method
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_bias_spoils_its_own_rows(method, value):
    q, k, v = qkv(torch.float32)
    bias = torch.zeros(1, 4, 9, 9)
    clean = run(q, k, v, bias=bias, mask=Mask.causal(), method=method)
    bias[0, 1, 3, 2] = value
    bias[0, 2, 3, 5] = value  # blocked by the mask: nobody looks
    spoilt = run(q, k, v, bias=bias, mask=Mask.causal(), method=method)
    bad = torch.zeros(2, 4, 9, dtype=torch.bool)
    bad[:, 1, 3] = True
    assert torch.equal(spoilt[0].isnan().all(-1), bad)
    assert torch.equal(spoilt[0][~bad], clean[0][~bad])


@every_method
@every_dtype
@pytest.mark.parametrize("size", [1.0, 1e4, "largest"])
@pytest.mark.parametrize("n", [9, 140])
def test_a_future_token_moves_no_bit_of_the_past(method, dtype, size, n):
    size = torch.finfo(dtype).max if size == "largest" else size
    q, k, v = qkv(dtype, t=n, s=n)
    clean = run(q, k, v, mask=Mask.causal(), method=method)[0]
    cut = n - 2
    for x in (q, k, v):
        x[:, :, cut:] = torch.sign(x[:, :, cut:]) * size
    moved = run(q, k, v, mask=Mask.causal(), method=method)[0]
    assert torch.equal(moved[:, :, :cut], clean[:, :, :cut])
    assert all_finite([moved]) or dtype == torch.float16


@every_method
@every_dtype
@pytest.mark.parametrize("size", [1.0, 1e4, "largest", math.nan])
def test_another_batch_row_moves_no_bit(method, dtype, size):
    size = torch.finfo(dtype).max if size == "largest" else size
    q, k, v = qkv(dtype)
    clean = run(q, k, v, method=method)
    for x in (q, k, v):
        x[1] = size
    moved = run(q, k, v, method=method)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(clean, moved, strict=True))


@every_method
@every_dtype
def test_another_segment_moves_no_bit(method, dtype):
    ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]]).expand(2, 9)
    q, k, v = qkv(dtype)
    clean = run(q, k, v, mask=Mask.segments(ids), method=method)
    for x in (q, k, v):
        x[:, :, 4:] = torch.finfo(dtype).max
    moved = run(q, k, v, mask=Mask.segments(ids), method=method)
    assert torch.equal(clean[0][:, :, :4], moved[0][:, :, :4])
    assert torch.equal(clean[1][:, :, :4], moved[1][:, :, :4])


@every_method
@every_dtype
@given(data=st.data())
def test_layouts_agree_to_the_bit(method, dtype, data):
    q, k, v = qkv(dtype)
    clean = run(q, k, v, mask=Mask.causal(), method=method)
    layouts = {
        "contiguous": lambda x: x.contiguous(),
        "b t h d in memory": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "d t in memory": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
        "offset": lambda x: torch.cat([x[:, :, :1], x], 2)[:, :, 1:],
    }
    chosen = [data.draw(st.sampled_from(sorted(layouts)), label=name) for name in "qkv"]
    q, k, v = (layouts[how](x) for how, x in zip(chosen, (q, k, v), strict=True))
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*inputs, mask=Mask.causal(), method=method)
    grads = torch.autograd.grad(out, inputs, draw_like(out))
    assert same_bits(clean, [out.detach(), *grads])


def draw_like(out):
    return draw(*out.shape, dtype=out.dtype, seed=4)


@every_method
@every_dtype
def test_expanded_inputs_agree_to_the_bit(method, dtype):
    q, k, v = (x[:1, :1] for x in qkv(dtype))
    q, k, v = (x.expand(2, 3, 9, 8) for x in (q, k, v))
    expanded = attention(q, k, v, method=method)
    assert torch.equal(expanded, attention(*(x.contiguous() for x in (q, k, v)), method=method))


@every_method
@every_dtype
def test_runs_repeat_to_the_bit_with_dropout_too(method, dtype):
    q, k, v = qkv(dtype)
    assert same_bits(run(q, k, v, method=method), run(q, k, v, method=method))
    options = {"method": method, "dropout_p": 0.4, "training": True}
    torch.manual_seed(3)
    first = run(q, k, v, **options)
    torch.manual_seed(3)
    assert same_bits(first, run(q, k, v, **options))
    assert not torch.equal(first[0], run(q, k, v, **options)[0])


@every_method
def test_dropout_is_off_outside_training(method):
    q, k, v = qkv(torch.float32)
    plain = attention(q, k, v, method=method)
    assert torch.equal(attention(q, k, v, method=method, dropout_p=0.9, training=False), plain)
    assert torch.equal(attention(q, k, v, method=method, dropout_p=0.0, training=True), plain)


@every_method
@every_dtype
def test_inputs_are_not_written_to(method, dtype):
    q, k, v = qkv(dtype)
    k[0, 0, 0, 0] = math.nan
    bias, sinks = draw(1, 1, 9, 9, dtype=dtype), draw(4, dtype=dtype)
    before = [x.clone() for x in (q, k, v, bias, sinks)]
    run(q, k, v, bias=bias, sinks=sinks, mask=Mask.causal(), method=method)
    for x, y in zip(before, (q, k, v, bias, sinks), strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


@every_method
@every_dtype
@pytest.mark.parametrize(
    ("b", "t", "s", "d", "e"), [(1, 0, 3, 4, 4), (1, 3, 0, 4, 4), (0, 3, 3, 4, 4), (1, 3, 3, 4, 0)]
)
def test_axes_of_size_zero_are_accepted(method, dtype, b, t, s, d, e):
    q, k, v = qkv(dtype, b=b, t=t, s=s, d=d, e=e)
    found = run(q, k, v, method=method, sinks=draw(4, dtype=dtype))
    assert found[0].shape == (b, 4, t, e)
    assert not any(x.any() for x in found) or s
    details = attention_details(q, k, v, method=method)
    assert details.lse.shape == (b, 4, t)
    assert details.empty_rows.sum() == (0 if s else b * 4 * t)


@every_method
@every_dtype
@pytest.mark.parametrize("s", [1, 2, 4, 5])
def test_a_query_head_reads_its_own_key_head_whatever_the_length(method, dtype, s):
    q, k, v = qkv(dtype, t=3, s=s)
    together = attention(q, k, v, method=method)
    for i in range(4):
        heads = [q[:, i : i + 1], *(x[:, i // 2 : i // 2 + 1] for x in (k, v))]
        assert torch.equal(together[:, i : i + 1], attention(*heads, method=method))


@every_method
@every_dtype
def test_head_dim_zero_gives_equal_weights(method, dtype):
    q, k, v = qkv(dtype, d=0)
    v = torch.arange(9, dtype=dtype)[None, None, :, None].expand(2, 2, 9, 1)
    assert torch.equal(attention(q, k, v, method=method), torch.full((2, 4, 9, 1), 4, dtype=dtype))


@every_dtype
def test_details_agree_with_each_other(dtype):
    q, k, v = qkv(dtype, e=5)
    mask = Mask.causal(-1)
    details = attention_details(q, k, v, mask=mask, weights=True)
    assert details.method == "exact"
    assert details.out.shape == (2, 4, 9, 5)
    assert torch.equal(details.out, attention(q, k, v, mask=mask, method="exact"))
    assert details.lse.dtype == torch.promote_types(dtype, torch.float32)
    tiles = attention_details(q, k, v, mask=mask)
    assert tiles.method == "tiled"
    assert "scores" in tiles.reason
    assert tiles.weights is None
    assert torch.equal(tiles.empty_rows, torch.ones(2, 4, dtype=torch.int64))
    assert torch.equal(details.empty_rows, tiles.empty_rows)


@every_method
def test_details_of_a_row_without_keys_are_empty(method):
    q, k, v = qkv(torch.float32)
    details = attention_details(q, k, v, mask=Mask.lengths(torch.tensor([0, 9])), method=method)
    assert (details.max_score[0] == -math.inf).all()
    assert not details.entropy[0].any()
    assert details.max_score[1].isfinite().all()
    with_sinks = attention_details(
        q, k, v, mask=Mask.lengths(torch.tensor([0, 9])), sinks=torch.arange(4.0), method=method
    )
    assert torch.equal(with_sinks.lse[0], torch.arange(4.0)[:, None].expand(4, 9))


@every_method
@pytest.mark.parametrize("t", [9, 1])
@pytest.mark.parametrize("mask", [None, Mask.causal(-3), Mask.causal(-8), Mask.causal(2)])
@pytest.mark.parametrize("sinks", [None, torch.arange(4.0, dtype=torch.float64)])
@pytest.mark.parametrize("scale", [0.3, 100.0])  # of which the second passes the kernel's limit
def test_details_are_those_of_the_reference(method, t, mask, sinks, scale):
    q, k, v = qkv(torch.float64, t=t)
    allowed = torch.ones(1, 1, t, 9, dtype=torch.bool) if mask is None else mask.to_dense(t, 9)
    options = {"sinks": sinks, "scale": scale}
    found = attention_details(q, k, v, mask=mask, method=method, **options)
    exact = reference_attention(q, k, v, mask=allowed, **options)
    has_key = allowed.any(-1).expand(2, 4, t)
    n_rows = has_key.sum(-1)
    entropy = torch.where(has_key, exact.entropy, 0.0).sum(-1) / n_rows.clamp(min=1)
    top = torch.where(has_key, exact.max_score, -math.inf).amax(-1)
    assert torch.equal(found.empty_rows, t - n_rows)
    pairs = ((found.lse, exact.lse), (found.entropy, entropy), (found.max_score, top))
    for actual, expected in pairs:
        assert actual.shape == expected.shape
        assert torch.allclose(actual, expected)


@every_method
def test_details_without_a_query_are_empty(method):
    q, k, v = qkv(torch.float32, t=0)
    found = attention_details(q, k, v, method=method)
    assert torch.equal(found.max_score, torch.full((2, 4), -math.inf))
    assert torch.equal(found.entropy, torch.zeros(2, 4))
    assert torch.equal(found.empty_rows, torch.zeros(2, 4, dtype=torch.int64))


@every_dtype
def test_the_weights_asked_for_give_the_output(dtype):
    q, k, v = qkv(dtype)
    found = attention_details(q, k, v, mask=Mask.causal(), weights=True)
    assert found.weights.dtype == dtype
    assert found.entropy.dtype == found.max_score.dtype == torch.promote_types(dtype, torch.float32)
    wide = attention_details(q.double(), k.double(), v.double(), mask=Mask.causal(), weights=True)
    assert torch.equal(found.weights, wide.weights.to(dtype))
    assert torch.allclose(wide.weights @ v.double().repeat_interleave(2, 1), wide.out)
