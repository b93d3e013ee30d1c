"""Plans, packed batches and attention over them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from stabletx import attention
from stabletx.functional.packed import packed_attention
from stabletx.layers import ClassificationHead
from stabletx.masks import Mask
from stabletx.models import Encoder, TransformerConfig
from stabletx.packing import Packed, Plan


@st.composite
def keeps(draw):
    """Draw any padding: right, left, holed, none, all, and batches without rows or columns."""
    b, n = draw(st.integers(0, 6), label="b"), draw(st.integers(0, 7), label="n")
    rows = st.lists(st.booleans(), min_size=n, max_size=n)
    kept = draw(st.lists(rows, min_size=b, max_size=b), label="keep")
    return torch.tensor(kept, dtype=torch.bool).view(b, n)


@given(keep=keeps())
def test_plan_of_padding_takes_every_real_token_and_puts_it_back(keep):
    x = torch.arange(1.0, keep.numel() * 2 + 1).view(*keep.shape, 2)
    plan = Plan.of_padding(keep)
    packed = plan.pack(x)
    assert packed.shape == (keep.sum(), 2)
    assert torch.equal(plan.unpack(packed), torch.where(keep[..., None], x, 0.0))


@given(keep=keeps())
def test_plan_counts_positions_within_a_sequence(keep):
    plan = Plan.of_padding(keep)
    assert torch.equal(plan.positions, plan.pack(keep.cumsum(1) - 1))


@given(keep=keeps())
def test_plan_orders_sequences_by_length_in_runs(keep):
    plan = Plan.of_padding(keep)
    lengths = [run.length for run in plan.runs for _ in range(run.n_rows)]
    assert lengths == sorted(keep.sum(1).tolist(), reverse=True)
    assert len({run.length for run in plan.runs}) == len(plan.runs)
    assert [lengths[place] for place in plan.rank.tolist()] == keep.sum(1).tolist()
    starts = torch.tensor([0, *lengths]).cumsum(0)
    assert plan.cumulative_lengths().tolist() == starts.tolist()
    assert plan.max_length == max(lengths, default=0)
    for run in plan.runs:
        assert run.start in starts.tolist()


@given(keep=keeps())
def test_plan_of_lengths_is_that_of_padding(keep):
    by_padding, by_lengths = Plan.of_padding(keep), Plan.of_lengths(keep.sum(1))
    assert by_padding.runs == by_lengths.runs
    assert torch.equal(by_padding.positions, by_lengths.positions)
    tokens = torch.arange(keep.numel()).view(keep.shape)
    assert torch.equal(by_padding.pack(tokens), by_lengths.pack(tokens[keep]))
    assert torch.equal(by_lengths.unpack(by_lengths.pack(tokens[keep])), tokens[keep])


def test_plan_leads_gradients_to_real_tokens_alone():
    keep = torch.tensor([[True, False, True], [False, False, False]])
    plan = Plan.of_padding(keep)
    x = torch.ones(2, 3, 1, requires_grad=True)
    plan.unpack(plan.pack(x) * 3).sum().backward()
    assert torch.equal(x.grad[..., 0], 3.0 * keep)


def test_packed_says_what_it_holds():
    packed = Packed(torch.zeros(3, 4), torch.tensor([1, 0, 2]))
    assert repr(packed) == "Packed(tokens of shape (3, 4), lengths [1, 0, 2])"


@pytest.mark.parametrize(
    ("lengths", "error", "match"),
    [
        (torch.tensor([1, 1]), ValueError, "sum to the number of tokens, 3, got .* sum 2"),
        (torch.tensor([4]), ValueError, "sum to the number of tokens, 3, got .* sum 4"),
        (torch.tensor([4, -1]), ValueError, "at least 0, got lengths=-1"),
        (torch.tensor([3.0]), TypeError, "hold integers, got lengths=torch.float32"),
        (torch.tensor([[3]]), ValueError, r"have 1 axes \(b\), got .*\(1, 1\)"),
        (torch.empty(1, dtype=torch.int64, device="meta"), ValueError, "on the CPU, got .* meta"),
    ],
)
def test_packed_refuses_lengths_that_do_not_divide_up_the_tokens(lengths, error, match):
    with pytest.raises(error, match=match):
        Packed(torch.zeros(3), lengths)


@pytest.mark.parametrize("length", [1, 3, -1])
def test_lengths_that_were_written_to_are_refused(length):
    tokens, lengths = torch.zeros(4, dtype=torch.int64), torch.tensor([2, 2])
    encoder = Encoder(TransformerConfig(50, 16, 1, 4))
    head = ClassificationHead(16, 3)
    ids, vectors = Packed(tokens, lengths), Packed(torch.zeros(4, 16), lengths)
    lengths[1] = length
    for layer, packed in ((encoder, ids), (head, vectors)):
        with pytest.raises(ValueError, match="lengths must"):
            layer(packed)


def heads(n_tokens, dtype=torch.float64, h=4, g=2, d=4):
    generator = torch.Generator().manual_seed(0)
    shapes = [(n_tokens, n, d) for n in (h, g, g)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("longest", [3, 130])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_packed_attention_is_that_of_each_sequence_alone(is_causal, longest, dtype):
    lengths = [0, 3, 1, longest, 0, 2]
    plan = Plan.of_lengths(torch.tensor(lengths))
    inputs = [x.requires_grad_() for x in heads(sum(lengths), dtype)]
    together = plan.unpack(packed_attention(*map(plan.pack, inputs), plan, is_causal=is_causal))
    mask = Mask.causal() if is_causal else None
    parts, start = [], 0
    for n in lengths:
        q, k, v = (x[start : start + n].transpose(0, 1)[None] for x in inputs)
        parts.append(attention(q, k, v, mask=mask)[0].transpose(0, 1))
        start += n
    alone = torch.cat(parts)
    # One head of one sequence is one unit of the kernel's work, whatever lies beside it.
    assert torch.equal(together, alone)
    grads = [torch.autograd.grad(out.square().sum(), inputs) for out in (together, alone)]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("lengths", [[40, 30, 30], [6, 5]])
def test_autocast_changes_no_bit_of_packed_attention(lengths):
    plan = Plan.of_lengths(torch.tensor(lengths))
    q, k, v = torch.randn(3, sum(lengths), 4, 32)
    plain = packed_attention(q, k, v, plan)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(packed_attention(q, k, v, plan), plain)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 2.0**100])
@pytest.mark.parametrize("lengths", [[3, 3], [3, 2]])
def test_packed_attention_keeps_what_a_sequence_holds_to_itself(value, lengths):
    plan = Plan.of_lengths(torch.tensor(lengths))
    q, k, v = heads(sum(lengths), torch.float32)
    clean = packed_attention(q, k, v, plan)
    q[4] = k[4] = value
    other = packed_attention(q, k, v, plan)
    assert torch.equal(other[:3], clean[:3])
    assert not torch.equal(other[3:], clean[3:])
    if value == 2.0**100:  # the product of two such numbers is beyond float32
        assert other.isfinite().all()
    else:
        assert other[3:].isnan().all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_attention_has_right_derivatives_of_both_orders(is_causal):
    plan = Plan.of_lengths(torch.tensor([2, 1, 2]))
    inputs = [x.requires_grad_() for x in heads(5, h=2, g=1, d=2)]

    def run(*inputs):
        return packed_attention(*inputs, plan, is_causal=is_causal)

    assert gradcheck(run, inputs, check_forward_ad=True)
    assert gradgradcheck(run, inputs)


def test_packed_attention_takes_a_scale():
    plan = Plan.of_lengths(torch.tensor([2, 1, 2]))
    q, k, v = heads(5)
    by_scale = packed_attention(q, k, v, plan, scale=2.0)
    assert torch.equal(by_scale, packed_attention(4 * q, k, v, plan, scale=0.5))


@pytest.mark.parametrize("length", [2, 300])  # the longer is cut into tiles
def test_packed_dropout_drops_its_share_and_repeats_with_a_seed(length):
    plan = Plan.of_lengths(torch.full((4,), length))
    zero = torch.zeros(4 * length, 16, 1)
    options = {"dropout_p": 0.25, "training": True}
    torch.manual_seed(0)
    v = torch.ones_like(zero, requires_grad=True)
    out = packed_attention(zero, zero, v, plan, **options)
    (grad,) = torch.autograd.grad(out.sum(), v)
    torch.manual_seed(0)
    assert torch.equal(packed_attention(zero, zero, v, plan, **options), out)
    spread = (0.25 / 0.75 / out.numel() / length) ** 0.5  # of the mean of all weights
    assert abs(out.mean() - 1) < 5 * spread
    assert out.std() > 0
    # What a weight carries forward it carries back, each sum of ``length`` terms rounded.
    assert (grad.sum() - out.sum()).abs() <= length * torch.finfo(torch.float32).eps * out.sum()
    still = packed_attention(zero, zero, v, plan, dropout_p=0.25, training=False)
    assert torch.equal(still, torch.ones_like(v))


def test_packed_attention_asks_for_the_mode_where_it_may_drop():
    plan = Plan.of_lengths(torch.tensor([1]))
    with pytest.raises(ValueError, match="training must be True or False where dropout_p > 0"):
        packed_attention(*heads(1), plan, dropout_p=0.1)


def test_packed_attention_goes_through_torch_func():
    plan = Plan.of_lengths(torch.tensor([2, 1]))

    def loss(q, k, v):
        return packed_attention(q, k, v, plan).square().sum()

    by_func = torch.func.grad(loss)(*heads(3))
    exact, rounded = (
        torch.autograd.grad(loss(q.requires_grad_(), k, v), q)[0]
        for q, k, v in (heads(3), heads(3, torch.float32))
    )
    # Two ways in float64 differ by less than float32 rounds.
    assert (by_func - exact).abs().max() <= (rounded - exact).abs().max()


def test_packed_attention_refuses_other_tokens_than_the_plan_has():
    plan = Plan.of_lengths(torch.tensor([2]))
    with pytest.raises(ValueError, match=r"number of tokens"):
        packed_attention(*heads(3), plan)


def test_packed_attention_refuses_a_bias_for_each_sequence():
    plan = Plan.of_lengths(torch.tensor([3, 3, 2, 2]))  # runs of two: a bias for two would fit
    for n in (2, 4):
        with pytest.raises(ValueError, match=rf"bias must have a first axis of size 1 .*\({n}, 4,"):
            packed_attention(*heads(10), plan, bias=torch.zeros(n, 4, 3, 3))


def test_packed_attention_of_no_token_is_empty():
    plan = Plan.of_lengths(torch.tensor([0, 0]))
    assert packed_attention(*heads(0), plan).shape == (0, 4, 4)
