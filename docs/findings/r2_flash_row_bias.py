"""SDPA flash (CPU): a finite mask makes dv n times too large (torch 2.13.0)."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

n = 64
q, k, v = (torch.randn(1, 1, n, 8, requires_grad=True) for _ in range(3))
bias = torch.zeros(n, n)
bias[0] = -1e9
with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
out[0, 0, 0].sum().backward()
assert v.grad[..., 0].sum() > 60  # exact: 1
