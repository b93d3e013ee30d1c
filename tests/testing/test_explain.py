"""explain_difference names the known mistakes, and calls rounding what is rounding."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from stabletx.testing import AttentionCase, Profile, explain_difference


def plain(q, k, v, *, mask=None, bias=None, scale=None, softcap=None, sinks=None, **change):
    """Attention in the dtype of its inputs, at least float32, with a place for each mistake."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    out_dtype, h, g = q.dtype, q.shape[1], k.shape[1]
    heads = change.get("heads", torch.arange(h) * g // h)
    q, k, v = q.to(dtype), k.to(dtype)[:, heads], v.to(dtype)[:, heads]
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if bias is not None:
        scores = scores + bias.to(dtype)
    if "scores" in change:
        scores = scores.to(change["scores"]).to(dtype)
    if mask is not None:
        blocked = change.get("blocked", -math.inf)
        scores = scores.masked_fill(~mask, blocked)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    top = scores.amax(-1, keepdim=True)
    top = top if change.get("nan") else top.nan_to_num(neginf=0.0)
    weights = (scores - top).exp()
    sums = weights.sum(-1, keepdim=True)
    weights = weights / (sums if change.get("nan") else sums.clamp(min=1e-30))
    weights = weights[..., : k.shape[2]]
    if "weights" in change:
        weights = weights.to(change["weights"]).to(dtype)
    if "dropout" in change:
        weights = F.dropout(weights, change["dropout"])
    return (weights @ v).to(out_dtype)


def case(**arguments):
    arguments = {"shape": (2, 4, 2, 6, 9, 8, 8), "seed": 5, "mask": "random"} | arguments
    return AttentionCase.build(**arguments)


def explain(one, actual, **more):
    return explain_difference(
        actual, one.reference().out, one.q, one.k, one.v, **one.options, **more
    )


def causal(t, s, offset):
    return (torch.arange(s)[None, :] <= torch.arange(t)[:, None] + offset)[None, None]


def first(n, kept):
    return (torch.arange(n) < kept)[None, None, None]


CALLS = {
    "mask_ignored": (case(), lambda c, o: o | {"mask": None}),
    "mask_inverted": (case(), lambda c, o: o | {"mask": ~c.mask}),
    "causal_top_left": (case(mask="causal"), lambda c, o: o | {"mask": causal(6, 9, 0)}),
    "causal_bottom_right": (
        case(mask="causal_top_left"), lambda c, o: o | {"mask": causal(6, 9, 3)}
    ),
    "mask_shifted": (case(mask="causal"), lambda c, o: o | {"mask": causal(6, 9, 4)}),
    "padding_only": (
        case(mask="causal&padding_right", shape=(2, 2, 2, 9, 9, 8, 8)),
        lambda c, o: o | {"mask": c.mask.any(2, keepdim=True)},
    ),
    "mask_of_first_example": (case(), lambda c, o: o | {"mask": c.mask[:1]}),
    "mask_of_first_head": (case(mask="per_head"), lambda c, o: o | {"mask": c.mask[:, :1]}),
    "mask_added_as_number": (case(), lambda c, o: o | {"mask": None, "bias": c.mask.float()}),
    "causal_added": (case(mask="none"), lambda c, o: o | {"mask": causal(6, 9, 0)}),
    "no_scale": (case(), lambda c, o: o | {"scale": 1.0}),
    "scale_by_width": (case(), lambda c, o: o | {"scale": 1 / 8}),
    "scale_ignored": (case(scale=0.7), lambda c, o: o | {"scale": None}),
    "scale_of_model": (case(), lambda c, o: o | {"scale": 32**-0.5}),
    "scale_of_padded": (case(), lambda c, o: o | {"scale": 16**-0.5}),
    "scale_off": (case(), lambda c, o: o | {"scale": 8**-0.5 * 1.0123}),
    "heads_modulo": (case(), lambda c, o: o | {"heads": torch.arange(4) % 2}),
    "heads_first": (case(), lambda c, o: o | {"heads": torch.zeros(4).long()}),
    "last_key_dropped": (case(mask="none"), lambda c, o: o | {"mask": first(9, 8)}),
    "tail_dropped": (
        case(mask="none", shape=(1, 1, 1, 3, 70, 8, 8)),
        lambda c, o: o | {"mask": first(70, 64)},
    ),
    "bias_forgotten": (case(bias="gaussian"), lambda c, o: o | {"bias": None}),
    "bias_negated": (case(bias="gaussian"), lambda c, o: o | {"bias": -c.bias}),
    "bias_scaled": (case(bias="gaussian"), lambda c, o: o | {"bias": c.bias * 8**-0.5}),
    "softcap_forgotten": (case(softcap=1.0), lambda c, o: o | {"softcap": None}),
    "sinks_forgotten": (case(sinks=True), lambda c, o: o | {"sinks": None}),
    "sinks_zero": (case(sinks=True), lambda c, o: o | {"sinks": torch.zeros(4)}),
    "empty_rows_nan": (case(mask="empty_rows"), lambda c, o: o | {"nan": True}),
    "empty_rows_mean": (case(mask="empty_rows"), lambda c, o: o | {"blocked": -1e30}),
    "scores_stored": (case(), lambda c, o: o | {"scores": torch.bfloat16}),
    "weights_stored": (case(), lambda c, o: o | {"weights": torch.bfloat16}),
    "garbage_leak": (case(mask="padding_right", garbage="nan"), lambda c, o: o),
    "dropout": (case(mask="none"), lambda c, o: o | {"dropout": 0.3}),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_explain_names_the_mistake_in_the_call(name):
    torch.manual_seed(0)
    one, change = CALLS[name]
    if name == "dropout":
        one = case(mask="none", shape=(1, 2, 2, 6, 6, 8, 8))
    actual = plain(one.q, one.k, one.v, **change(one, dict(one.options)))
    found = explain(one, actual)
    assert not found.within
    assert found.name == name, found
    assert found.certain or name.endswith("_stored"), found
    assert found.first_place is not None


RESULTS = {
    "zeros": torch.zeros_like,
    "row_shifted": lambda x: x.roll(1, 2),
    "heads_permuted": lambda x: x.flip(1),
    "heads_reshaped": lambda x: x.transpose(1, 2).reshape(x.shape),
    "batch_permuted": lambda x: x.roll(1, 0),
    "constant_factor": lambda x: x * 1.25,
    "unknown": lambda x: x + torch.linspace(0, 1, x.numel()).view(x.shape),
    "shape": lambda x: x.transpose(1, 2),
}


@pytest.mark.parametrize("name", RESULTS)
def test_explain_names_the_mistake_in_the_result(name):
    one = case()
    found = explain(one, RESULTS[name](one.reference().out.float()))
    assert not found.within
    assert found.name == name, found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_explain_calls_rounding_what_is_rounding(dtype):
    one = case(dtype=dtype, mask="causal", family="outlier")
    found = explain(one, plain(one.q, one.k, one.v, **one.options))
    assert found.within
    assert found.name == "rounding"
    assert "expected rounding" in str(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_explain_calls_rounding_a_gap_between_two_rounded_results(dtype):
    """Another batch shape, another order of sums: both sides are rounded, neither is wrong."""
    one = case(dtype=dtype)
    blocks = [
        plain(*(x[i : i + 1] for x in (one.q, one.k, one.v)), mask=one.mask[i : i + 1])
        for i in range(2)
    ]
    fused = (
        F.scaled_dot_product_attention(one.q, one.k, one.v, attn_mask=one.mask, enable_gqa=True)
        if dtype == torch.float32
        else plain(one.q, one.k, one.v, **one.options)
    )
    found = explain_difference(torch.cat(blocks), fused, one.q, one.k, one.v, mask=one.mask)
    assert found.within, found


def test_explain_accepts_what_a_profile_states():
    one = case(dtype=torch.bfloat16)
    actual = plain(one.q, one.k, one.v, weights=torch.bfloat16, **one.options)
    assert explain(one, actual).name == "weights_stored"
    assert explain(one, actual, profile=Profile(weights=torch.bfloat16)).within


def test_explain_blames_the_expected_value_when_that_is_off():
    one = case(mask="causal")
    wrong = plain(one.q, one.k, one.v, mask=causal(6, 9, 0))
    right = plain(one.q, one.k, one.v, **one.options)
    found = explain_difference(right, wrong, one.q, one.k, one.v, **one.options)
    assert found.name == "causal_top_left"
    assert found.cause.startswith("it is the expected value")


def test_explain_names_scores_that_leave_the_range_of_the_dtype():
    one = case(dtype=torch.float16, mask="none", amplitude=8.0)
    q, k = one.q * 100, one.k * 100
    scores = q @ k.repeat_interleave(2, 1).mT
    assert scores.isinf().any()
    actual = (scores / 8**0.5).softmax(-1) @ one.v.repeat_interleave(2, 1)
    found = explain_difference(actual, torch.zeros_like(actual), q, k, one.v)
    assert found.name == "score_overflow"


def test_explain_names_a_swallowed_nan():
    one = case(mask="none")
    q = one.q.clone()
    q[0, 0, 0] = math.nan
    actual = plain(q, one.k, one.v).nan_to_num()
    found = explain_difference(actual, plain(q, one.k, one.v), q, one.k, one.v)
    assert found.name == "nan_swallowed"


def gradients(one, fn):
    q, k, v = (x.clone().requires_grad_() for x in (one.q, one.k, one.v))
    return torch.autograd.grad(fn(q, k, v), (q, k, v), one.grad_out)


@pytest.mark.parametrize("of", ["dq", "dk", "dv"])
def test_explain_names_mistakes_in_gradients(of):
    one = case()
    index = ("dq", "dk", "dv").index(of)
    right = gradients(one, lambda *x: plain(*x, **one.options))[index]
    wrong = gradients(one, lambda *x: plain(*x, **dict(one.options) | {"mask": None}))[index]
    exact = one.gradients()[index]
    common = {"of": of, "grad_out": one.grad_out, **one.options}
    assert explain_difference(right, exact, one.q, one.k, one.v, **common).within
    assert explain_difference(wrong, exact, one.q, one.k, one.v, **common).name == "mask_ignored"
    double = explain_difference(2 * right, exact, one.q, one.k, one.v, **common)
    assert double.name == "constant_factor"


def test_explain_names_a_group_that_is_not_summed():
    one = case()
    wide = gradients(one, lambda q, k, v: plain(q, k, v, **one.options))[2]
    k, v = (x.repeat_interleave(2, 1) for x in (one.k, one.v))
    parts = replace(one, k=k, v=v).gradients().dv
    found = explain_difference(
        parts[:, ::2].float(), wide.double(), one.q, one.k, one.v,
        of="dv", grad_out=one.grad_out, **one.options,
    )  # fmt: skip
    assert found.name == "group_not_summed"


def test_explain_names_weights_rebuilt_from_a_rounded_logsumexp():
    one = case(family="logit_offset", mask="none", seed=2)
    one = replace(one, k=torch.cat([one.k[..., :1] * 2.0**10, one.k[..., 1:]], -1))
    scale = one.scale
    k = one.k.repeat_interleave(2, 1)
    scores = one.q @ k.mT * scale
    lse = (
        scores.amax(-1, keepdim=True)
        + (scores - scores.amax(-1, keepdim=True)).exp().sum(-1, keepdim=True).log()
    )
    weights = (scores - lse).exp()
    dv = (weights.mT @ one.grad_out).view(2, 2, 2, 9, 8).sum(2)
    found = explain_difference(
        dv, one.gradients().dv, one.q, one.k, one.v, of="dv", grad_out=one.grad_out, **one.options
    )
    assert found.name == "weights_from_lse", found


def test_explanation_prints_and_shows_in_a_notebook():
    one = case()
    found = explain(one, plain(one.q, one.k, one.v))
    assert "the mask is ignored" in str(found)
    assert repr(found) == str(found)
    assert "<b" in found._repr_html_()
    assert f"first: {list(found.first_place)}" in found.detail


def test_explain_needs_grad_out_for_a_gradient():
    one = case()
    with pytest.raises(ValueError, match=r"grad_out must be given .* got None"):
        explain_difference(one.q, one.q, one.q, one.k, one.v, of="dq")
