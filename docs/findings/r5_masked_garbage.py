"""SDPA (every backend): what a mask hides from all queries still reaches them (torch 2.13.0)."""

import torch

q, k, v = (torch.randn(1, 1, 4, 8) for _ in range(3))
keep = torch.ones(4, 4, dtype=torch.bool)
keep[:, 3] = False
v[:, :, 3] = torch.nan
out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep)
assert out.isnan().all()  # exact: finite
