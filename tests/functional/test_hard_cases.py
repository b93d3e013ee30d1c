"""No method of ours fails any of the 88 hard cases; the judge finds the known faults of others."""

import pytest

from tests.hard_cases import DTYPES, IMPLEMENTATIONS, SITUATIONS, verdict
from tests.ways import METHODS


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_attention_is_right_in_every_hard_situation(method, situation):
    found = {str(d): verdict(IMPLEMENTATIONS[f"stabletx {method}"], situation, d) for d in DTYPES}
    assert not any(found.values()), found


@pytest.mark.parametrize("other", ["torch default", "torch math", "eager, additive mask"])
def test_the_judge_sees_hidden_nan_reach_the_output(other):
    assert verdict(IMPLEMENTATIONS[other], "hidden NaN", DTYPES[1]) == "out not finite"
