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
from stabletx.testing.conformance import check_attention, law_tests
from stabletx.testing.explain import Explanation, explain_difference
from stabletx.testing.families import FAMILIES
from stabletx.testing.laws import LAWS
from stabletx.testing.reference import (
    Gradients,
    Reference,
    reference_attention,
    reference_gradients,
)
from stabletx.testing.report import ConformanceReport
from stabletx.testing.strategies import attention_cases
from stabletx.testing.tolerances import (
    Bound,
    Profile,
    attention_error_bound,
    condition_scales,
    condition_ulps,
    cross_entropy_error_bound,
    layer_norm_error_bound,
    log_softmax_error_bound,
    logsumexp_error_bound,
    matmul_error_bound,
    rms_norm_error_bound,
    rotate_error_bound,
    softmax_error_bound,
)

__all__ = [
    "FAMILIES",
    "LAWS",
    "AttentionCase",
    "Bound",
    "Comparison",
    "ConformanceReport",
    "Explanation",
    "Gradients",
    "Profile",
    "Reference",
    "Shape",
    "assert_within",
    "attention_cases",
    "attention_error_bound",
    "check_attention",
    "compare",
    "compare_all",
    "condition_scales",
    "condition_ulps",
    "cross_entropy_error_bound",
    "explain_difference",
    "is_vacuous",
    "law_tests",
    "layer_norm_error_bound",
    "log_softmax_error_bound",
    "logsumexp_error_bound",
    "matmul_error_bound",
    "occupancies",
    "reference_attention",
    "reference_gradients",
    "rms_norm_error_bound",
    "rotate_error_bound",
    "softmax_error_bound",
]
