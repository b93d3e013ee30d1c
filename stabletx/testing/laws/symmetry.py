"""Laws about change: what a change of the inputs must do to the output."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from stabletx.testing.laws.ask import Ask
from stabletx.testing.laws.blocked import allowed_pairs
from stabletx.testing.laws.law import Law
from stabletx.testing.laws.limits import ones_limit
from stabletx.testing.laws.setting import (
    DIMS,
    FAMILIES,
    LONG,
    SHORT,
    SMALL_DIMS,
    Choices,
    Setting,
)

FORMULA = "the formula: softmax is a weighted mean"


def check_key_permutation(ask: Ask, setting: Setting) -> None:
    """Give the keys, values and mask columns in another order."""
    case = setting.case()
    order = torch.randperm(case.shape.s, generator=setting.source()).to(case.k.device)
    moved = replace(
        case,
        k=case.k[:, :, order],
        v=case.v[:, :, order],
        mask=None if case.mask is None else case.mask[..., order],
    )
    limit = 2 * ask.bound(case).out
    ask.within("With the keys in another order, out", ask.out(moved), ask.out(case), limit)


def check_query_permutation(ask: Ask, setting: Setting) -> None:
    """Give the queries and mask rows in another order."""
    case = setting.case()
    order = torch.randperm(case.shape.t, generator=setting.source()).to(case.q.device)
    moved = replace(
        case,
        q=case.q[:, :, order],
        grad_out=case.grad_out[:, :, order],
        mask=None if case.mask is None else case.mask[:, :, order],
    )
    limit = 2 * ask.bound(moved).out
    plain = ask.out(case)[:, :, order]
    ask.within("With the queries in another order, out", ask.out(moved), plain, limit)


def check_shift(ask: Ask, setting: Setting) -> None:
    """Take a common, exactly representable offset off all scores."""
    case = setting.case()
    k = case.k.clone()
    k[..., 0] = 0.0
    plain = replace(case, k=k)
    if "gradient" not in ask.features:
        limit = ask.bound(case).out + ask.bound(plain).out
        ask.within("With a common offset, out", ask.out(case), ask.out(plain), limit)
        return
    first, second = ask.bound(case, gradient=True), ask.bound(plain, gradient=True)
    shifted, answer = ask.answer(case), ask.answer(plain)
    for name in ("out", "dk", "dv"):
        limit = getattr(first, name) + getattr(second, name)
        # The offset's own channel of dk is that of all others: q is 1 there.
        ask.within(
            f"With a common offset, {name}", getattr(shifted, name), getattr(answer, name), limit
        )


def check_value_scaling(ask: Ask, setting: Setting) -> None:
    """Multiply the values by a power of two."""
    case = setting.case()
    power = 2.0 ** (4 if setting.dtype == torch.float16 else 20)
    bound, plain = ask.bound(case).out, ask.out(case)
    for factor in (power, -1.0):
        scaled = replace(case, v=case.v * factor)
        limit = bound * abs(factor) + ask.bound(scaled).out
        ask.within(f"With v times {factor:g}, out", ask.out(scaled), plain.double() * factor, limit)


def check_convexity(ask: Ask, setting: Setting) -> None:
    """See that the output stays between the smallest and the largest value it attends."""
    case = setting.case()
    z = case.shape
    out, bound = ask.out(case), ask.bound(case).out
    pairs = allowed_pairs(case).unsqueeze(-1).cpu()
    v = case.v.double().cpu().repeat_interleave(z.h // z.g, 1).unsqueeze(2)
    low = torch.where(pairs, v, torch.inf).amin(3)
    high = torch.where(pairs, v, -torch.inf).amax(3)
    live = pairs.any(3)
    low, high = torch.where(live, low, 0.0), torch.where(live, high, 0.0)
    inside = torch.minimum(torch.maximum(out.double().cpu(), low), high)
    ask.within("Between the smallest and the largest value, out", out, inside, bound)


def check_sum_to_one(ask: Ask, setting: Setting) -> None:
    """Let every value be 1: the output is the sum of the weights."""
    case = setting.case()
    case = replace(case, v=torch.ones_like(case.v))
    live = allowed_pairs(case).any(-1, keepdim=True).double().cpu()
    limit = ones_limit(case, ask.profile)
    ask.within("With every value 1, out", ask.out(case), live.expand(case.grad_out.shape), limit)


def check_duplicate_key(ask: Ask, setting: Setting) -> None:
    """Let every key stand twice."""
    case = setting.case()
    twice = replace(
        case,
        k=torch.cat([case.k, case.k], 2),
        v=torch.cat([case.v, case.v], 2),
        mask=None if case.mask is None else torch.cat([case.mask, case.mask], 3),
    )
    limit = ask.bound(case).out + ask.bound(twice).out
    ask.within("With every key twice, out", ask.out(twice), ask.out(case), limit)


def check_padding(ask: Ask, setting: Setting) -> None:
    """Append and prepend keys that the mask blocks."""
    case = setting.case()
    n = 1 + setting.seed % 9
    pairs = allowed_pairs(case)
    none = torch.zeros_like(pairs[..., :1]).expand(*pairs.shape[:3], n)
    bound, plain = ask.bound(case).out, ask.out(case)
    for side in ("behind", "before"):
        k, v = (_extend(x, n, side) for x in (case.k, case.v))
        mask = torch.cat([pairs, none] if side == "behind" else [none, pairs], -1)
        padded = replace(case, k=k, v=v, mask=mask)
        limit = bound + ask.bound(padded).out
        ask.within(f"With {n} blocked keys {side}, out", ask.out(padded), plain, limit)


def _extend(x: Tensor, n: int, side: str) -> Tensor:
    extra = torch.ones_like(x[:, :, :1]).expand(-1, -1, n, -1)
    return torch.cat([x, extra] if side == "behind" else [extra, x], 2)


def check_grouped_heads(ask: Ask, setting: Setting) -> None:
    """Repeat the keys for each query head; gradients add up over a group."""
    case = setting.case()
    z = case.shape
    n = z.h // z.g
    repeated = replace(case, k=case.k.repeat_interleave(n, 1), v=case.v.repeat_interleave(n, 1))
    if "gradient" not in ask.features:
        limit = 2 * ask.bound(case).out
        ask.within("With heads repeated, out", ask.out(case), ask.out(repeated), limit)
        return
    first, second = ask.bound(case, gradient=True), ask.bound(repeated, gradient=True)
    grouped, full = ask.answer(case), ask.answer(repeated)

    def added(x: Tensor) -> Tensor:
        return x.double().reshape(z.b, z.g, n, z.s, -1).sum(2)

    for name in ("out", "dq", "dk", "dv"):
        limit, more, want = getattr(first, name), getattr(second, name), getattr(full, name)
        if name in ("dk", "dv"):
            more, want = added(more), added(want)
        ask.within(f"With heads repeated, {name}", getattr(grouped, name), want, limit + more)


FEW = SHORT + LONG[:4]
LAWS = (
    Law(
        "key-permutation",
        "The order of the keys does not matter.",
        FORMULA,
        check_key_permutation,
        Choices(lengths=FEW, masks=("none", "random", "padding_right", "per_head")),
        share=0.5,
    ),
    Law(
        "query-permutation",
        "The order of the queries does not matter.",
        FORMULA,
        check_query_permutation,
        Choices(lengths=FEW, masks=("none", "random", "empty_rows", "per_head")),
        share=0.5,
    ),
    Law(
        "shift-invariance",
        "A common offset on the scores changes neither the output nor a gradient.",
        "softmax(x + c) = softmax(x)",
        check_shift,
        Choices(
            lengths=FEW,
            dims=DIMS[:2] + DIMS[3:4],
            families=("logit_offset",),
            masks=("none", "causal_top_left"),
        ),
        needs=("scale",),
        share=0.5,
    ),
    Law(
        "value-scaling",
        "Values times a power of two, or with the other sign, give the output times the same.",
        "the output is linear in the values",
        check_value_scaling,
        Choices(lengths=FEW, dims=SMALL_DIMS, masks=("none", "random")),
        share=0.4,
    ),
    Law(
        "convexity",
        "Each output lies between the smallest and the largest value that it attends.",
        FORMULA,
        check_convexity,
        Choices(lengths=FEW, families=FAMILIES[:8], masks=("none", "random", "empty_rows")),
        share=0.5,
    ),
    Law(
        "weights-sum-to-one",
        "Where every value is 1, the output is 1, or 0 without a key.",
        FORMULA,
        check_sum_to_one,
        Choices(
            families=FAMILIES[:-1],
            masks=("none", "random", "empty_rows", "padding_left&causal"),
            amplitudes=(1.0, 8.0, 0.125),
        ),
    ),
    Law(
        "duplicate-key",
        "Giving every key twice changes nothing.",
        FORMULA,
        check_duplicate_key,
        Choices(lengths=FEW, dims=SMALL_DIMS, masks=("none", "random")),
        needs=("cross",),
        share=0.4,
    ),
    Law(
        "padding",
        "Adding keys that the mask blocks, on either side, changes nothing.",
        "the formula: a blocked pair does not exist",
        check_padding,
        Choices(lengths=FEW, dims=SMALL_DIMS, masks=("none", "causal", "random")),
        needs=("mask", "cross"),
        share=0.5,
    ),
    Law(
        "grouped-heads",
        "Grouped heads give what repeated heads give: head i reads key head i * g // h.",
        "Ainslie et al. (2023), section 2.2",
        check_grouped_heads,
        Choices(
            lengths=SHORT + LONG[:2],
            heads=((1, 4, 2), (2, 3, 1), (1, 8, 2), (2, 6, 3)),
            dims=SMALL_DIMS,
            masks=("none", "causal", "per_head"),
        ),
        needs=("grouped",),
        share=0.5,
    ),
)
