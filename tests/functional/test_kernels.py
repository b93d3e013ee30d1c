"""One piece of attention by either way: batched products, or torch's kernel."""

import itertools

import pytest
import torch

from stabletx.functional import _kernels
from stabletx.functional._kernels import (
    How,
    _blocks,
    _is_fresh,
    _settled,
    attend,
    gradients,
    is_aligned,
    takes_products,
)

B, H, T, S, D = 3, 4, 5, 6, 8


@pytest.mark.parametrize(("threads", "pairs"), [(1, 2**14), (2, 2**16), (8, 2**16)])
def test_short_rows_take_products(monkeypatch, threads, pairs):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for n in (1, 2, 128):
        assert takes_products(n, pairs // n)
        assert takes_products(pairs // n, n)
        assert not takes_products(n, pairs // n + 1)


def piece(g=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, T, D), (B, g, S, D), (B, g, S, D), (B, H, T, D))
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]


def added(kind):
    """Give summands of the scores that block some pairs, in each shape that a piece may have."""
    if kind is None:
        return None
    shape = {"pairs": (1, 1, T, S), "batch": (B, 1, 1, S), "all": (B, H, T, S)}[kind]
    made = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    made = made.masked_fill(made > 1.0, -torch.inf)
    made[..., 0] = 0.0  # so that no row is empty
    return made


def attend_and_back(q, k, v, grad, summands, how, *, keep=True):
    out, kept = attend(q, k, v, summands, how, keep=keep)
    return [out, *gradients(grad, q, k, v, summands, kept, how)]


def by_formula(q, k, v, grad, summands, how):
    """Do the same by plain operations and autograd."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(H // x.shape[1], 1) for x in leaves[1:])
    scores = how.scale * leaves[0] @ keys.mT
    if how.is_causal:
        scores = scores.masked_fill(torch.ones(T, S).triu(1).bool(), -torch.inf)
    if summands is not None:
        scores = scores + summands
    out = scores.softmax(-1) @ values
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


EVERY = list(itertools.product([None, "pairs", "batch", "all"], [1, 2, 4], [False, True]))


@pytest.fixture(params=["products", "kernel", "one batch row at once", "two"])
def way(request, monkeypatch):
    """Take each of the ways, however long the rows are."""
    monkeypatch.setattr(
        _kernels, "takes_products", lambda *sizes: request.param != "kernel" and sizes == (T, S)
    )
    rows = {"one batch row at once": 1, "two": 2}.get(request.param)
    if rows is not None:
        monkeypatch.setattr(_kernels, "AT_ONCE", (rows * 8 + 7) * H * T * S)
    return request.param


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("kind", "g", "is_causal"), EVERY)
def test_every_way_is_the_formula_forward_and_backward(way, kind, g, is_causal):
    q, k, v, grad = piece(g)
    how = How(0.5, is_causal)
    found = attend_and_back(q, k, v, grad, added(kind), how)
    for a, b in zip(found, by_formula(q, k, v, grad, added(kind), how), strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b)
    alone = attend(q, k, v, added(kind), how, keep=False)
    assert alone[1] == ()
    assert torch.equal(alone[0], found[0])


def test_what_is_kept_is_of_every_row_or_of_every_pair(way):
    q, k, v, _ = piece()
    kept = attend(q, k, v, None, How(0.5), keep=True)[1]
    shapes = [(B, H, T, D), (B, H, T)] if way == "kernel" else [(B, H, T, S)]
    assert [tuple(x.shape) for x in kept] == shapes


def test_autocast_changes_no_bit_of_any_way(way):
    q, k, v, grad = piece(dtype=torch.float32)
    summands = added("all").float()

    def run():
        out = torch.zeros(B, H, T, D)
        attend(q, k, v, summands, How(0.5), keep=True, out=out)
        return [out, *attend_and_back(q, k, v, grad, summands, How(0.5))]

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, plain, run()))


def test_a_row_that_sees_nothing_gives_0_and_passes_no_gradient_through_products():
    q, k, v, grad = piece()
    summands = added("pairs")
    summands[:, :, 2] = -torch.inf
    out, *found = attend_and_back(q, k, v, grad, summands, How(0.5))
    assert not out[:, :, 2].any()
    assert not found[0][:, :, 2].any()
    one_key = attend(q, k[:, :, :1], v[:, :, :1], summands[..., :1], How(0.5), keep=False)[0]
    assert one_key.isfinite().all()
    assert not one_key[:, :, 2].any()
    rest = [0, 1, 3, 4]
    q, grad, summands = (x[:, :, rest] for x in (q, grad, summands))
    _, dq, dk, dv = attend_and_back(q, k, v, grad, summands, How(0.5))
    for a, b in ((found[0][:, :, rest], dq), (found[1], dk), (found[2], dv)):
        assert torch.allclose(a, b)


def test_batch_rows_have_the_same_bits_however_many_are_made_together(way):
    tensors = piece(dtype=torch.float32)
    found = attend_and_back(*tensors, None, How(0.5))
    for i in range(B):
        alone = attend_and_back(*(x[i : i + 1] for x in tensors), None, How(0.5))
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(found, alone, strict=True))


@pytest.mark.parametrize("layout", ["fresh", "wider", "heads last", "float32"])
def test_a_target_is_written_whatever_its_layout(way, layout):
    q, k, v, _ = piece()
    target = {
        "fresh": torch.empty(B, H, T, D, dtype=torch.float64),
        "wider": torch.empty(B, H, T + 1, D + 3, dtype=torch.float64)[:, :, 1:, 3:],
        "heads last": torch.empty(B, T, H, D, dtype=torch.float64).transpose(1, 2),
        "float32": torch.empty(B, H, T, D),
    }[layout]
    out, _ = attend(q, k, v, None, How(0.5), keep=False, out=target)
    assert out is target
    assert torch.equal(target, attend(q, k, v, None, How(0.5), keep=False)[0].to(target.dtype))


@pytest.mark.parametrize("axes", [(0, 2, 1, 3), (1, 0, 2, 3), (0, 1, 3, 2), (3, 2, 1, 0)])
def test_the_layout_in_memory_moves_no_bit(way, axes):
    tensors = piece(dtype=torch.float32)
    expected = attend_and_back(*tensors, None, How(0.3))
    back = [axes.index(i) for i in range(4)]
    laid_out = [x.permute(axes).contiguous().permute(back) for x in tensors]
    found = attend_and_back(*laid_out, None, How(0.3))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("g", [1, 4])
def test_dropped_weights_are_dropped_in_the_gradients_too(way, g):
    q, k, v, grad = piece(g)
    how = How(0.5, dropout_p=0.5)
    torch.manual_seed(0)
    out, kept = attend(q, k, v, None, how, keep=True)
    torch.manual_seed(0)
    assert torch.equal(attend(q, k, v, None, how, keep=False)[0], out)
    weights, left = kept
    assert left.dtype == torch.bool
    assert 0 < left.sum() < left.numel()
    used = weights * left * 2
    assert torch.allclose(out, used @ v.repeat_interleave(H // g, 1))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(H // g, 1) for x in leaves[1:])
    formula = ((0.5 * leaves[0] @ keys.mT).softmax(-1) * left * 2) @ values
    expected = torch.autograd.grad(formula, leaves, grad)
    for a, b in zip(gradients(grad, q, k, v, None, kept, how), expected, strict=True):
        assert torch.allclose(a, b)


def test_rows_are_aligned_where_each_begins_with_a_cache_line():
    memory = torch.empty(4096)
    start = (-memory.data_ptr() % 64) // 4
    at = memory[start:]
    for size, strides, offset, aligned in [
        ((2, 3, 16), (48, 16, 1), 0, True),
        ((2, 3, 16), (96, 32, 1), 0, True),
        ((2, 3, 16), (96, 32, 1), 16, True),
        ((2, 3, 16), (96, 32, 1), 8, False),
        ((2, 3, 8), (96, 32, 1), 0, False),
        ((2, 3, 16), (96, 24, 1), 0, False),
        ((2, 3, 16), (72, 16, 1), 0, False),
        ((2, 3, 16), (48, 16, 2), 0, False),
        ((2, 16, 16), (256, 1, 16), 0, False),
    ]:
        view = at[offset:].as_strided(size, strides)
        assert is_aligned(view) == aligned, (size, strides, offset)


def test_what_is_neither_aligned_nor_fresh_is_copied_as_memory_of_its_own():
    fresh = torch.randn(2, 3, 5, 7)
    aligned = torch.randn(2, 5, 3, 16).transpose(1, 2)
    for x in (fresh, aligned):
        assert _settled(x) is x
    for x in (fresh[:, :, 1:], fresh.flatten()[1:].view(11, 19), fresh.mT, aligned[..., 1:]):
        copy = _settled(x)
        assert copy is not x
        assert torch.equal(copy, x)
        assert copy.is_contiguous()
        assert _is_fresh(copy)
        assert not _is_fresh(x)


def test_batch_rows_are_made_together_as_far_as_their_weights_fit(monkeypatch):
    q, weights = piece()[0], H * T * S * 8  # bytes of a batch row
    for at_once, cuts in (
        (1, [(0, 1), (1, 2), (2, 3)]),
        (2 * weights - 1, [(0, 1), (1, 2), (2, 3)]),
        (2 * weights, [(0, 2), (2, 3)]),
        (9 * weights, [(0, 3)]),
    ):
        monkeypatch.setattr(_kernels, "AT_ONCE", at_once)
        assert [(x.start, x.stop) for x in _blocks(q, S)] == cuts
