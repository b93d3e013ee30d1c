"""SDPA flash (CPU): values are added up before they are divided (torch 2.13.0)."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

zeros = torch.zeros(1, 1, 8, 4)
v = torch.full((1, 1, 8, 4), torch.finfo(torch.float32).max / 4)
with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
    out = torch.nn.functional.scaled_dot_product_attention(zeros, zeros, v)
assert out.isinf().all()  # exact: a quarter of the largest float
