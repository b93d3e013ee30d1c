"""Tolerances that are computed: how far rounding alone can move a result, element by element.

Each function takes the inputs of a computation and returns absolute bounds in float64. The
derivations stand where they are computed; none of them holds a number that was tuned.
"""

from stabletx.testing._attention_bound import (
    Bound,
    attention_error_bound,
    condition_scales,
)
from stabletx.testing.function_bounds import (
    cross_entropy_error_bound,
    layer_norm_error_bound,
    log_softmax_error_bound,
    logsumexp_error_bound,
    matmul_error_bound,
    rms_norm_error_bound,
    rotate_error_bound,
    softmax_error_bound,
)
from stabletx.testing.rounding import (
    Mode,
    Profile,
    condition_ulps,
    gamma,
    smallest_subnormal,
    spacing,
    unit_roundoff,
)

__all__ = [
    "Bound",
    "Mode",
    "Profile",
    "attention_error_bound",
    "condition_scales",
    "condition_ulps",
    "cross_entropy_error_bound",
    "gamma",
    "layer_norm_error_bound",
    "log_softmax_error_bound",
    "logsumexp_error_bound",
    "matmul_error_bound",
    "rms_norm_error_bound",
    "rotate_error_bound",
    "smallest_subnormal",
    "softmax_error_bound",
    "spacing",
    "unit_roundoff",
]
