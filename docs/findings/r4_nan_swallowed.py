"""SDPA (CPU default): a NaN query gives exactly 0 (torch 2.13.0)."""

import torch

q = torch.full((1, 1, 1, 4), torch.nan)
ones = torch.ones(1, 1, 5, 4)
out = torch.nn.functional.scaled_dot_product_attention(q, ones, ones)
assert (out == 0).all()  # exact: NaN
