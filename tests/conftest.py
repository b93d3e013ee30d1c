"""One Hypothesis profile for every test, and what tests in several folders ask for."""

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "stabletx",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=50,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("stabletx")


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
