"""Attention over a packed batch: each sequence sees itself alone, and no padding exists."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor

from stabletx import _checks
from stabletx._precision import is_sixteen_bit
from stabletx.functional.attention import Method, attention
from stabletx.masks import Mask
from stabletx.packing import Plan, Run


def packed_attention(
    q: Tensor,  # (n_tokens, h, d), in the plan's order
    k: Tensor,  # (n_tokens, g, d)
    v: Tensor,  # (n_tokens, g, e)
    plan: Plan,
    *,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    training: bool | None = None,
    method: Method = "auto",
) -> Tensor:  # (n_tokens, h, e)
    """Let each token attend to the tokens of its own sequence.

    Args:
        q: queries of all sequences end to end. Query head ``i`` reads head ``i * g // h``.
        k: keys.
        v: values.
        plan: where the sequences lie.
        is_causal: let a token see no later token.
        dropout_p: probability in [0, 1) that a weight is dropped while training.
        training: must be given with ``dropout_p``.
        method: as in :func:`stabletx.attention`.

    Returns:
        The output in the dtype of q, token by token.

    Raises:
        ValueError: as :func:`stabletx.attention`, or if q does not hold the plan's tokens.

    Numerics: as :func:`stabletx.attention`. On CUDA 16-bit inputs go through torch's varlen
        kernel, and nothing waits for the device.

    >>> plan = Plan.of_lengths(torch.tensor([1, 2]))
    >>> x = torch.zeros(3, 1, 4)
    >>> packed_attention(x, x, x, plan).shape
    torch.Size([3, 1, 4])
    """
    for name, x, axes in (("q", q, "n h d"), ("k", k, "n g d"), ("v", v, "n g e")):
        _checks.check_axes(name, x, axes, "Split the heads first.")
        _checks.check_same("number of tokens", name, x.shape[0], "plan", plan.n_tokens)
    by_varlen = q.device.type == "cuda" and is_sixteen_bit(q.dtype)
    if by_varlen and method == "auto" and dropout_p == 0.0 and q.shape[2] == v.shape[2]:
        return _varlen(q, k, v, plan, is_causal)
    mask = Mask.causal() if is_causal else None
    outs = []
    # Even no token at all goes through attention once, so that every weight gets a gradient.
    runs = [run for run in plan.runs if run.length] or [Run(0, 1, 0)]
    for start, n_rows, length in runs:
        run = slice(start, start + n_rows * length)
        heads = (rearrange(x[run], "(b t) h d -> b h t d", b=n_rows) for x in (q, k, v))
        out = attention(*heads, mask=mask, dropout_p=dropout_p, training=training, method=method)
        outs.append(rearrange(out, "b h t e -> (b t) h e"))
    return torch.cat(outs)


def _varlen(q: Tensor, k: Tensor, v: Tensor, plan: Plan, is_causal: bool) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if k.shape[1] != q.shape[1]:
        k, v = (repeat(x, "n g d -> n (g r) d", r=q.shape[1] // k.shape[1]) for x in (k, v))
    cumulative = plan.cumulative_lengths()
    longest = plan.max_length
    window = (-1, 0) if is_causal else (-1, -1)
    out = varlen_attn(q, k, v, cumulative, cumulative, longest, longest, window_size=window)
    assert isinstance(out, Tensor)
    return out
