"""One Hypothesis profile for every test, and what tests in several folders ask for."""

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "stabletx",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=50,
    suppress_health_check=list(HealthCheck),
)
settings.register_profile(
    "mutants",
    settings.get_profile("stabletx"),
    max_examples=4,
    # Nobody reads a mutant's failing case: it is not made smaller.
    phases=[Phase.explicit, Phase.generate],
)
# Set by mutmut. A mutant meets many tests, and most die of the first example.
MUTATING = "MUTANT_UNDER_TEST" in os.environ
settings.load_profile("mutants" if MUTATING else "stabletx")


def pytest_itemcollected(item):
    """Draw few examples, also where a test asks for many, while mutants are tested."""
    test = getattr(item, "obj", None)
    if MUTATING and getattr(test, "is_hypothesis_test", False):
        test._hypothesis_internal_use_settings = settings.default


@pytest.fixture
def same_function():
    """Hold two ways to compute one thing to each other, with a bound that nobody chose.

    ``first`` and ``second`` take a dtype and return tensors. Run in float64, the two may differ by
    no more than the rounding that float32 shows on the first of them: 2**29 times what rounding
    in float64 can explain, and far less than what any mistake would make.
    """

    def check(first, second):
        exact, other = first(torch.float64), second(torch.float64)
        rounded = first(torch.float32)
        for a, b, c in zip(exact, other, rounded, strict=True):
            assert a.shape == b.shape
            if a.numel():
                assert (a - b).abs().max() <= (a - c).abs().max()

    return check
