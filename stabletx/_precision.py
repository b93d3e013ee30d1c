"""Which dtype to compute in. Every dtype decision of the package lives here."""

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: at least float32, and float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def is_sixteen_bit(dtype: torch.dtype) -> bool:
    """Tell whether a dtype stores a number in 16 bits."""
    return dtype in (torch.float16, torch.bfloat16)
