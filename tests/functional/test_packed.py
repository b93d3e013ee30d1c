"""What packed attention is given, it takes to every sequence; what does not fit, it refuses."""

import re

import pytest
import torch

from stabletx import Mask, attention
from stabletx.functional import packed as module
from stabletx.functional._kernels import PAIRS, How
from stabletx.functional.fused import SPLIT_ROWS
from stabletx.functional.packed import packed_attention
from stabletx.packing import Plan

LENGTHS = [3, 1, 4, 3]
PLAN = Plan.of_lengths(torch.tensor(LENGTHS))


def heads(g=2, d=4, e=4):
    generator = torch.Generator().manual_seed(0)
    n = PLAN.n_tokens
    shapes = ((n, 4, d), (n, g, d), (n, g, e))
    return [torch.randn(x, generator=generator, dtype=torch.float64) for x in shapes]


def each_alone(q, k, v, *, is_causal=False, mask=None, bias=None, scale=None):
    rule = mask
    if is_causal:
        rule = Mask.causal() if mask is None else Mask.causal() & mask
    outs = []
    for cut in (slice(0, 4), slice(4, 7), slice(7, 10), slice(10, 11)):  # longest first
        n = cut.stop - cut.start
        parts = [x[cut].transpose(0, 1)[None] for x in (q, k, v)]
        own = None if bias is None else bias[:, :, :n, :n]
        out = attention(*parts, mask=rule, bias=own, scale=scale, method="exact")
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


BIAS = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1)).double()
OPTIONS = [
    {},
    {"is_causal": True},
    {"mask": Mask.window(1, 0, 0)},
    {"mask": Mask.window(1, 1, 0), "is_causal": True},
    {"bias": BIAS},
    {"bias": BIAS[:, :1], "mask": Mask.causal(), "scale": 0.3},
    {"scale": 0.3},
    {"scale": 0.3, "is_causal": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda x: "+".join(x) or "plain")
@pytest.mark.parametrize("e", [4, 3])
@pytest.mark.parametrize("method", ["auto", "tiled", "exact"])
def test_packed_attention_takes_its_options_to_every_sequence(options, e, method):
    leaves = [x.requires_grad_() for x in heads(e=e)]
    found = packed_attention(*leaves, PLAN, method=method, **options)
    expected = each_alone(*leaves, **options)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected)
    push = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).double()
    pairs = (torch.autograd.grad(x, leaves, push) for x in (found, expected))
    for a, b in zip(*pairs, strict=True):
        assert torch.allclose(a, b)


def test_a_method_that_cannot_is_not_exchanged_for_another():
    q, k, v = heads(e=3)
    with pytest.raises(ValueError, match="method='fused' with values of another width"):
        packed_attention(q, k, v, PLAN, method="fused")


@pytest.mark.parametrize("method", ["auto", "exact"])
def test_weights_are_dropped_while_training_alone(method):
    q, k, v = heads()
    plain = packed_attention(q, k, v, PLAN, method=method)
    options = {"dropout_p": 0.5, "method": method}
    assert torch.equal(packed_attention(q, k, v, PLAN, training=False, **options), plain)
    assert not torch.allclose(packed_attention(q, k, v, PLAN, training=True, **options), plain)


@pytest.mark.parametrize(
    ("place", "change", "text"),
    [
        (0, lambda x: x[0], "q must have 3 axes (n, h, d), got q=a tensor of shape (4, 4)."),
        (1, lambda x: x[0], "k must have 3 axes (n, g, d), got k=a tensor of shape (2, 4)."),
        (2, lambda x: x[0], "v must have 3 axes (n, g, e), got v=a tensor of shape (2, 4)."),
        (0, lambda x: x[1:], "q must have the number of tokens of plan, got q with 10 and plan"),
        (1, lambda x: x[1:], "k must have the number of tokens of plan, got k with 10 and plan"),
        (2, lambda x: x[1:], "v must have the number of tokens of plan, got v with 10 and plan"),
    ],
)
def test_what_does_not_fit_the_plan_is_refused(place, change, text):
    tensors = heads()
    tensors[place] = change(tensors[place])
    tail = " with 11." if "tokens" in text else " Split the heads first."
    with pytest.raises(ValueError, match=f"^{re.escape(text + tail)}$"):
        packed_attention(*tensors, PLAN)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"dropout_p": 1.0, "training": True}, ValueError, "dropout_p must be in [0, 1), got "),
        ({"dropout_p": 0.5}, ValueError, "training must be True or False where dropout_p > 0, "),
        ({"training": 1}, TypeError, "training must be None, True or False, got training=1."),
    ],
)
def test_dropout_is_checked_before_anything_else(options, error, text):
    with pytest.raises(error, match=f"^{re.escape(text)}"):
        packed_attention(*heads(), PLAN, **options)


def test_only_what_attention_would_not_cut_is_one_step():
    def fits(longest, is_causal, dropout_p):
        return module._fits_in_one_step(
            Plan.of_lengths(torch.tensor([1, longest])), is_causal, dropout_p
        )

    assert fits(SPLIT_ROWS, True, 0.5)
    assert fits(SPLIT_ROWS + 1, False, 0.0)
    assert not fits(SPLIT_ROWS + 1, True, 0.0)
    longest = int(PAIRS**0.5)
    assert fits(longest, False, 0.5)
    assert not fits(longest + 1, False, 0.5)
    assert fits(longest + 1, False, 0.0)


def test_one_step_is_taken_where_the_kernels_are_safe_for_every_token():
    q, k, v = heads()
    assert module._how(q, k, v, None, True, 0.5) == How(0.5, True, 0.5)
    assert module._how(q, k, v, 0.3, False, 0.0) == How(0.3)
    assert module._how(q, k, v[..., :3], None, False, 0.0) is None
    assert module._how(q * 2.0**100, k, v, None, False, 0.0) is None
    assert module._how(q.to("meta"), k.to("meta"), v.to("meta"), None, False, 0.0) is None
    found = []

    def ask(q):
        found.append(module._how(q, k, v, None, False, 0.0))
        return q

    torch.func.vmap(ask)(q[None])
    assert found == [None]
