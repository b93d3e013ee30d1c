"""nn.MultiheadAttention: a row without a key spoils every gradient, read or not (torch 2.13.0)."""

import torch

module = torch.nn.MultiheadAttention(8, 1, batch_first=True)
x = torch.randn(1, 4, 8, requires_grad=True)
blocked = torch.zeros(4, 4, dtype=torch.bool)
blocked[0] = True
out, _ = module(x, x, x, attn_mask=blocked, need_weights=True)
out[:, 1:].sum().backward()
assert x.grad.isnan().all()  # exact: finite; need_weights=False gives no NaN
