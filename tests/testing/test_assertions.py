"""Each assertion shown failing, and what it says then."""

import math

import pytest
import torch

from stabletx.testing import (
    AttentionCase,
    assert_within,
    compare,
    compare_all,
    is_vacuous,
    occupancies,
)

ONE = torch.ones(2, 3, dtype=torch.float64)


def put(x, value, place=(1, 2)):
    y = x.clone()
    y[place] = value
    return y


def test_assert_within_returns_the_worst_error_over_its_bound():
    assert assert_within(ONE, ONE, put(ONE, 1.25)) == 0.25
    assert assert_within(ONE, put(ONE, 2.0), ONE) == 1.0


def test_assert_within_says_how_many_where_and_by_how_much():
    actual = put(put(ONE.float(), 5.0), 3.0, (0, 1))
    with pytest.raises(AssertionError) as caught:
        assert_within(ONE, actual, ONE)
    text = str(caught.value)
    assert "out is beyond its bound at 2 of 6 places (torch.float32)" in text
    assert "first: [0, 1] is 3.0, expected 1.0; error 2, 2 times the bound 1" in text
    assert "worst: [1, 2] is 5.0, expected 1.0; error 4, 4 times the bound 1" in text
    assert "explain_difference" in text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_assert_within_fails_on_what_is_not_finite_under_any_finite_bound(value):
    with pytest.raises(AssertionError, match="Not finite where the exact result is"):
        assert_within(ONE * 1e300, put(ONE, value), ONE)


def test_assert_within_fails_on_nan_under_an_infinite_bound():
    assert assert_within(ONE * math.inf, put(ONE, math.inf), ONE) == 0.0
    with pytest.raises(AssertionError, match="is nan"):
        assert_within(ONE * math.inf, put(ONE, math.nan), ONE)


def test_assert_within_fails_on_a_swallowed_nan():
    with pytest.raises(AssertionError, match="A NaN that is due was swallowed"):
        assert_within(ONE, put(ONE, 0.0), put(ONE, math.nan))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_assert_within_accepts_what_is_not_finite_where_nan_is_due(value):
    assert assert_within(ONE, put(ONE, value), put(ONE, math.nan)) == 0.0


def test_assert_within_fails_under_a_nan_bound():
    with pytest.raises(AssertionError, match="out is beyond its bound at 1 of 6"):
        assert_within(put(ONE, math.nan), ONE, put(ONE, 1.5))


def test_assert_within_asks_for_equality_under_a_zero_bound():
    assert assert_within(ONE * 0, ONE, ONE) == 0.0
    with pytest.raises(AssertionError, match="against the bound 0"):
        assert_within(ONE * 0, put(ONE, 1.5), ONE)


def test_assert_within_tells_infinities_apart():
    infinite = put(ONE, math.inf)
    assert assert_within(ONE, infinite, infinite) == 0.0
    with pytest.raises(AssertionError):
        assert_within(ONE, -infinite, infinite)


def test_assert_within_fails_on_another_shape():
    with pytest.raises(
        AssertionError, match=r"out must have shape \(2, 3\), got out of shape \(3, 2\)"
    ):
        assert_within(ONE, ONE.mT, ONE)


def test_assert_within_names_the_gradient_that_is_off():
    case = AttentionCase.build()
    exact = case.gradients()
    assert assert_within(case.bound(), exact[:3], exact) == 0.0
    wrong = (exact.dq, exact.dk + 1, exact.dv)
    with pytest.raises(AssertionError, match="dk is beyond its bound at 16 of 16"):
        assert_within(case.bound(), wrong, exact)
    whole = (case.reference().out + 1, *exact)
    with pytest.raises(AssertionError, match="out is beyond its bound"):
        assert_within(case.bound(), whole, (case.reference().out, *exact))


def test_assert_within_takes_a_bound_and_a_reference():
    case = AttentionCase.build()
    assert assert_within(case.bound(), case.reference().out.float(), case.reference()) <= 1


def test_assert_within_fails_on_a_missing_gradient():
    case = AttentionCase.build()
    exact = case.gradients()
    with pytest.raises(AssertionError, match="dk is missing"):
        assert_within(case.bound(), (exact.dq, None, exact.dv), exact)


def test_assert_within_refuses_forms_that_do_not_fit():
    with pytest.raises(ValueError, match=r"actual must be one tensor .*a sequence of 2"):
        assert_within(ONE, (ONE, ONE), ONE)
    with pytest.raises(ValueError, match="as long, got 1, 2 and 2"):
        assert_within((ONE,), (ONE, ONE), (ONE, ONE))


def test_compare_all_leaves_out_what_is_not_there():
    case = AttentionCase.build()
    found = compare_all(case.bound(), case.gradients(), case.gradients())
    assert [one.name for one in found] == ["dq", "dk", "dv"]


def test_compare_takes_nothing_at_all():
    nothing = torch.zeros(0, 3)
    assert compare(nothing, nothing, nothing).within


def test_occupancies_are_elementwise():
    found = occupancies(ONE, put(ONE, 1.5), ONE)
    assert torch.equal(found, put(ONE * 0, 0.5))


def test_is_vacuous_where_zeros_would_pass():
    assert is_vacuous(ONE, ONE)
    assert not is_vacuous(ONE, put(ONE, 2.0))
    assert not is_vacuous(ONE, put(ONE, math.nan))
