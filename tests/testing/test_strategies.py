"""The cases: every kind is drawn, each replays from its printed line, failures shrink."""

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from stabletx.testing import (
    FAMILIES,
    AttentionCase,
    Shape,
    attention_cases,
    attention_error_bound,
)
from stabletx.testing._layouts import LAYOUTS, arranged
from stabletx.testing._masks import MASKS
from stabletx.testing.cases import BIASES, GARBAGE

SHAPE = (2, 4, 2, 5, 7, 4, 3)
DRAW = settings(
    max_examples=300, deadline=None, database=None, phases=[Phase.generate], derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def drawn(**options):
    seen = []

    @DRAW
    @given(case=attention_cases(**options))
    def collect(case):
        seen.append(case)

    collect()
    return seen


def same(a, b):
    return torch.equal(a.nan_to_num(1e9), b.nan_to_num(1e9)) and a.dtype == b.dtype


def test_cases_cover_every_family_mask_layout_and_length():
    cases = drawn(extremes=True, bias=True, softcap=True, sinks=True, empty=True)
    text = Counter()
    for case in cases:
        text[case.family] += 1
        text[case.layout] += 1
        text[str(case.q.dtype)] += 1
        call = repr(case)
        named = call.split("mask='")[1].split("'")[0] if "mask=" in call else "none"
        text.update(named.split("&"))
    for kind in (*FAMILIES, *LAYOUTS, *MASKS):
        assert text[kind] >= 3, kind
    lengths = {n for case in cases for n in (case.shape.t, case.shape.s)}
    assert {0, 1, 63, 64, 65, 127, 128, 129} <= lengths
    shapes = [case.shape for case in cases]
    assert any(z.t > z.s > 0 for z in shapes)
    assert any(z.s > z.t > 0 for z in shapes)
    assert any(z.h > z.g > 1 for z in shapes)
    assert any(z.e != z.d for z in shapes)
    assert any(case.poison is not None and bool(case.k.isnan().any()) for case in cases)
    assert any(case.sinks is not None for case in cases)
    assert any(case.softcap is not None for case in cases)
    assert {case.q.dtype for case in cases} == {
        torch.float64, torch.float32, torch.bfloat16, torch.float16
    }  # fmt: skip


def test_cases_keep_to_what_is_asked_for():
    cases = drawn(
        dtypes=(torch.float16,), families=("equal",), max_len=8, masks=("causal",),
        layouts=("permuted",), grouped=False, poison=False, equal_widths=True, equal_lengths=True,
    )  # fmt: skip
    for case in cases:
        z = case.shape
        assert (case.family, case.q.dtype, case.layout) == ("equal", torch.float16, "permuted")
        assert z.h == z.g
        assert z.d == z.e
        assert 1 <= z.t == z.s <= 8
        assert case.poison is case.bias is case.softcap is case.sinks is None


@settings(max_examples=60, deadline=None)
@given(case=attention_cases(extremes=True, bias=True, softcap=True, sinks=True, max_len=17))
def test_case_replays_from_its_printed_line(case):
    again = eval(repr(case), {"AttentionCase": AttentionCase, "torch": torch})
    for a, b in ((case.q, again.q), (case.k, again.k), (case.v, again.v)):
        assert same(a, b)
        assert a.stride() == b.stride()
    assert same(case.grad_out, again.grad_out)
    assert case.scale == again.scale
    assert (case.mask is None) == (again.mask is None)
    assert case.mask is None or torch.equal(case.mask, again.mask)


@settings(max_examples=60, deadline=None)
@given(case=attention_cases(extremes=True, max_len=17))
def test_case_holds_finite_inputs_but_for_its_poison(case):
    for x in (case.k, case.v):
        bad = ~x.isfinite()
        assert not bad.any() or (case.poison is not None and bool(case.poison[bad.any(-1)].all()))
    assert case.q.isfinite().all()
    assert case.reference().out.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(case=attention_cases(extremes=True, bias=True, softcap=True, sinks=True, empty=True))
def test_judgement_is_the_answer_the_gradients_and_the_bound(case):
    judged = case.judged()
    bound = attention_error_bound(case.q, case.k, case.v, grad_out=case.grad_out, **case.options)
    apart = (case.reference().out, *case.gradients(), *case.bound())
    together = (judged.out, *judged.gradients, *judged.bound)
    for a, b in zip(apart, together, strict=True):
        assert (a is None and b is None) or same(a, b)
    if not case.exact:
        assert all(a is None or same(a, b) for a, b in zip(bound, judged.bound, strict=True))


@settings(max_examples=30, deadline=None)
@given(case=attention_cases(families=("exact",), max_len=65))
def test_exact_cases_leave_nothing_to_round(case):
    weights = case.reference().weights
    assert ((weights == 0) | (weights == 0.5) | (weights == 1)).all()
    h, g = case.q.shape[1], case.k.shape[1]
    dtype = torch.promote_types(case.q.dtype, torch.float32)
    q = case.q.to(dtype)
    k, v = (x.to(dtype).nan_to_num(0, 0, 0).repeat_interleave(h // g, 1) for x in (case.k, case.v))
    scores = q @ k.mT * case.scale
    if case.mask is not None:
        scores = scores.masked_fill(~case.mask, -torch.inf)
    dead = scores.isneginf().all(-1, keepdim=True)
    out = scores.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0) @ v
    assert torch.equal(out.double(), case.reference().out)
    assert case.bound().out.eq(0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_the_same_values(layout):
    x = torch.randn(2, 3, 5, 4)
    x = x[:1].expand_as(x) if layout == "expanded" else x
    y = arranged(x, layout)
    assert torch.equal(x, y)
    if layout == "contiguous":
        assert y.is_contiguous()
    else:
        assert not y.is_contiguous()
    assert (y.storage_offset() > 0) == (layout == "sliced")
    assert (0 in y.stride()) == (layout == "expanded")


@pytest.mark.parametrize("kind", MASKS)
def test_masks_have_the_shape_that_is_promised(kind):
    mask = AttentionCase.build(shape=SHAPE, mask=kind).mask
    if kind == "none":
        assert mask is None
        return
    assert mask.dtype == torch.bool
    assert mask.shape[0] in (1, 2)
    assert mask.shape[1] in (1, 4)
    assert mask.shape[2:] == (5, 7)


def test_causal_masks_are_aligned_as_they_are_named():
    bottom_right = AttentionCase.build(shape=(1, 1, 1, 2, 4), mask="causal").mask[0, 0]
    assert bottom_right.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    top_left = AttentionCase.build(shape=(1, 1, 1, 2, 4), mask="causal_top_left").mask[0, 0]
    assert top_left.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("kind", "empty"),
    [("empty_rows", (2, 3)), ("dead_example", (0,)), ("dead_head", (1,)), ("causal", (2,))],
)
def test_masks_that_leave_rows_empty_do(kind, empty):
    shape = (2, 4, 2, 7, 5, 4, 3)
    case = AttentionCase.build(shape=shape, mask=kind)
    rows = ~case.mask.expand(2, 4, 7, 5).any(-1)
    assert rows.any(), empty
    assert not rows.all()
    assert case.reference().out[rows].eq(0).all()


def test_poison_lies_only_where_no_query_may_attend():
    for garbage in GARBAGE[1:]:
        case = AttentionCase.build(shape=SHAPE, mask="padding_left", garbage=garbage)
        seen = case.mask.expand(2, 4, 5, 7).any(2).view(2, 2, 2, 7).any(2)
        assert torch.equal(case.poison, ~seen)
        assert case.k[case.poison].abs().nan_to_num(1e30).ge(1e4).all()


def test_cast_keeps_the_layout():
    for layout in LAYOUTS:
        case = AttentionCase.build(shape=(2, 2, 2, 3, 4, 4, 4), layout=layout)
        assert case.to(torch.float16).k.stride() == case.k.stride()
        assert repr(case.to(torch.float16)).endswith(".to(torch.float16)")


def test_failing_case_shrinks_to_a_small_plain_one():
    found = find(
        attention_cases(),
        lambda case: case.shape.s >= 3 and case.shape.t >= 2 and case.mask is not None,
        settings=settings(max_examples=500, database=None, deadline=None),
    )
    assert found.shape in (Shape(1, 1, 1, 2, 3, 1, 1), Shape(1, 1, 1, 3, 3, 1, 1))
    assert found.family == "exact"
    assert found.layout == "contiguous"
    assert len(repr(found)) < 100


def test_failing_test_prints_the_line_that_replays_it():
    @settings(max_examples=20, database=None)
    @given(case=attention_cases(), dummy=st.none())
    def fails(case, dummy):
        raise AssertionError("no")

    with pytest.raises(AssertionError) as caught:
        fails()
    notes = "\n".join(caught.value.__notes__)
    assert "case=AttentionCase.build(family='" in notes


@pytest.mark.parametrize("argument", ["family", "mask", "layout", "bias"])
def test_build_refuses_a_name_that_it_does_not_know(argument):
    with pytest.raises(ValueError, match=f"{argument} must be one of .*got {argument}='what'"):
        AttentionCase.build(**{argument: "what"})


@pytest.mark.parametrize("kind", BIASES)
def test_biases_broadcast_to_the_scores(kind):
    bias = AttentionCase.build(shape=SHAPE, bias=kind).bias
    if kind != "none":
        assert torch.broadcast_shapes(bias.shape, (2, 4, 5, 7)) == (2, 4, 5, 7)
