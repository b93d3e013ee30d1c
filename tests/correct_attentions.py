"""Attentions that are right in different ways: none may ever be flagged.

Each keeps the contract (blocked is absent, empty rows are zero, NaN stays with who attends it)
and computes in float32 at least; what differs is the arithmetic.
"""

import math

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


class Ready:
    """Inputs with the garbage taken out, and where the answer has to be spoilt again."""

    def __init__(self, q, k, v, mask, scale, dtype):
        b, h, t, d = q.shape
        g, s = k.shape[1], k.shape[2]
        self.dtype = q.dtype
        self.repeat = h // g
        self.scale = d**-0.5 if scale is None and d else (1.0 if scale is None else scale)
        self.allowed = torch.ones(b, h, t, s, dtype=torch.bool, device=q.device)
        if mask is not None:
            self.allowed = mask.expand(b, h, t, s)
        self.live = self.allowed.any(-1, keepdim=True)
        seen = self.allowed.any(-2).reshape(b, g, h // g, s).any(2)[..., None]
        q, k, v = (x.to(dtype) for x in (q, k, v))
        k, v = torch.where(seen, k, 0), torch.where(seen, v, 0)
        q = torch.where(self.live, q, 0)
        bad_q, bad_k, bad_v = (~x.isfinite() for x in (q, k, v))
        self.spoilt = None
        if bool(bad_q.any() | bad_k.any() | bad_v.any()):
            see = self.allowed.to(dtype)
            lost_k = bad_k.any(-1).repeat_interleave(h // g, 1).to(dtype)
            rows = torch.einsum("bhts,bhs->bht", see, lost_k) > 0
            channels = see @ bad_v.repeat_interleave(h // g, 1).to(dtype) > 0
            self.spoilt = channels | (rows[..., None] | bad_q.any(-1, keepdim=True)) & self.live
        self.q = torch.where(bad_q, 0, q)
        self.k = torch.where(bad_k, 0, k)
        self.v = torch.where(bad_v, 0, v)

    def full(self, x):
        return x.repeat_interleave(self.repeat, 1)

    def finish(self, out):
        out = torch.where(self.live, out, 0)
        if self.spoilt is not None:
            out = torch.where(self.spoilt, math.nan, out)
        return out.to(self.dtype)


def weights_of(scores, allowed):
    scores = scores.masked_fill(~allowed, -math.inf)
    if not scores.shape[-1]:
        return scores
    top = scores.amax(-1, keepdim=True)
    exps = (scores - torch.where(top.isinf(), 0, top).detach()).exp()
    total = exps.sum(-1, keepdim=True)
    return exps / torch.where(total == 0, 1, total)


def plain(q, k, v, mask, scale, dtype):
    x = Ready(q, k, v, mask, scale, dtype)
    scores = x.q @ x.full(x.k).mT * x.scale
    return x.finish(weights_of(scores, x.allowed) @ x.full(x.v))


def in_float64(q, k, v, *, mask=None, scale=None):
    return plain(q, k, v, mask, scale, torch.float64)


def in_float32(q, k, v, *, mask=None, scale=None):
    return plain(q, k, v, mask, scale, torch.promote_types(q.dtype, torch.float32))


def grouped_einsum(q, k, v, *, mask=None, scale=None):
    """Never repeats a head: the query heads of a group are an axis of their own."""
    x = Ready(q, k, v, mask, scale, torch.promote_types(q.dtype, torch.float32))
    b, h, t, d = q.shape
    g, s = k.shape[1], k.shape[2]
    groups = (x.q * x.scale).reshape(b, g, h // g, t, d)
    scores = torch.einsum("bgrtd,bgsd->bgrts", groups, x.k)
    weights = weights_of(scores, x.allowed.reshape(b, g, h // g, t, s))
    return x.finish(torch.einsum("bgrts,bgse->bgrte", weights, x.v).reshape(b, h, t, -1))


def row_by_row(q, k, v, *, mask=None, scale=None):
    """One query at a time, over all of its keys."""
    x = Ready(q, k, v, mask, scale, torch.promote_types(q.dtype, torch.float32))
    keys, values = x.full(x.k), x.full(x.v)
    rows = []
    for i in range(q.shape[2]):
        scores = (keys * x.q[:, :, i, None]).sum(-1) * x.scale
        weights = weights_of(scores, x.allowed[:, :, i])
        rows.append((weights[..., None] * values).sum(-2))
    if not rows:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    return x.finish(torch.stack(rows, 2))


def tiled(q, k, v, mask, scale, block):
    """Keys in blocks, with a running maximum and a running sum."""
    x = Ready(q, k, v, mask, scale, torch.promote_types(q.dtype, torch.float32))
    keys, values = x.full(x.k), x.full(x.v)
    b, h, t, _ = q.shape
    top = x.q.new_full((b, h, t, 1), -math.inf)
    total = x.q.new_zeros(b, h, t, 1)
    out = x.q.new_zeros(b, h, t, v.shape[3])
    for start in range(0, k.shape[2], block):
        part = slice(start, start + block)
        scores = x.q @ keys[:, :, part].mT * x.scale
        scores = scores.masked_fill(~x.allowed[..., part], -math.inf)
        now = torch.maximum(top, scores.detach().amax(-1, keepdim=True))
        base = torch.where(now.isinf(), 0, now)
        exps, fade = (scores - base).exp(), (torch.where(top.isinf(), base, top) - base).exp()
        total, out = (
            total * fade + exps.sum(-1, keepdim=True),
            out * fade + exps @ values[:, :, part],
        )
        top = now
    return x.finish(out / torch.where(total == 0, 1, total))


def tiled_by_16(q, k, v, *, mask=None, scale=None):
    return tiled(q, k, v, mask, scale, 16)


def tiled_by_length(q, k, v, *, mask=None, scale=None):
    """The block follows the length, so that other lengths are added up in another order."""
    return tiled(q, k, v, mask, scale, max(5, k.shape[2] // 3))


def sdpa_math_made_safe(q, k, v, *, mask=None, scale=None):
    """torch's own formula, with clean inputs."""
    x = Ready(q, k, v, mask, scale, torch.promote_types(q.dtype, torch.float32))
    if not k.shape[2] or not q.numel():
        return q.new_zeros(*q.shape[:3], v.shape[3])
    with sdpa_kernel([SDPBackend.MATH]):
        out = scaled_dot_product_attention(
            x.q, x.full(x.k), x.full(x.v), attn_mask=x.allowed, scale=x.scale
        )
    return x.finish(out)


class ByHand(torch.autograd.Function):
    """Forward and backward written out; keeps the weights."""

    @staticmethod
    def forward(ctx, q, k, v, allowed, scale):
        weights = weights_of(q @ k.mT * scale, allowed)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale = scale
        return weights @ v

    @staticmethod
    def backward(ctx, g):
        q, k, v, weights = ctx.saved_tensors
        pulls = g @ v.mT
        inner = weights * (pulls - (weights * pulls).sum(-1, keepdim=True))
        return inner @ k * ctx.scale, inner.mT @ q * ctx.scale, weights.mT @ g, None, None


def written_backward(q, k, v, *, mask=None, scale=None):
    x = Ready(q, k, v, mask, scale, torch.promote_types(q.dtype, torch.float32))
    return x.finish(ByHand.apply(x.q, x.full(x.k), x.full(x.v), x.allowed, x.scale))


def base_two(q, k, v, *, mask=None, scale=None):
    """Powers of two in place of exponentials, the factor log2(e) after the maximum is off."""
    x = Ready(q, k, v, mask, scale, torch.promote_types(q.dtype, torch.float32))
    scores = (x.q @ x.full(x.k).mT * x.scale).masked_fill(~x.allowed, -math.inf)
    if not k.shape[2]:
        return x.finish(scores @ x.full(x.v))
    top = scores.amax(-1, keepdim=True)
    exps = ((scores - torch.where(top.isinf(), 0, top).detach()) * math.log2(math.e)).exp2()
    total = exps.sum(-1, keepdim=True)
    return x.finish((exps / torch.where(total == 0, 1, total)) @ x.full(x.v))


def keys_first(q, k, v, *, mask=None, scale=None):
    """Scores transposed, softmax over the first of the two axes, the division last."""
    x = Ready(q, k, v, mask, scale, torch.promote_types(q.dtype, torch.float32))
    scores = x.full(x.k) @ (x.q * x.scale).mT
    scores = scores.masked_fill(~x.allowed.mT, -math.inf)
    if not k.shape[2]:
        return x.finish(scores.mT @ x.full(x.v))
    top = scores.amax(-2, keepdim=True)
    exps = (scores - torch.where(top.isinf(), 0, top).detach()).exp()
    total = exps.sum(-2)[..., None]
    return x.finish((exps.mT @ x.full(x.v)) / torch.where(total == 0, 1, total))


CORRECT = (
    in_float64,
    in_float32,
    grouped_einsum,
    row_by_row,
    tiled_by_16,
    tiled_by_length,
    sdpa_math_made_safe,
    written_backward,
    base_two,
    keys_first,
)
