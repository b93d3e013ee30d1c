"""Laws about what an attention may offer beside mask and scale: asked where it says it does."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import torch
from torch import Tensor

from stabletx.testing.cases import AttentionCase
from stabletx.testing.laws.accuracy import BOUND, check_agreement, check_gradient_agreement
from stabletx.testing.laws.ask import Ask
from stabletx.testing.laws.blocked import allowed_pairs
from stabletx.testing.laws.gradients import hold_value_gradient_sum
from stabletx.testing.laws.law import Law, NotAsked, Violation
from stabletx.testing.laws.limits import lse_limit
from stabletx.testing.laws.setting import LONG, SHORT, SMALL_DIMS, Choices, Setting

SOME = ("none", "causal", "padding_left", "random", "empty_rows")
FEW = SHORT + LONG[:3]


def check_option_gradient(ask: Ask, setting: Setting) -> None:
    """Compare the gradient of the bias or of the sinks with the reference."""
    case = setting.case()
    name = "bias" if setting.bias != "none" else "sinks"
    given = getattr(case, name)
    if given is None:
        raise NotAsked(f"the case has no {name}")
    exact, bound = (
        getattr(case.gradients(), f"d{name}"),
        getattr(case.bound(ask.profile), f"d{name}"),
    )
    leaf = given.detach().requires_grad_()
    with torch.enable_grad():
        out = ask.tensor(ask.raw(replace(case, **{name: leaf})), case)
        (grad,) = ask.take(out, [leaf], case.grad_out)
    blocked = exact.isnan() | given.isneginf().cpu()
    limit = torch.where(blocked, torch.inf, bound)
    ask.within(f"d{name}", grad, exact.nan_to_num(), limit)


def check_bias_blocks(ask: Ask, setting: Setting) -> None:
    """Block keys by -inf in the bias, with garbage behind it."""
    case = setting.case()
    pairs = allowed_pairs(case)
    bias = torch.zeros(pairs.shape, dtype=setting.dtype, device=case.q.device)
    bias = bias.masked_fill(~pairs, -torch.inf)
    limit = 2 * ask.bound(case).out
    by_bias = ask.out(replace(case, mask=None, bias=bias))
    ask.within("With -inf in the bias for a mask, out", by_bias, ask.out(case), limit)


def check_row_bias(ask: Ask, setting: Setting) -> None:
    """Add -1e9 to all scores of a row, as a finite mask does to a row without a key.

    Whatever the scores are rounded to, the weights of the row sum to 1.
    """
    case = setting.case()
    z = case.shape
    largest = 1e9 if setting.dtype != torch.float16 else 3e4
    bias = torch.zeros(1, 1, z.t, z.s, dtype=setting.dtype, device=case.q.device)
    bias[:, :, z.t // 2] = -largest
    hold_value_gradient_sum(ask, replace(case, bias=bias))


def _with_lse(ask: Ask, case: AttentionCase) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        answer = ask.raw(case, return_lse=True)
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise Violation("With return_lse=True it does not return a pair (out, lse).")
    out, lse = ask.tensor(answer[0], case), answer[1]
    if not isinstance(lse, Tensor) or tuple(lse.shape) != tuple(case.q.shape[:3]):
        raise Violation("The lse is not a tensor of shape (b, h, t).")
    return out.detach(), lse.detach().cpu()


def check_lse(ask: Ask, setting: Setting) -> None:
    """Compare the logsumexp with the reference, and the output with and without it."""
    case = setting.case()
    exact = case.reference()
    out, lse = _with_lse(ask, case)
    empty = exact.lse.isneginf()
    if bool((lse.double()[empty] != -torch.inf).any()):
        raise Violation("The lse of a query with no key is not -inf.")
    limit = lse_limit(case, exact, lse, ask.profile)
    ask.within("lse", lse[~empty], exact.lse[~empty], limit[~empty])
    ask.within("With the lse asked for, out", out, ask.out(case), 2 * ask.bound(case).out)


def check_split_and_merge(ask: Ask, setting: Setting) -> None:
    """Attend to two halves of the keys apart and join the answers by their logsumexp."""
    case = setting.case()
    z = case.shape
    if z.s < 2:
        raise NotAsked("one key cannot be split")
    parts = []
    for keep in (slice(0, z.s // 2), slice(z.s // 2, z.s)):
        mask = None if case.mask is None else case.mask[..., keep]
        half = replace(case, k=case.k[:, :, keep], v=case.v[:, :, keep], mask=mask)
        out, lse = _with_lse(ask, half)
        limit = lse_limit(half, half.reference(), lse, ask.profile).nan_to_num()
        parts.append((out.double().cpu(), lse.double(), ask.bound(half).out, limit))
    both = torch.stack([lse for _, lse, _, _ in parts])
    total = both.logsumexp(0)
    shares = torch.where(total.isneginf(), 0.0, (both - total).exp()).unsqueeze(-1)
    merged = shares[0] * parts[0][0] + shares[1] * parts[1][0]
    slip = torch.expm1(2 * (parts[0][3] + parts[1][3])).unsqueeze(-1)
    size = torch.maximum(parts[0][0].abs(), parts[1][0].abs())
    limit = ask.bound(case).out + shares[0] * parts[0][2] + shares[1] * parts[1][2]
    ask.within("Merged from two halves, out", merged, ask.out(case), limit + slip * size)


def check_cache(ask: Ask, setting: Setting) -> None:
    """Decode from a buffer that is longer than what is written, with NaN in the rest."""
    case = setting.case()
    z = case.shape
    full, bound = ask.out(case), ask.bound(case).out
    room = z.s + 3
    k, v = (torch.full((z.b, z.g, room, w), torch.nan, dtype=setting.dtype) for w in (z.d, z.e))
    k, v = k.to(case.k.device), v.to(case.v.device)
    for i in range(z.t):
        n = i + 1 + z.s - z.t
        if n < 1:
            continue
        k[:, :, :n], v[:, :, :n] = case.k[:, :, :n], case.v[:, :, :n]
        seen = (torch.arange(room, device=k.device) < n)[None, None, None, :]
        q, grad_out = case.q[:, :, i : i + 1], case.grad_out[:, :, i : i + 1]
        step = dataclasses.replace(case, q=q, k=k, v=v, mask=seen, grad_out=grad_out)
        limit = bound[:, :, i : i + 1] + ask.bound(step).out
        ask.within(f"Step {i} from the cache, out", ask.out(step), full[:, :, i : i + 1], limit)


LAWS = (
    *(
        Law(
            f"{name}-agreement",
            f"With {what}, output and gradients lie within the bound of the reference.",
            source,
            check,
            choices,
            needs=needs,
        )
        for name, what, source, check, choices, needs in (
            (
                "bias",
                "a bias",
                BOUND,
                check_agreement,
                Choices(
                    lengths=FEW, masks=SOME, biases=("gaussian", "alibi", "blocking", "offset")
                ),
                ("bias",),
            ),
            (
                "bias-gradient",
                "a bias",
                BOUND,
                check_gradient_agreement,
                Choices(lengths=FEW, masks=SOME, biases=("gaussian", "alibi", "blocking")),
                ("bias", "gradient"),
            ),
            (
                "softcap",
                "a soft-cap",
                "Gemma Team (2024), section 2",
                check_agreement,
                Choices(lengths=FEW, masks=SOME, softcaps=(5.0, 30.0), amplitudes=(1.0, 8.0)),
                ("softcap",),
            ),
            (
                "softcap-gradient",
                "a soft-cap",
                "Gemma Team (2024), section 2",
                check_gradient_agreement,
                Choices(lengths=FEW, masks=SOME, softcaps=(5.0, 30.0)),
                ("softcap", "gradient"),
            ),
            (
                "sinks",
                "sinks",
                "Xiao et al. (2024), section 3",
                check_agreement,
                Choices(lengths=FEW, masks=SOME, sinks=(True,)),
                ("sinks",),
            ),
            (
                "sinks-gradient",
                "sinks",
                "Xiao et al. (2024), section 3",
                check_gradient_agreement,
                Choices(lengths=FEW, masks=SOME, sinks=(True,)),
                ("sinks", "gradient"),
            ),
        )
    ),
    Law(
        "gradient-of-bias",
        "The bias receives its gradient, summed over the axes along which it was broadcast.",
        "definition of the derivative",
        check_option_gradient,
        Choices(lengths=FEW, dims=SMALL_DIMS, masks=SOME, biases=("gaussian", "alibi", "blocking")),
        needs=("bias", "gradient"),
    ),
    Law(
        "gradient-of-sinks",
        "The sinks receive their gradient.",
        "definition of the derivative",
        check_option_gradient,
        Choices(lengths=FEW, dims=SMALL_DIMS, masks=SOME, sinks=(True,)),
        needs=("sinks", "gradient"),
    ),
    Law(
        "bias-blocks",
        "-inf in the bias blocks as the mask does.",
        "exp(-inf) = 0",
        check_bias_blocks,
        Choices(lengths=FEW, dims=SMALL_DIMS, masks=("causal", "random", "empty_rows")),
        needs=("bias", "mask"),
        share=0.5,
    ),
    Law(
        "row-bias",
        "Where a bias is the same on a whole row, however large, dv still sums to the upstream.",
        "softmax(x + c) = softmax(x)",
        check_row_bias,
        Choices(lengths=SHORT + LONG[:2], dims=SMALL_DIMS),
        needs=("bias", "gradient"),
        share=0.5,
    ),
    Law(
        "lse",
        "The logsumexp is that of the scores, -inf without a key, and asking for it is free.",
        BOUND,
        check_lse,
        Choices(lengths=FEW, masks=SOME, families=("gaussian", "key_direction", "tied")),
        needs=("lse",),
    ),
    Law(
        "split-and-merge",
        "Two halves of the keys, joined by their logsumexp, give the whole.",
        "Milakov & Gimelshein (2018), section 3",
        check_split_and_merge,
        Choices(lengths=FEW, dims=SMALL_DIMS, masks=("none", "causal", "random")),
        needs=("lse",),
        share=0.6,
    ),
    Law(
        "cache",
        "Decoding from a longer buffer with NaN in its unused part gives the causal call.",
        "the formula: a blocked pair does not exist",
        check_cache,
        Choices(lengths=((5, 5), (4, 9), (12, 12)), dims=SMALL_DIMS, masks=("causal",)),
        needs=("cache", "mask", "cross"),
        share=0.4,
    ),
)
