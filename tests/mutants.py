"""A zoo of wrong attentions, each modelled on what a real kernel got wrong.

Every mutant is a right attention with one change. ``by`` names the law that must catch it, and
``dtypes`` those in which it is wrong.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from tests.correct_attentions import Ready, weights_of

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
ALL = (F32, F64, BF16, F16)
WIDE = (F32, F64)
SHORT = (BF16, F16)


@dataclass(frozen=True)
class Mutant:
    """A wrong attention."""

    name: str
    fn: Any
    by: str
    dtypes: tuple = ALL

    def __call__(self, q, k, v, *, mask=None, scale=None):
        return self.fn(q, k, v, mask, scale)


def keep(x, *_):
    return x


def attend(
    q, k, v, mask, scale, *,
    ready=keep, allowed=keep, scores=None, weights=weights_of, mix=None, out=keep, compute=None,
):  # fmt: skip
    """Attend rightly, but for the steps that are given."""
    x = Ready(q, k, v, mask, scale, compute or torch.promote_types(q.dtype, F32))
    x = ready(x) or x
    pairs = allowed(x.allowed)
    keys, values = x.full(x.k), x.full(x.v)
    found = scores(x, keys) if scores else x.q @ keys.mT * x.scale
    shares = weights(found, pairs)
    mixed = mix(shares, values) if mix else shares @ values
    return x.finish(out(mixed))


def change(name, by, dtypes=ALL, **steps):
    """Make a mutant that differs in the named steps."""
    return Mutant(name, lambda q, k, v, m, s: attend(q, k, v, m, s, **steps), by, dtypes)


def when(condition, wrong):
    """Apply ``wrong(q, k, v, mask, scale)`` where the condition on (q, k, v) holds."""

    def fn(q, k, v, mask, scale):
        if condition(q, k, v):
            return wrong(q, k, v, mask, scale)
        return attend(q, k, v, mask, scale)

    return fn


def through(dtype):
    """Round to a dtype and back."""
    return lambda x, *_: x.to(dtype).to(x.dtype)


def grad_hook(q, k, v, mask, scale, hooks):
    """Attend rightly; change the gradient of the named inputs on its way back."""
    tensors = {"q": q, "k": k, "v": v}
    for name, hook in hooks.items():
        tensors[name] = tensors[name].view_as(tensors[name])
        if tensors[name].requires_grad:
            tensors[name].register_hook(hook)
    return attend(tensors["q"], tensors["k"], tensors["v"], mask, scale)


def hooked(name, by, dtypes=ALL, **hooks):
    return Mutant(name, lambda q, k, v, m, s: grad_hook(q, k, v, m, s, hooks), by, dtypes)


# --- answers that are no attention -------------------------------------------------------------


def like_out(q, v):
    return q.sum(-1, keepdim=True) * 0 + v.sum() * 0 + q.new_zeros(*q.shape[:3], v.shape[3])


TRIVIAL = (
    Mutant("zeros", lambda q, k, v, m, s: attend(q, k, v, m, s) * 0, "agreement"),
    Mutant("constant", lambda q, k, v, m, s: attend(q, k, v, m, s) * 0 + 0.5, "agreement"),
    change("mean of the values", "agreement", scores=lambda x, keys: x.q @ keys.mT * 0),
    change("first value", "agreement", mix=lambda w, v: w * 0 @ v + v[:, :, :1]),
    change(
        "largest weight only", "agreement",
        weights=lambda s, a: torch.where(
            (w := weights_of(s, a)) == w.amax(-1, keepdim=True), w, w * 0
        ),
    ),
    change("noise of 1e-3", "determinism", WIDE, out=lambda o: o + 1e-3 * torch.randn_like(o)),
    change("dropout left on", "determinism", mix=lambda w, v: torch.dropout(w, 0.1, True) @ v),
    change("twice the answer", "weights-sum-to-one", out=lambda o: 2 * o),
    Mutant("values without weights", lambda q, k, v, m, s: like_out(q, v), "agreement"),
)  # fmt: skip

# --- masks -------------------------------------------------------------------------------------


def top_left(allowed):
    t, s = allowed.shape[-2:]
    bottom = torch.ones(t, s, dtype=torch.bool).tril(s - t)
    right = (allowed == bottom).all(-1, keepdim=True).all(-2, keepdim=True)
    return torch.where(right, torch.ones(t, s, dtype=torch.bool).tril(), allowed)


def leak_every_fourth(allowed):
    more = allowed | allowed.roll(1, -1) & (torch.arange(allowed.shape[-1]) > 0)
    rows = (torch.arange(allowed.shape[-2]) % 4 == 1)[:, None]
    return torch.where(rows & allowed.any(-1, keepdim=True), more, allowed)


def finite(value):
    def weights(scores, allowed):
        return scores.masked_fill(~allowed, value).softmax(-1)

    return weights


def additive(value):
    def weights(scores, allowed):
        return (scores + torch.where(allowed, 0.0, value)).softmax(-1)

    return weights


def raw(q, k, v, mask, scale, *, values=True, keys=True, rows=False, empty=0.0, weights=None):
    """Attend with what lies at blocked places left in, as today's tools do."""
    x = Ready(q, k, v, mask, scale, torch.promote_types(q.dtype, F32))
    own_k = x.full(k.to(x.q.dtype) if keys else x.k)
    own_v = x.full(v.to(x.q.dtype) if values else x.v)
    scores = x.q @ own_k.mT * x.scale
    out = (weights or weights_of)(scores, x.allowed) @ own_v
    if not rows:
        out = torch.where(x.live, out, empty)
    return out.to(q.dtype)


def no_finish(weights):
    """Attend without putting 0 into empty rows."""

    def fn(q, k, v, mask, scale):
        x = Ready(q, k, v, mask, scale, torch.promote_types(q.dtype, F32))
        shares = weights(x.q @ x.full(x.k).mT * x.scale, x.allowed)
        return (shares @ x.full(x.v)).to(q.dtype)

    return fn


def leaky_empty_gradient(q, k, v, mask, scale):
    """Give 0 for an empty row, but let its gradient through to the values."""
    x = Ready(q, k, v, mask, scale, torch.promote_types(q.dtype, F32))
    if not k.shape[2]:
        return attend(q, k, v, mask, scale)
    mean = x.full(v.to(x.q.dtype)).mean(-2, keepdim=True)
    ghost = (mean - mean.detach()) * (~x.live)
    return (attend(q, k, v, mask, scale).to(x.q.dtype) + ghost).to(q.dtype)


def memory_of_mask(q, k, v, mask, scale):
    """Read the mask's memory as if it lay in order."""
    if mask is not None and not mask.is_contiguous() and mask.stride(-1) != 0:
        b, h, t, s = mask.shape
        size = b * h * t * s
        flat = torch.as_strided(mask, (mask.untyped_storage().nbytes(),), (1,), 0)
        if flat.numel() >= size:
            mask = flat[:size].reshape(b, h, t, s)
    return attend(q, k, v, mask, scale)


def scaled_by_all(x):
    """Bring the keys to size 1 by the largest there is, blocked ones included."""
    return x.q @ (keys_of(x) / 3.0).mT * (x.scale * 3.0)


def keys_of(x):
    return x.full(x.k)


def range_of_everything(q, k, v, mask, scale):
    """Sanitise by isfinite, then scale by the largest key, blocked ones included."""
    clean = torch.where(k.isfinite(), k, 0).to(torch.promote_types(q.dtype, F32))
    top = clean.detach().abs().amax(dim=(-1, -2), keepdim=True).clamp(min=1.0) if k.numel() else 1
    x = Ready(q, k, v, mask, scale, torch.promote_types(q.dtype, F32))
    keys = x.full((x.k / top) * top)
    return x.finish(weights_of(x.q @ keys.mT * x.scale, x.allowed) @ x.full(x.v))


MASKS = (
    change("mask ignored", "agreement", allowed=lambda a: torch.ones_like(a)),
    change("mask inverted", "exact-selection", allowed=lambda a: ~a | a.all()),
    change("causal aligned top left", "decode", allowed=top_left),
    change("mask shifted by a key", "exact-selection", allowed=lambda a: a.roll(1, -1)),
    change("mask shifted by a query", "exact-selection", allowed=lambda a: a.roll(1, -2)),
    change(
        "mask transposed", "exact-selection",
        allowed=lambda a: a.mT if a.shape[-1] == a.shape[-2] else a,
    ),
    change(
        "window one too wide", "exact-selection",
        allowed=lambda a: a | (a.roll(1, -1) & (torch.arange(a.shape[-1]) > 0)),
    ),
    change(
        "window one too narrow", "exact-selection",
        allowed=lambda a: torch.where(
            (n := a & a.roll(-1, -1)).any(-1, keepdim=True), n, a
        ),
    ),
    change("mask of the first example", "exact-selection", allowed=lambda a: a[:1].expand_as(a)),
    change("mask of the first head", "exact-selection", allowed=lambda a: a[:, :1].expand_as(a)),
    change(
        "padding ignored, order kept", "exact-selection",
        allowed=lambda a: a.any(0, keepdim=True).expand_as(a),
    ),
    change("causal leak every fourth query", "causality", allowed=leak_every_fourth),
    change(
        "causal leak from 128 queries on", "causality",
        allowed=lambda a: leak_every_fourth(a) if a.shape[-2] >= 128 else a,
    ),
    Mutant("mask memory reinterpreted", memory_of_mask, "layout"),
    change("masked with -20", "exact-selection", weights=finite(-20.0)),
    change("-1e4 added to the score", "exact-selection", WIDE, weights=additive(-1e4)),
    Mutant("masked with -1e4", no_finish(finite(-1e4)), "empty-rows"),
    Mutant("masked with -1e9", no_finish(finite(-1e9)), "empty-rows", (F32, F64, BF16)),
    Mutant("masked with -inf", no_finish(finite(-math.inf)), "empty-rows"),
    Mutant(
        "mean of the values in empty rows",
        lambda q, k, v, m, s: raw(q, k, v, m, s, values=False, keys=False,
                                  empty=v.float().mean() if v.numel() else 0.0),
        "empty-rows",
    ),
    Mutant(
        "NaN in empty rows",
        lambda q, k, v, m, s: raw(q, k, v, m, s, values=False, keys=False, empty=math.nan),
        "empty-rows",
    ),
    Mutant("NaN gradient of empty rows",
           lambda q, k, v, m, s: raw(q, k, v, m, s, values=False, keys=False,
                                     weights=finite(-math.inf)),
           "empty-rows-gradient"),
    Mutant("empty rows leak into dv", leaky_empty_gradient, "empty-rows-gradient"),
    change(
        "mask after the softmax", "exact-selection",
        weights=lambda s, a: torch.where(a, weights_of(s, torch.ones_like(a)), 0),
    ),
    Mutant("garbage leaks through values",
           lambda q, k, v, m, s: raw(q, k, v, m, s, keys=False), "blocked-is-absent"),
    Mutant("garbage leaks through an added mask",
           lambda q, k, v, m, s: raw(q, k, v, m, s, values=False, weights=additive(-math.inf)),
           "blocked-is-absent"),
    Mutant("garbage leaks into dq only",
           lambda q, k, v, m, s: raw(q, k, v, m, s, values=False), "blocked-has-no-gradient"),
    Mutant("blocked garbage sets the range", range_of_everything, "blocked-is-absent", WIDE),
)  # fmt: skip

# --- scores and weights ------------------------------------------------------------------------


def flushed(scores, allowed):
    weights = weights_of(scores, allowed)
    return torch.where(weights < 1e-4, 0, weights)


def divided(total_of):
    """Softmax with another row sum."""

    def weights(scores, allowed):
        scores = scores.masked_fill(~allowed, -math.inf)
        if not scores.shape[-1]:
            return scores
        top = scores.amax(-1, keepdim=True)
        exps = (scores - torch.where(top.isinf(), 0, top).detach()).exp()
        total = total_of(exps)
        return exps / torch.where(total == 0, 1, total)

    return weights


def exp_of(exp, top_of=lambda s: s.amax(-1, keepdim=True)):
    """Softmax with another exponential, or another maximum."""

    def weights(scores, allowed):
        scores = scores.masked_fill(~allowed, -math.inf)
        if not scores.shape[-1]:
            return scores
        top = top_of(scores)
        exps = exp(scores - torch.where(top.isinf(), 0, top).detach())
        exps = torch.where(allowed, exps, 0)
        total = exps.sum(-1, keepdim=True)
        return exps / torch.where(total == 0, 1, total)

    return weights


def summed(total):
    return lambda e: total(e).to(e.dtype)


def scaled(factor):
    return lambda x, keys: x.q @ keys.mT * (x.scale * factor)


def default_scale(x, keys):
    return x.q @ keys.mT * max(1, x.q.shape[-1]) ** -0.5


def wide_scale(q, k, v, mask, scale):
    return attend(q, k, v, mask, v.shape[3] ** -0.5 if scale is None and v.shape[3] else scale)


def width_scale(q, k, v, mask, scale):
    return attend(q, k, v, mask, 1 / max(1, q.shape[3]) if scale is None else scale)


def tf32(x):
    return x + (x * 2.0**13 - (x * 2.0**13)).detach() if x.dtype == F64 else cut(x)


def cut(x):
    """Keep ten bits of the fraction."""
    whole = x.detach().contiguous().view(torch.int32) & ~0x1FFF
    return x + (whole.view(F32) - x).detach()


def tie_breaker(scores, allowed):
    """Give all weight to the first where all scores of a row agree."""
    weights = weights_of(scores, allowed)
    if scores.shape[-1] < 2:
        return weights
    tied = (scores == scores[..., :1]).all(-1, keepdim=True)
    first = allowed & (allowed.cumsum(-1) == 1)
    return torch.where(tied, first.to(weights.dtype) + 0 * weights, weights)


def far_rows_empty(scores, allowed):
    """Take a row whose scores all lie below -88 for empty."""
    weights = weights_of(scores, allowed)
    if not scores.shape[-1]:
        return weights
    top = scores.masked_fill(~allowed, -math.inf).amax(-1, keepdim=True)
    return torch.where(top < -88, 0 * weights, weights)


def drop_key(index, condition=lambda s: True):
    def allowed(a):
        s = a.shape[-1]
        if s < 2 or not condition(s):
            return a
        fewer = a & (torch.arange(s) != index % s)
        return torch.where(fewer.any(-1, keepdim=True), fewer, a)

    return allowed


def count_twice(e):
    extra = e[..., 64:65].sum(-1, keepdim=True) if e.shape[-1] > 64 else 0
    return e.sum(-1, keepdim=True) + extra


WEIGHTS = (
    change("scale off by 1e-4", "agreement", WIDE, scores=scaled(1 + 1e-4)),
    change("scale off by 1 %", "agreement", scores=scaled(1.01)),
    change("scale given but ignored", "agreement", scores=default_scale),
    Mutant("scale 1/d", width_scale, "scale"),
    Mutant("scale of the value width", wide_scale, "agreement"),
    change("scores stored in bfloat16", "agreement",
           scores=lambda x, keys: through(BF16)(x.q @ keys.mT * x.scale)),
    change("scores stored in float16", "agreement",
           scores=lambda x, keys: through(F16)(x.q @ keys.mT * x.scale)),
    change("scores overflow in float16", "extreme-gradient", (F16,),
           scores=lambda x, keys: through(F16)(x.q @ keys.mT) * x.scale),
    change("scores from ten bits", "agreement", (F32,),
           scores=lambda x, keys: cut(x.q) @ cut(keys).mT * x.scale),
    change("scores clamped at 30", "agreement",
           scores=lambda x, keys: (x.q @ keys.mT * x.scale).clamp(-30, 30)),
    change("no maximum subtracted", "agreement",
           weights=exp_of(torch.exp, lambda s: torch.zeros_like(s[..., :1]))),
    change("maximum of the first block only", "agreement",
           weights=exp_of(torch.exp, lambda s: s[..., :16].amax(-1, keepdim=True))),
    change("maximum over the batch", "agreement",
           weights=exp_of(torch.exp, lambda s: s.amax(dim=(0, 1, 2, 3), keepdim=True)
                          if s.numel() else s[..., :1])),
    change("softmax over the queries", "agreement",
           weights=lambda s, a: weights_of(s.mT, a.mT).mT),
    change("softmax per block of 16 keys", "agreement",
           weights=lambda s, a: torch.cat(
               [weights_of(x, y) for x, y in zip(s.split(16, -1), a.split(16, -1), strict=True)], -1
           ) / max(1, len(s.split(16, -1)))),
    change("base two without log2(e)", "agreement", weights=exp_of(torch.exp2)),
    change("first of the tied keys", "agreement", weights=tie_breaker),
    change("far rows taken for empty", "agreement", weights=far_rows_empty),
    change("last key dropped", "exact-selection", allowed=drop_key(-1)),
    change("first key dropped", "exact-selection", allowed=drop_key(0)),
    change("tail key dropped", "exact-selection", allowed=drop_key(-1, lambda s: s % 16 == 1)),
    change("weights stored in bfloat16", "agreement", WIDE,
           weights=lambda s, a: through(BF16)(weights_of(s, a))),
    change("weights stored in float16", "agreement", WIDE,
           weights=lambda s, a: through(F16)(weights_of(s, a))),
    change("row sum in bfloat16", "weights-sum-to-one", WIDE,
           weights=divided(summed(lambda e: e.to(BF16).cumsum(-1)[..., -1:]))),
    change("row sum misses the last key", "weights-sum-to-one",
           weights=divided(lambda e: e[..., :-1].sum(-1, keepdim=True) + 0 * e[..., :1])),
    change("row sum counts a key twice", "weights-sum-to-one", weights=divided(count_twice)),
    change("1e-6 in the denominator", "exact-selection", WIDE,
           weights=divided(lambda e: e.sum(-1, keepdim=True) + 1e-6)),
    change("1 in the denominator", "weights-sum-to-one",
           weights=divided(lambda e: e.sum(-1, keepdim=True) + 1)),
    change("small weights flushed", "agreement", WIDE, weights=flushed),
    change("exponential off by 1e-4", "agreement", WIDE,
           weights=exp_of(lambda x: x.exp() * (1 + 1e-4 * torch.sin(37 * x)))),
    change("values in float16", "agreement", (F32, BF16), mix=lambda w, v: w @ through(F16)(v)),
    change("output through float16", "agreement", (F32, F64, BF16), out=through(F16)),
    change("output through bfloat16", "agreement", (F32, F64, F16), out=through(BF16)),
    change("float64 in float32", "agreement", (F64,), compute=F32),
    change("all in the input dtype", "agreement", SHORT,
           scores=lambda x, keys: through(BF16)(x.q @ keys.mT * x.scale),
           weights=lambda s, a: through(BF16)(weights_of(s, a))),
)  # fmt: skip

# --- gradients ---------------------------------------------------------------------------------


class Backward(torch.autograd.Function):
    """A backward pass written by hand, with one slip."""

    @staticmethod
    def forward(ctx, q, k, v, allowed, scale, slip):
        scores = (q @ k.mT * scale).masked_fill(~allowed, -math.inf)
        weights = weights_of(scores, allowed)
        out = weights @ v
        ctx.save_for_backward(q, k, v, scores, weights, out)
        ctx.scale, ctx.slip = scale, slip
        return out

    @staticmethod
    def backward(ctx, g):
        q, k, v, scores, weights, out = ctx.saved_tensors
        slip, used = ctx.slip, weights
        if slip == "lse" and scores.shape[-1]:
            lse = scores.logsumexp(-1, keepdim=True)
            used = torch.where(lse.isinf(), 0, (scores - lse).exp())
        pulls = g @ v.mT
        delta = (weights * pulls).sum(-1, keepdim=True)
        if slip == "delta":
            delta = (g * out.to(BF16).to(g.dtype)).sum(-1, keepdim=True)
        if slip == "no delta":
            delta = torch.zeros_like(delta)
        inner = used * (pulls - delta)
        if slip == "bf16 scores":
            inner = inner.to(BF16).to(g.dtype)
        dk = inner.mT @ q * (1.0 if slip == "scale" else ctx.scale)
        dv = used.mT @ g
        if slip == "blocks":
            dv = sum_in(g.dtype, [w.mT @ x for w, x in blocks(used, g)])
            dk = sum_in(g.dtype, [w.mT @ x for w, x in blocks(inner, q)]) * ctx.scale
        return inner @ k * ctx.scale, dk, dv, None, None, None


def blocks(a, b):
    return zip(a.split(8, -2), b.split(8, -2), strict=True)


def sum_in(dtype, parts):
    """Add up in bfloat16."""
    total = torch.zeros_like(parts[0]) if parts else 0
    for part in parts:
        total = (total + part).to(BF16).to(dtype)
    return total


def slipped(name, slip, by, dtypes=ALL):
    def fn(q, k, v, mask, scale):
        x = Ready(q, k, v, mask, scale, torch.promote_types(q.dtype, F32))
        return x.finish(Backward.apply(x.q, x.full(x.k), x.full(x.v), x.allowed, x.scale, slip))

    return Mutant(name, fn, by, dtypes)


def zero_at(axis, index):
    def hook(grad):
        if grad.shape[axis] < 2:
            return grad
        wrong = grad.clone()
        wrong.select(axis, index).zero_()
        return wrong

    return hook


def nan_at_64_past(grad):
    return grad * math.nan if grad.shape[2] % 128 == 64 else grad


def last_of_group(q, k, v, mask, scale):
    """Let only the last query head of a group reach dk and dv."""
    n = q.shape[1] // k.shape[1]
    last = torch.arange(q.shape[1]) % n == n - 1
    x = Ready(q, k, v, mask, scale, torch.promote_types(q.dtype, F32))

    def own(y):
        y = x.full(y)
        return torch.where(last[:, None, None], y, y.detach())

    shares = weights_of(x.q @ own(x.k).mT * x.scale, x.allowed)
    return x.finish(shares @ own(x.v))


GRADIENTS = (
    Mutant("q detached", lambda q, k, v, m, s: attend(q.detach(), k, v, m, s), "gradient-exists"),
    Mutant("k detached", lambda q, k, v, m, s: attend(q, k.detach(), v, m, s), "gradient-exists"),
    Mutant("v detached", lambda q, k, v, m, s: attend(q, k, v.detach(), m, s), "gradient-exists"),
    Mutant("all detached", lambda q, k, v, m, s: attend(q, k, v, m, s).detach(), "gradient-exists"),
    slipped("no delta in the backward pass", "no delta", "score-gradient-sum"),
    slipped("delta from a rounded output", "delta", "gradient-agreement", WIDE),
    slipped("weights from a rounded logsumexp", "lse", "value-gradient-sum", WIDE),
    slipped("dk without the scale", "scale", "gradient-agreement"),
    slipped("score gradient in bfloat16", "bf16 scores", "gradient-agreement", WIDE),
    slipped("dk and dv added up in bfloat16", "blocks", "gradient-agreement"),
    hooked("dq twice", "gradient-agreement", q=lambda g: 2 * g),
    hooked("dv with the other sign", "value-gradient-sum", v=lambda g: -g),
    hooked("dq of the last query missing", "gradient-agreement", q=zero_at(2, -1)),
    hooked("dk of the last key missing", "gradient-agreement", k=zero_at(2, -1)),
    hooked("dv of the first key missing", "value-gradient-sum", v=zero_at(2, 0)),
    hooked("dk of the second example missing", "gradient-agreement", k=zero_at(0, 1)),
    hooked("dv rounded to float16", "gradient-agreement", WIDE, v=through(F16)),
    hooked("NaN in dq where n % 128 is 64", "gradient-agreement", q=nan_at_64_past),
    hooked("dk off by 1e-3", "gradient-agreement", WIDE, k=lambda g: g * 1.001),
    hooked("dv shifted by a key", "gradient-agreement", v=lambda g: g.roll(1, 2)),
    hooked("dq clipped at 1", "gradient-agreement", q=lambda g: g.clamp(-1, 1)),
    hooked("dq wrong for one query", "gradient-agreement",
           q=lambda g: g * 0.5 if g.shape[2] == 1 else g),
    Mutant("dk and dv of the last head only", last_of_group, "grouped-heads"),
)  # fmt: skip

# --- heads, batches, layouts, conduct ----------------------------------------------------------


def heads_modulo(q, k, v, mask, scale):
    order = torch.arange(q.shape[1]) % k.shape[1]
    return attend(q, k[:, order], v[:, order], mask, scale)


def leak(axis):
    """Let a trace of the neighbour along an axis into the values."""

    def fn(q, k, v, mask, scale):
        mixed = v + 1e-2 * v.roll(1, axis) if v.shape[axis] > 1 else v
        return attend(q, k, mixed, mask, scale)

    return fn


def memory(x):
    """Read a tensor's memory as if it lay in order."""
    if x.is_contiguous() or x.requires_grad:
        return x
    storage = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    if storage.numel() < x.numel():
        return x.contiguous()
    return storage[: x.numel()].reshape(x.shape)


def expanded_once(q, k, v, mask, scale):
    """Take keys that are expanded over the batch for keys that are expanded over the heads."""
    if k.stride(0) == 0 and k.shape[0] > 1 and k.shape[1] > 1:
        k = k[:, :1].expand_as(k)
    if k.stride(1) == 0 and k.shape[1] > 1:
        v = v * 1.01
    return attend(q, k, v, mask, scale)


def contiguous_only(q, k, v, mask, scale):
    for x in (q, k, v):
        if not x.is_contiguous():
            raise RuntimeError("expected a contiguous tensor")
    return attend(q, k, v, mask, scale)


def writes(which):
    def fn(q, k, v, mask, scale):
        out = attend(q, k, v, mask, scale)
        with torch.no_grad():
            {"q": q, "v": v}[which].data.mul_(0.5)
        return out

    return fn


class Stateful:
    """Keep the keys of the last call of the same shape."""

    def __init__(self):
        self.last = {}

    def __call__(self, q, k, v, mask, scale):
        out = attend(q, k, v, mask, scale)
        extra = self.last.get("norm", 0.0)
        self.last["norm"] = 1e-3 * float(k.detach().double().nan_to_num().clamp(-9, 9).sum())
        return out + extra


def refuse_one_key(q, k, v, mask, scale):
    if k.shape[2] == 1:
        raise IndexError("index out of range")
    return attend(q, k, v, mask, scale)


def swallow(q, k, v, mask, scale):
    x = Ready(q, k, v, mask, scale, torch.promote_types(q.dtype, F32))
    x.spoilt = None
    return x.finish(weights_of(x.q @ x.full(x.k).mT * x.scale, x.allowed) @ x.full(x.v))


def spread_nan(q, k, v, mask, scale):
    """Turn the whole head NaN where one row is."""
    out = attend(q, k, v, mask, scale)
    return out + 0 * out.sum(dim=(-1, -2), keepdim=True)


def half_width(q, k, v, mask, scale):
    d = q.shape[3]
    own = scale if scale is not None else max(1, d) ** -0.5
    return attend(q[..., : d - d % 8], k[..., : d - d % 8], v, mask, own)


def rows_beyond(q, k, v, mask, scale):
    out = attend(q, k, v, mask, scale)
    return out * (torch.arange(q.shape[2]) < k.shape[2])[:, None]


def slow_for_three(q, k, v, mask, scale):
    if q.shape[2] == 3:
        time.sleep(60)
    return attend(q, k, v, mask, scale)


def worse(q, k, v, mask, scale):
    return attend(q, k, v, mask, scale) * 1.01


def from_128(q, k, v, mask, scale):
    late = torch.arange(q.shape[2]) >= 128
    out = attend(q, k, v, mask, scale)
    return torch.where(late[:, None], out * 1.01, out)


def first_512(q, k, v, mask, scale):
    mask = None if mask is None else mask[..., :512]
    return attend(q, k[:, :, :512], v[:, :, :512], mask, scale)


CONDUCT = (
    Mutant("heads by modulo", heads_modulo, "grouped-heads"),
    Mutant("heads in reverse",
           lambda q, k, v, m, s: attend(q, k.flip(1), v.flip(1), m, s), "exact-selection"),
    Mutant("first key head for all",
           lambda q, k, v, m, s: attend(q, k[:, :1].expand_as(k), v, m, s), "agreement"),
    Mutant("batch leak", leak(0), "batch-independence"),
    Mutant("head leak", leak(1), "head-independence"),
    Mutant("key leak", leak(2), "causality"),
    Mutant("channel leak", leak(3), "agreement"),
    Mutant("memory read as contiguous",
           lambda q, k, v, m, s: attend(memory(q), memory(k), memory(v), m, s), "agreement"),
    Mutant("expanded keys mistaken", expanded_once, "layout"),
    Mutant("contiguous tensors only", contiguous_only, "layout"),
    Mutant("float32 out", lambda q, k, v, m, s: attend(q, k, v, m, s).float(), "form", SHORT),
    Mutant("axes swapped in the output",
           lambda q, k, v, m, s: attend(q, k, v, m, s).transpose(1, 2), "form"),
    Mutant("a pair returned", lambda q, k, v, m, s: (attend(q, k, v, m, s), None), "form"),
    Mutant("writes to q", writes("q"), "no-write"),
    Mutant("writes to v", writes("v"), "no-write"),
    Mutant("state between calls", Stateful(), "determinism", WIDE),
    Mutant("raises for one key", refuse_one_key, "agreement"),
    Mutant("NaN swallowed to 0", swallow, "honest-nan"),
    Mutant("NaN replaced in the output",
           lambda q, k, v, m, s: attend(q, k, v, m, s).nan_to_num(), "honest-nan"),
    Mutant("NaN spread over the head", spread_nan, "contained-nan"),
    Mutant("width cut to a multiple of 8", half_width, "agreement"),
    Mutant("rows beyond the keys are 0", rows_beyond, "agreement"),
    Mutant("wrong for one query", when(lambda q, k, v: q.shape[2] == 1, worse), "agreement"),
    Mutant("wrong for one key", when(lambda q, k, v: k.shape[2] == 1, worse), "agreement"),
    Mutant("wrong from 128 queries on", from_128, "agreement"),
    Mutant("wrong for 64 past 128",
           when(lambda q, k, v: q.shape[2] % 128 == 64, worse), "agreement"),
    Mutant("only the first 512 keys", first_512, "agreement"),
    Mutant("wrong for eight heads", when(lambda q, k, v: q.shape[1] == 8, worse), "agreement"),
    Mutant("wrong for three examples", when(lambda q, k, v: q.shape[0] == 3, worse), "agreement"),
    Mutant("wrong for a width of 128", when(lambda q, k, v: q.shape[3] == 128, worse), "agreement"),
    Mutant("wrong for other value widths",
           when(lambda q, k, v: q.shape[3] != v.shape[3], worse), "agreement"),
    Mutant("wrong in float16", when(lambda q, k, v: q.dtype == F16, worse), "agreement", (F16,)),
    Mutant("wrong in bfloat16", when(lambda q, k, v: q.dtype == BF16, worse), "agreement", (BF16,)),
    Mutant("wrong in float64", when(lambda q, k, v: q.dtype == F64, worse), "agreement", (F64,)),
    Mutant("wrong for permuted queries",
           when(lambda q, k, v: q.shape[1] > 1 and q.shape[2] > 1 and q.stride(1) < q.stride(2),
                worse), "layout"),
)  # fmt: skip

HANGS = Mutant("hangs for three queries", slow_for_three, "agreement")
MUTANTS = (*TRIVIAL, *MASKS, *WEIGHTS, *GRADIENTS, *CONDUCT)
