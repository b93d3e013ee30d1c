"""SDPA flash (CPU): scores out of range give 0 in bfloat16, without a sign of it (torch 2.13.0)."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

q = torch.ones(1, 1, 1, 16).bfloat16()
k = torch.full((1, 1, 16, 16), 3e38).bfloat16()
v = torch.ones(1, 1, 16, 16).bfloat16()
with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
assert (out == 0).all()  # exact: 1
