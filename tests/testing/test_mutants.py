"""The laws are themselves tested: every wrong attention is caught, no right one is flagged."""

import math

import pytest
import torch

from stabletx.testing.conformance import check_attention
from stabletx.testing.laws import LAWS
from stabletx.testing.rounding import Profile
from tests.correct_attentions import CORRECT, Ready
from tests.mutants import MUTANTS

NAMES = {law.name for law in LAWS}
FOUR = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def test_the_zoo_is_large_and_names_are_unique():
    assert len(MUTANTS) >= 60
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert {mutant.by for mutant in MUTANTS} <= NAMES
    assert len(CORRECT) >= 6


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught_by_its_law(mutant):
    for dtype in mutant.dtypes[:2]:
        report = check_attention(
            mutant, laws=[mutant.by], dtypes=[dtype], effort="quick", extremes=True
        )
        assert [verdict.law for verdict in report.broken] == [mutant.by], str(report)
        assert not report.passed


@pytest.mark.nightly
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught_in_each_of_its_dtypes_by_a_plain_run(mutant):
    for dtype in mutant.dtypes:
        assert not check_attention(mutant, dtypes=[dtype], stop_early=True).passed


@pytest.mark.parametrize("fn", CORRECT, ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("dtype", FOUR, ids=str)
def test_correct_attention_is_not_flagged(fn, dtype):
    seed = CORRECT.index(fn) * 4 + FOUR.index(dtype)
    report = check_attention(fn, dtypes=[dtype], max_examples=2, effort="quick", seed=seed)
    assert report.passed, str(report)


def scaled_to_base_two(q, k, v, *, mask=None, scale=None):
    """Multiply the scores by log2(e) before the maximum is off, as kernels on GPUs do."""
    x = Ready(q, k, v, mask, scale, torch.promote_types(q.dtype, torch.float32))
    scores = (x.q @ x.full(x.k).mT) * (x.scale * math.log2(math.e))
    scores = scores.masked_fill(~x.allowed, -math.inf)
    top = scores.amax(-1, keepdim=True)
    exps = (scores - torch.where(top.isinf(), 0, top).detach()).exp2()
    total = exps.sum(-1, keepdim=True)
    return x.finish((exps / torch.where(total == 0, 1, total)) @ x.full(x.v))


@pytest.mark.parametrize("is_stated", [False, True])
def test_a_kernel_in_base_two_is_held_to_what_it_states(is_stated):
    report = check_attention(
        scaled_to_base_two,
        profile=Profile(base_two=is_stated),
        laws=["agreement", "gradient-agreement", "shift-invariance"],
        dtypes=[torch.float32],
        effort="quick",
        seed=2,
    )
    assert report.passed is is_stated, str(report)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(100))
def test_correct_attentions_are_not_flagged_over_seeds(seed):
    for fn in CORRECT:
        # The time limit is for what hangs; a busy machine must not look like that.
        report = check_attention(
            fn, effort="quick", max_examples=2, seed=1000 + seed, time_limit_seconds=600
        )
        assert report.passed, str(report)
