"""The laws are themselves tested: every wrong attention is caught, no right one is flagged."""

import pytest
import torch

from stabletx.testing.conformance import check_attention
from stabletx.testing.laws import LAWS
from tests.correct_attentions import CORRECT
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


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(100))
def test_correct_attentions_are_not_flagged_over_seeds(seed):
    for fn in CORRECT:
        report = check_attention(fn, effort="quick", seed=1000 + seed)
        assert report.passed, str(report)
