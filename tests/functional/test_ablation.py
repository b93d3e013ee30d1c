"""Every guard is needed: without it some hard case goes wrong."""

import pytest

from tests.ablation import GUARDS, moved_bits, without, wrong


@pytest.mark.parametrize("guard", GUARDS)
def test_a_hard_case_goes_wrong_without_the_guard(guard):
    with without(guard):
        assert wrong() or moved_bits()


def test_nothing_goes_wrong_with_every_guard_in_place():
    assert not moved_bits()
