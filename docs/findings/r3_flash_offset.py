"""SDPA flash (CPU): a common offset of the scores changes dv (torch 2.13.0)."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

torch.manual_seed(0)
q, k = (torch.randint(-2, 3, (1, 1, 8, 16)).float() for _ in range(2))
q[..., 0], k[..., 0] = 64.0, 65536.0  # 2**20 on every score, exactly
v = torch.randn(1, 1, 8, 16, requires_grad=True)
leaves = [q.requires_grad_(), k.requires_grad_(), v]
with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
    torch.nn.functional.scaled_dot_product_attention(*leaves).sum().backward()
assert (v.grad[..., 0].sum() - 8).abs() > 1e-3  # exact: 8, the sum of the weights of 8 rows
