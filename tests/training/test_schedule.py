import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabletx.training import learning_rate_factor
from stabletx.training.schedule import DECAYS

shares = st.floats(0.0, 1.0)


@given(share=shares, warmup=st.floats(0.0, 0.99), decay=st.sampled_from(DECAYS), floor=shares)
def test_factor_stays_within_zero_and_one(share, warmup, decay, floor):
    assert 0.0 <= learning_rate_factor(share, warmup=warmup, decay=decay, floor=floor) <= 1.0


@given(a=shares, b=shares, warmup=st.floats(0.0, 0.99), decay=st.sampled_from(DECAYS))
def test_factor_rises_in_the_warmup_and_falls_after_it(a, b, warmup, decay):
    a, b = sorted((a, b))
    first = learning_rate_factor(a, warmup=warmup, decay=decay)
    second = learning_rate_factor(b, warmup=warmup, decay=decay)
    if b < warmup:
        assert first <= second
    elif a >= warmup:
        assert first >= second


@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize("floor", [0.0, 0.25])
def test_factor_ends_at_the_floor(decay, floor):
    assert learning_rate_factor(1.0, decay=decay, floor=floor) == floor
    assert learning_rate_factor(7.0, decay=decay, floor=floor) == floor


def test_factor_is_one_at_the_end_of_the_warmup():
    assert [learning_rate_factor(0.25, warmup=0.25, decay=d) for d in DECAYS] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": -0.5}, "share=-0.5"),
        ({"share": float("nan")}, "share=nan"),
        ({"share": 0.5, "warmup": 1.0}, "warmup=1.0"),
        ({"share": 0.5, "floor": 1.5}, "floor=1.5"),
        ({"share": 0.5, "decay": "steps"}, "decay='steps'"),
    ],
)
def test_factor_refuses_numbers_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        learning_rate_factor(**values)
