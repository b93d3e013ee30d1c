"""Pure functions on tensors: the mathematics of the package, without modules and without state."""

from stabletx.functional.activations import gelu, swiglu
from stabletx.functional.losses import cross_entropy
from stabletx.functional.normalization import layer_norm, rms_norm
from stabletx.functional.positions import rotary_tables, rotate
from stabletx.functional.softmax import log_softmax, logsumexp, softmax

__all__ = [
    "cross_entropy",
    "gelu",
    "layer_norm",
    "log_softmax",
    "logsumexp",
    "rms_norm",
    "rotary_tables",
    "rotate",
    "softmax",
    "swiglu",
]
