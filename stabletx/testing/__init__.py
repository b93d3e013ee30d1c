"""Hold any attention to the laws: a float64 reference, computed tolerances, adversarial cases.

The names are loaded when first used, so that the pytest plugin beside them does not
import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stabletx.testing.assertions import (
        Comparison as Comparison,
    )
    from stabletx.testing.assertions import (
        assert_within as assert_within,
    )
    from stabletx.testing.assertions import (
        compare as compare,
    )
    from stabletx.testing.assertions import (
        compare_all as compare_all,
    )
    from stabletx.testing.assertions import (
        is_vacuous as is_vacuous,
    )
    from stabletx.testing.assertions import (
        occupancies as occupancies,
    )
    from stabletx.testing.cases import AttentionCase as AttentionCase
    from stabletx.testing.cases import Shape as Shape
    from stabletx.testing.conformance import (
        check_attention as check_attention,
    )
    from stabletx.testing.conformance import (
        law_tests as law_tests,
    )
    from stabletx.testing.explain import (
        Explanation as Explanation,
    )
    from stabletx.testing.explain import (
        explain_difference as explain_difference,
    )
    from stabletx.testing.families import FAMILIES as FAMILIES
    from stabletx.testing.laws import LAWS as LAWS
    from stabletx.testing.reference import (
        Gradients as Gradients,
    )
    from stabletx.testing.reference import (
        Reference as Reference,
    )
    from stabletx.testing.reference import (
        reference_attention as reference_attention,
    )
    from stabletx.testing.reference import (
        reference_gradients as reference_gradients,
    )
    from stabletx.testing.report import ConformanceReport as ConformanceReport
    from stabletx.testing.strategies import attention_cases as attention_cases
    from stabletx.testing.tolerances import (
        Bound as Bound,
    )
    from stabletx.testing.tolerances import (
        Profile as Profile,
    )
    from stabletx.testing.tolerances import (
        attention_error_bound as attention_error_bound,
    )
    from stabletx.testing.tolerances import (
        condition_scales as condition_scales,
    )
    from stabletx.testing.tolerances import (
        condition_ulps as condition_ulps,
    )
    from stabletx.testing.tolerances import (
        cross_entropy_error_bound as cross_entropy_error_bound,
    )
    from stabletx.testing.tolerances import (
        layer_norm_error_bound as layer_norm_error_bound,
    )
    from stabletx.testing.tolerances import (
        log_softmax_error_bound as log_softmax_error_bound,
    )
    from stabletx.testing.tolerances import (
        logsumexp_error_bound as logsumexp_error_bound,
    )
    from stabletx.testing.tolerances import (
        matmul_error_bound as matmul_error_bound,
    )
    from stabletx.testing.tolerances import (
        rms_norm_error_bound as rms_norm_error_bound,
    )
    from stabletx.testing.tolerances import (
        rotate_error_bound as rotate_error_bound,
    )
    from stabletx.testing.tolerances import (
        softmax_error_bound as softmax_error_bound,
    )

_HOME = {
    "AttentionCase": "cases",
    "Bound": "tolerances",
    "Comparison": "assertions",
    "ConformanceReport": "report",
    "Explanation": "explain",
    "FAMILIES": "families",
    "Gradients": "reference",
    "LAWS": "laws",
    "Profile": "tolerances",
    "Reference": "reference",
    "Shape": "cases",
    "assert_within": "assertions",
    "attention_cases": "strategies",
    "attention_error_bound": "tolerances",
    "check_attention": "conformance",
    "compare": "assertions",
    "compare_all": "assertions",
    "condition_scales": "tolerances",
    "condition_ulps": "tolerances",
    "cross_entropy_error_bound": "tolerances",
    "explain_difference": "explain",
    "is_vacuous": "assertions",
    "law_tests": "conformance",
    "layer_norm_error_bound": "tolerances",
    "log_softmax_error_bound": "tolerances",
    "logsumexp_error_bound": "tolerances",
    "matmul_error_bound": "tolerances",
    "occupancies": "assertions",
    "reference_attention": "reference",
    "reference_gradients": "reference",
    "rms_norm_error_bound": "tolerances",
    "rotate_error_bound": "tolerances",
    "softmax_error_bound": "tolerances",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"stabletx.testing.{_HOME[name]}"), name)
    raise AttributeError(f"module 'stabletx.testing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_HOME)
