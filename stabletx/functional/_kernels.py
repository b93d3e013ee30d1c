"""One piece of attention on moderate finite values, forward and backward, the faster of two ways.

torch's fused kernel is made for long rows. Where a head has few pairs, two batched products with a
softmax between them take less time, most of all in the backward pass, which then reads the weights
instead of making them again. They alone can drop weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from einops import reduce
from torch import Tensor

from stabletx.functional._guards import repeat_heads

# Pairs of a head up to which batched products are taken: with several threads, of which the kernel
# makes little use where rows are short, and with one; measured.
PAIRS, PAIRS_OF_ONE_THREAD = 2**16, 2**14
# Bytes of weights that are made together, so that they stay in the processor's nearer cache.
AT_ONCE = 2**20
# Bytes; as torch aligns the memory that it allocates.
ALIGNMENT = 64

Kept = tuple[Tensor, ...]  # of the kernel (out, logsumexp); of products (weights,) or with what
#                            dropout left of them, bool


class How(NamedTuple):
    """What is asked of a piece beside its tensors."""

    scale: float
    is_causal: bool = False  # the first query sees the first key alone
    dropout_p: float = 0.0


def takes_products(n_queries: int, n_keys: int) -> bool:
    """Tell whether a piece of so many pairs a head goes through batched products."""
    limit = PAIRS if torch.get_num_threads() > 1 else PAIRS_OF_ONE_THREAD
    return n_queries * n_keys <= limit


def attend(
    q: Tensor,  # (b, h, t, d), float32 or float64, as k and v
    k: Tensor,  # (b, g, s, d)
    v: Tensor,  # (b, g, s, d)
    added: Tensor | None,  # (b|1, h|1, t|1, s), summands of the scores, -inf where blocked
    how: How,
    *,
    keep: bool,
    out: Tensor | None = None,  # (b, h, t, d), to write to
) -> tuple[Tensor, Kept]:  # (b, h, t, d)
    """Attend; give the output, and what ``gradients`` wants if it is to be kept."""
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return attend(q, k, v, added, how, keep=keep, out=out)
    q, k, v = (_settled(x) for x in (q, k, v))
    if how.dropout_p > 0 or takes_products(q.shape[2], k.shape[2]):
        out = torch.empty_like(q) if out is None else out
        return out, _products(q, k, v, added, how, keep, out)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mask = None if added is None else added.expand(*q.shape[:3], k.shape[2])
    found, log = kernel(q, k, v, 0.0, how.is_causal, attn_mask=mask, scale=how.scale)
    return found if out is None else out.copy_(found), (found, log) if keep else ()


def gradients(
    grad: Tensor,  # (b, h, t, d), of the output
    q: Tensor,
    k: Tensor,
    v: Tensor,
    added: Tensor | None,
    kept: Kept,
    how: How,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the gradients of q, k and v; the other arguments are those of ``attend``."""
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return gradients(grad, q, k, v, added, kept, how)
    grad, q, k, v = (_settled(x) for x in (grad, q, k, v))
    if kept[-1].ndim == 4:  # of every pair, where the kernel's logsumexp is of every row
        return _products_backward(grad, q, k, v, kept, how)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    mask = None if added is None else added.expand(*q.shape[:3], k.shape[2])
    found = kernel(grad, q, k, v, *kept, 0.0, how.is_causal, attn_mask=mask, scale=how.scale)
    dq, dk, dv = found
    return dq, dk, dv


def _settled(x: Tensor) -> Tensor:
    """Copy a view whose rows are not aligned as they would be in memory of their own.

    The bits of a product depend on the alignment of what it reads, and a guard's copy of such a
    view has another.
    """
    if is_aligned(x) or _is_fresh(x):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _is_fresh(x: Tensor) -> bool:
    """Tell whether ``x`` lies as memory of its own would."""
    return x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0


def is_aligned(x: Tensor) -> bool:
    """Tell whether every row begins with a cache line, here and in memory of its own."""
    steps = (step * x.element_size() for step in (x.shape[-1], *x.stride()[:-1]))
    return x.stride(-1) == 1 and not any(at % ALIGNMENT for at in (x.data_ptr(), *steps))


def _products(
    q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, how: How, keep: bool, out: Tensor
) -> Kept:
    (b, h, t, _), s = q.shape, k.shape[2]
    k, v = repeat_heads(k, h), repeat_heads(v, h)
    kept = [q.new_empty(b, h, t, s)] if keep else []
    if keep and how.dropout_p > 0:
        kept.append(torch.empty_like(kept[0], dtype=torch.bool))
    if how.is_causal:
        later = q.new_full((1, 1, t, s), -torch.inf).triu_(1)
        added = later if added is None else added + later
    for rows in _blocks(q, s):
        n = rows.stop - rows.start
        scores = kept[0][rows].flatten(0, 1) if keep else q.new_empty(n * h, t, s)
        pair = q[rows].flatten(0, 1), k[rows].flatten(0, 1).mT
        torch.baddbmm(scores, *pair, beta=0, alpha=how.scale, out=scores)
        if added is not None:
            scores.view(n, h, t, s).add_(added if added.shape[0] == 1 else added[rows])
        weights = torch.softmax(scores, -1, out=scores)
        if added is not None and bool(weights[..., 0].isnan().any()):
            weights.nan_to_num_(0.0)  # a row that sees nothing
        if how.dropout_p > 0:
            weights, left = torch.native_dropout(weights, how.dropout_p, True)
            if keep:
                kept[1][rows] = left.view(n, h, t, s)
        _multiply(weights, v[rows].flatten(0, 1), 1.0, out[rows])
    return tuple(kept)


def _multiply(a: Tensor, b: Tensor, factor: float, target: Tensor) -> None:
    """Write ``factor * a @ b``, of (n h) matrices each, into a target (n, h, ...)."""
    if _is_fresh(target) and target.dtype == a.dtype:
        whole = target.flatten(0, 1)
        torch.baddbmm(whole, a, b, beta=0, alpha=factor, out=whole)
    else:
        base = a.new_empty(1, 1, 1)  # not read
        target.copy_(torch.baddbmm(base, a, b, beta=0, alpha=factor).view(target.shape))


def _products_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Kept, how: How
) -> tuple[Tensor, Tensor, Tensor]:
    h, (g, s) = q.shape[1], k.shape[1:3]
    k, v = repeat_heads(k, h), repeat_heads(v, h)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    for rows in _blocks(q, s):
        grad_out, queries, keys, values, *saved = (
            x[rows].flatten(0, 1) for x in (grad, q, k, v, *kept)
        )
        weights = saved[0]
        used, grad_weights = weights, grad_out @ values.mT
        if how.dropout_p > 0:
            undone = (saved[1], 1 / (1 - how.dropout_p))
            used, grad_weights = (
                torch.ops.aten.native_dropout_backward(x, *undone) for x in (used, grad_weights)
            )
        slope = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        _multiply(used.mT, grad_out, 1.0, dv[rows])
        _multiply(slope, keys, how.scale, dq[rows])
        _multiply(slope.mT, queries, how.scale, dk[rows])
    if g == h:
        return dq, dk, dv
    dk, dv = (reduce(x, "b (g r) s d -> b g s d", "sum", g=g) for x in (dk, dv))
    return dq, dk, dv


def _blocks(q: Tensor, n_keys: int) -> Iterator[slice]:
    """Cut the batch into rows whose weights are made together."""
    b, h, t, _ = q.shape
    n = max(1, AT_ONCE // (h * t * n_keys * q.element_size()))
    return (slice(start, min(start + n, b)) for start in range(0, b, n))
