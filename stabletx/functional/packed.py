"""Attention over a packed batch: each sequence sees itself alone, and no padding exists."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor

from stabletx import _checks
from stabletx._precision import is_sixteen_bit
from stabletx.functional._guards import within_limits
from stabletx.functional._kernels import PAIRS, How
from stabletx.functional._problem import checked_problem
from stabletx.functional._runs import attend_runs
from stabletx.functional._sight import values_may_be_read
from stabletx.functional.attention import Method, attention
from stabletx.functional.attention import needs_plain_operations as needs_plain_operations
from stabletx.functional.fused import SPLIT_ROWS, can_fuse
from stabletx.masks import Mask
from stabletx.packing import Plan, Run


def packed_attention(
    q: Tensor,  # (n_tokens, h, d), in the plan's order
    k: Tensor,  # (n_tokens, g, d)
    v: Tensor,  # (n_tokens, g, e)
    plan: Plan,
    *,
    is_causal: bool = False,
    mask: Mask | None = None,
    bias: Tensor | None = None,  # (1, h|1, n, n), n the longest sequence
    scale: float | None = None,
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
        mask: a rule on places within any one sequence, such as ``Mask.window``.
        bias: added to the scores; of a shorter sequence, its first rows and columns.
        scale: factor on the products; None takes ``d ** -0.5``.
        dropout_p: probability in [0, 1) that a weight is dropped while training.
        training: must be given with ``dropout_p``.
        method: as in :func:`stabletx.attention`.

    Returns:
        The output in the dtype of q, token by token.

    Raises:
        ValueError: as :func:`stabletx.attention`, or if q does not hold the plan's tokens, or a
            bias has a batch axis.

    Numerics: as :func:`stabletx.attention`. On CUDA 16-bit inputs go through torch's varlen
        kernel, and nothing waits for the device. With a mask or a bias each run of equal lengths is
        a call of its own.

    >>> plan = Plan.of_lengths(torch.tensor([1, 2]))
    >>> x = torch.zeros(3, 1, 4)
    >>> packed_attention(x, x, x, plan).shape
    torch.Size([3, 1, 4])
    """
    for name, x, axes in (("q", q, "n h d"), ("k", k, "n g d"), ("v", v, "n g e")):
        _checks.check_axes(name, x, axes, "Split the heads first.")
        _checks.check_same("number of tokens", name, x.shape[0], "plan", plan.n_tokens)
    if bias is not None:
        _checks.check_axes("bias", bias, "1 h n n", "Add axes of size 1.")
        _checks.check_serves_every_sequence("bias", bias)
    _checks.check_probability("dropout_p", dropout_p)
    _checks.check_training_given(dropout_p, training)
    dropped = dropout_p if training else 0.0
    is_plain = mask is None and bias is None and method == "auto"
    by_varlen = is_plain and scale is None and q.device.type == "cuda" and is_sixteen_bit(q.dtype)
    if by_varlen and dropped == 0.0 and q.shape[2] == v.shape[2]:
        return _varlen(q, k, v, plan, is_causal)

    def one_by_one(q: Tensor, k: Tensor, v: Tensor, method: Method) -> Tensor:
        rule = mask
        if is_causal:
            rule = Mask.causal() if mask is None else Mask.causal() & mask
        return _run_by_run(q, k, v, plan, rule, bias, scale, dropout_p, training, method)

    if is_plain and _fits_in_one_step(plan, is_causal, dropped):
        how = _how(q, k, v, scale, is_causal, dropped)
        if how is not None:
            return attend_runs(q, k, v, plan, how, lambda q, k, v: one_by_one(q, k, v, "exact"))
    return one_by_one(q, k, v, method)


def _fits_in_one_step(plan: Plan, is_causal: bool, dropout_p: float) -> bool:
    """Tell whether :func:`attention` would cut no run, nor find it too long for dropout."""
    longest = plan.max_length
    return longest <= SPLIT_ROWS or not (is_causal or (dropout_p > 0 and longest**2 > PAIRS))


def _how(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, is_causal: bool, dropout_p: float
) -> How | None:
    """Say what is asked of torch's kernels; None where they are not safe for some token."""
    q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))  # (1, h, n, d)
    problem = checked_problem(
        q, k, v, mask=None, bias=None, scale=scale, softcap=None, sinks=None,
        dropout_p=0.0, training=None,
    )  # fmt: skip
    if not values_may_be_read(q) or can_fuse(problem) or needs_plain_operations(problem):
        return None
    # A bound on all tokens together holds for those of each sequence.
    return How(problem.scale, is_causal, dropout_p) if within_limits(problem) else None


def _run_by_run(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, mask: Mask | None, bias: Tensor | None,
    scale: float | None, dropout_p: float, training: bool | None, method: Method,
) -> Tensor:  # fmt: skip
    outs = []
    # Even no token at all goes through attention once, so that every weight gets a gradient.
    runs = [run for run in plan.runs if run.length] or [Run(0, 1, 0)]
    for start, n_rows, length in runs:
        run = slice(start, start + n_rows * length)
        heads = [rearrange(x[run], "(b t) h d -> b h t d", b=n_rows) for x in (q, k, v)]
        out = attention(
            heads[0], heads[1], heads[2],
            mask=mask, bias=None if bias is None else bias[:, :, :length, :length], scale=scale,
            dropout_p=dropout_p, training=training, method=method,
        )  # fmt: skip
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
