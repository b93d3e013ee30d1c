"""The parts of the laws: settings, limits, the questions that are put."""

import dataclasses

import pytest
import torch

from stabletx.testing.cases import AttentionCase
from stabletx.testing.laws import LAWS, Ask, NotAsked, Setting, Violation
from stabletx.testing.laws.limits import lse_limit, row_sum_error, value_gradient_limit
from stabletx.testing.rounding import Profile
from tests.correct_attentions import in_float32
from tests.mutants import MUTANTS

EVERYTHING = frozenset(
    {"mask", "scale", "gradient", "grouped", "cross", "value-dim"}
    | {"bias", "softcap", "sinks", "lse", "cache", "training", "higher"}
)


def settings_of(law, n=6, features=EVERYTHING):
    return list(law.choices.settings(n, 0, law.name, features))


def test_laws_have_unique_names_and_say_what_they_demand():
    assert isinstance(LAWS, tuple)
    assert len({law.name for law in LAWS}) == len(LAWS)
    for law in LAWS:
        assert law.sentence.endswith(".")
        assert law.source
        assert set(law.needs) <= EVERYTHING


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_settings_repeat_by_seed_and_build(law):
    first = settings_of(law)
    assert first == settings_of(law)
    for setting in first[:3]:
        case = setting.case()
        assert case.shape == setting.shape
        assert eval(repr(setting), {"Setting": Setting, "Shape": type(setting.shape), "torch": torch}) == setting  # fmt: skip  # noqa: E501


def test_settings_keep_to_the_features():
    agreement = next(law for law in LAWS if law.name == "agreement")
    for setting in settings_of(agreement, 40, frozenset()):
        z = setting.shape
        assert z.t == z.s
        assert z.h == z.g
        assert z.d == z.e
        assert setting.mask == "none"
        assert setting.scale is None
    lengths = {(x.shape.t, x.shape.s) for x in settings_of(agreement, 120)}
    assert {(1, 1), (192, 192), (2, 1025), (64, 192)} <= lengths


def test_smaller_settings_are_smaller_and_of_the_same_kind():
    law = next(law for law in LAWS if law.name == "exact-selection")
    setting = settings_of(law, 8)[2]
    work = setting.shape.t * setting.shape.s * setting.shape.h * setting.shape.b
    for other in setting.smaller(law.choices):
        z = other.shape
        assert z.t * z.s * z.h * z.b <= work
        assert other.family == "exact"


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf, 1.0])
def test_within_breaks_where_it_should(wrong):
    ask = Ask(in_float32)
    zero = torch.zeros(2)
    ask.within("out", zero, zero, zero.double())
    with pytest.raises(Violation, match=r"out\[1\]"):
        ask.within("out", torch.tensor([0.0, wrong]), zero, zero.double() + 0.5)


def test_within_keeps_the_worst_fraction_of_the_bound():
    ask = Ask(in_float32)
    ask.within("out", torch.tensor([0.25]), torch.zeros(1), torch.ones(1).double())
    assert ask.worst == 0.25


def test_same_bits_tells_one_bit_apart():
    ask = Ask(in_float32)
    one = torch.ones(3)
    ask.same_bits("out", torch.tensor([torch.nan, -0.0]), torch.tensor([torch.nan, 0.0]))
    with pytest.raises(Violation, match=r"out\[0\] moves"):
        ask.same_bits("out", one, torch.nextafter(one, 2 * one))


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda q, k, v: None, "returns a NoneType"),
        (lambda q, k, v: v[:, :, :1], "returns the shape"),
        (lambda q, k, v: q.double(), "returns torch.float64"),
        (lambda q, k, v: 1 / 0, "raises ZeroDivisionError"),
    ],
)
def test_form_is_held_at_every_call(fn, message):
    with pytest.raises(Violation, match=message):
        Ask(fn).out(AttentionCase.build())


def test_a_refusal_is_not_a_violation():
    def refuses(q, k, v):
        raise NotImplementedError("no such kernel")

    with pytest.raises(NotAsked, match="no such kernel"):
        Ask(refuses).out(AttentionCase.build())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_limits_that_know_nothing_of_scores_are_small_and_grow_with_what_is_stated(dtype):
    case = AttentionCase.build(shape=(1, 2, 1, 4, 9), dtype=dtype)
    plain = row_sum_error(case, None)
    assert 0 < plain < 1e-5
    assert row_sum_error(case, Profile(weights=torch.bfloat16)) > 100 * plain
    assert row_sum_error(case, Profile(recompute_from_lse=True)) > plain
    dv = torch.zeros(1, 1, 9, 4, dtype=dtype)
    limit = value_gradient_limit(case, dv, case.grad_out.double(), None)
    assert limit.shape == (1, 1, 4)
    assert (limit < 1e-4).all()
    exact = case.reference()
    limit = lse_limit(case, exact, exact.lse.float(), None)
    assert ((limit > 0) & (limit < 1e-3)).all()


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_every_law_can_be_broken(law):
    """An attention that answers with noise breaks what no mutant is named for."""
    torch.manual_seed(0)

    def noise(q, k, v, return_lse=False, **options):
        bias = options.get("bias")
        sinks = options.get("sinks")
        extra = sum(x.nan_to_num(neginf=0.0).sum() for x in (bias, sinks) if x is not None)
        kept = sum(x.nan_to_num(0.0, 1.0, -1.0).sum() for x in (q, k, v)) * 1e-3 + extra * 0
        out = torch.randn(*q.shape[:3], v.shape[3], dtype=q.dtype) * 7 + kept
        return (out, out.sum(-1) - 90) if return_lse else out

    if law.name in {mutant.by for mutant in MUTANTS} | {
        "no-write",
        "second-derivative",
        "extreme-honesty",
    }:
        return  # test_mutants and test_conformance break it
    dtype = law.dtypes[0] if law.dtypes else torch.float32
    ask = Ask(noise, None, EVERYTHING)
    settings = [dataclasses.replace(x, dtype=dtype) for x in settings_of(law, 12)]
    broken = []
    for setting in settings:
        try:
            law.check(ask, setting)
        except Violation as violation:
            broken.append(str(violation))
            break
        except NotAsked:
            continue
    assert broken
