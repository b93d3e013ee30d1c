"""Hold any attention to the laws: a float64 reference, computed tolerances, adversarial cases."""

from stabletx.testing.assertions import (
    Comparison,
    assert_within,
    compare,
    compare_all,
    is_vacuous,
    occupancies,
)
from stabletx.testing.cases import AttentionCase, Shape
from stabletx.testing.families import FAMILIES
from stabletx.testing.reference import (
    Gradients,
    Reference,
    reference_attention,
    reference_gradients,
)
from stabletx.testing.strategies import attention_cases
from stabletx.testing.tolerances import (
    Bound,
    Profile,
    attention_error_bound,
    condition_scales,
    condition_ulps,
)

__all__ = [
    "FAMILIES",
    "AttentionCase",
    "Bound",
    "Comparison",
    "Gradients",
    "Profile",
    "Reference",
    "Shape",
    "assert_within",
    "attention_cases",
    "attention_error_bound",
    "compare",
    "compare_all",
    "condition_scales",
    "condition_ulps",
    "is_vacuous",
    "occupancies",
    "reference_attention",
    "reference_gradients",
]
