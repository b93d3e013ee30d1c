"""Adapters hand over masks, scales and layouts as each style wants them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stabletx.testing.adapters import arrays, huggingface, mha, sdpa_style
from stabletx.testing.cases import AttentionCase
from stabletx.testing.conformance import check_attention
from stabletx.testing.known import KNOWN, Unavailable, known_attention

F32 = [torch.float32]


def agrees(fn, laws=("agreement", "exact-selection"), **options):
    return check_attention(fn, laws=laws, dtypes=F32, effort="quick", **options)


def test_sdpa_style_agrees_with_and_without_bias():
    report = agrees(
        sdpa_style(F.scaled_dot_product_attention), laws=["agreement", "bias-agreement"]
    )
    assert report.passed, str(report)
    assert report.verdict("bias-agreement", "float32").status == "held"


def test_mha_turns_the_mask_round():
    case = AttentionCase.build(shape=(2, 2, 2, 4, 6, 8, 8), mask="padding_right")
    for need_weights in (True, False):
        out = mha(need_weights=need_weights)(case.q, case.k, case.v, mask=case.mask)
        bound = case.bound().out
        assert ((out.double() - case.reference().out).abs() <= bound).all()


def test_mha_takes_another_class():
    class Louder(nn.MultiheadAttention):
        def forward(self, *args, **options):
            out, weights = super().forward(*args, **options)
            return 2 * out, weights

    assert not agrees(mha(Louder), laws=["weights-sum-to-one"]).passed


def numpy_attention(q, k, v, allowed, scale):
    n = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, n, 1), np.repeat(v, n, 1)
    scores = np.einsum("bhtd,bhsd->bhts", q, k) * np.float32(scale)
    if allowed is not None:
        scores = np.where(allowed, scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isinf(top), 0, top))
    total = weights.sum(-1, keepdims=True)
    return (weights / np.where(total == 0, 1, total)) @ v


def test_arrays_are_asked_without_a_gradient():
    report = agrees(arrays(numpy_attention), laws=["agreement", "gradient-agreement", "empty-rows"])
    assert report.passed, str(report)
    assert report.verdict("gradient-agreement", "float32").status == "not asked"
    whole = check_attention(arrays(numpy_attention), laws=["form"], effort="quick")
    assert whole.verdict("form", "bfloat16").status == "not asked"


def test_arrays_pass_through_the_maker():
    made = []
    fn = arrays(numpy_attention, to=lambda x: made.append(x.dtype) or x)
    case = AttentionCase.build(mask="causal")
    fn(case.q, case.k, case.v, mask=case.mask)
    assert made == [np.float32] * 3 + [np.bool_]


def test_huggingface_functions_get_module_mask_and_scale():
    def attention(module, query, key, value, attention_mask, scaling, dropout):
        assert module.num_key_value_groups == 2
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None

    case = AttentionCase.build(shape=(2, 4, 2, 3, 5, 8, 8), mask="padding_right", scale=0.3)
    for additive in (False, True):
        fn = huggingface(attention, additive=additive)
        out = fn(case.q, case.k, case.v, mask=case.mask, scale=0.3)
        assert ((out.double() - case.reference().out).abs() <= case.bound().out).all()


@pytest.mark.parametrize("name", KNOWN)
def test_known_attentions_can_be_asked(name):
    if name in ("huggingface:eager", "huggingface:sdpa"):
        pytest.importorskip("transformers", reason="transformers is not installed")
    if name == "x-transformers":
        pytest.importorskip("x_transformers", reason="x-transformers is not installed")
    report = check_attention(known_attention(name), laws=["form"], dtypes=F32, effort="quick")
    assert report.passed, str(report)
    assert report.name == name


def test_a_callable_is_found_by_its_path():
    assert known_attention("tests.correct_attentions:in_float32").__name__ == "in_float32"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("torch:speed", "cannot be imported"),
        ("nowhere", "neither"),
        ("no_such_package:fn", "cannot be imported"),
        ("math:pi", "not callable"),
    ],
)
def test_what_is_not_there_says_why(name, why):
    with pytest.raises(Unavailable, match=why):
        known_attention(name)


def test_an_adapter_may_be_named_or_given():
    sdpa = F.scaled_dot_product_attention
    for adapter in ("sdpa", sdpa_style):
        assert agrees(sdpa, laws=["exact-selection"], adapter=adapter).passed
    with pytest.raises(ValueError, match="adapter='rocket'"):
        agrees(sdpa, adapter="rocket")
