"""Laws about the largest floats: reported always, counted where asked for.

In float16 these magnitudes are ordinary (the largest float is 65504), so there they count.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from stabletx.testing.cases import AttentionCase
from stabletx.testing.laws.accuracy import BOUND, check_agreement, check_gradient_agreement
from stabletx.testing.laws.ask import Ask
from stabletx.testing.laws.law import Law, Violation
from stabletx.testing.laws.limits import ones_limit
from stabletx.testing.laws.setting import SHORT, SMALL_DIMS, Choices, Setting

LENGTHS = (*SHORT, (16, 16), (3, 33))
FINITE = "a result that can be represented is finite"


def check_flat_values(ask: Ask, setting: Setting) -> None:
    """Ask for a mean of equal values at a quarter of the largest float, with flat weights."""
    case = setting.case()
    largest = torch.finfo(setting.dtype).max / 4
    q = torch.zeros_like(case.q)
    case = replace(case, q=q, v=torch.full_like(case.v, largest))
    expected, bound = case.reference().out, ask.bound(case).out
    ask.within("With values at a quarter of the largest float, out", ask.out(case), expected, bound)


def _equal_keys(setting: Setting) -> AttentionCase:
    """Let all scores leave the range of the dtype, all equal, with every value 1."""
    case = setting.case()
    largest = 0.875 * torch.finfo(setting.dtype).max
    return replace(
        case,
        q=torch.ones_like(case.q),
        k=torch.full_like(case.k, largest),
        v=torch.ones_like(case.v),
    )


def check_huge_keys(ask: Ask, setting: Setting) -> None:
    """Ask for the sum of the weights, which is 1."""
    one = _equal_keys(setting)
    want = torch.ones(one.grad_out.shape).double()
    limit = ones_limit(one, ask.profile)
    ask.within("With keys near the largest float and every value 1, out", ask.out(one), want, limit)


def check_not_silent(ask: Ask, setting: Setting) -> None:
    """Ask likewise: what cannot be computed must at least not look like an answer."""
    one = _equal_keys(setting)
    out, limit = ask.out(one), float(ones_limit(one, ask.profile))
    silent = out.isfinite() & ((out.double() - 1).abs() > limit)
    if bool(silent.any()):
        raise Violation(
            "With keys near the largest float and every value 1, out is silently "
            f"{float(out[silent][0]):.6g}, not 1."
        )


LAWS = (
    Law(
        "extreme-values",
        "Values at a quarter of the largest float give a finite mean.",
        FINITE,
        check_flat_values,
        Choices(lengths=LENGTHS, dims=SMALL_DIMS),
        extreme=True,
        share=0.3,
    ),
    Law(
        "extreme-keys",
        "Keys near the largest float, all equal, still give weights that sum to 1.",
        FINITE,
        check_huge_keys,
        Choices(lengths=((1, 16), *LENGTHS), dims=SMALL_DIMS[:2]),
        extreme=True,
        share=0.3,
    ),
    Law(
        "extreme-honesty",
        "Where scores leave the range of the dtype, a wrong answer is not a finite one.",
        "IEEE 754-2019, section 7.4: overflow is signalled",
        check_not_silent,
        Choices(lengths=((1, 16), *LENGTHS), dims=SMALL_DIMS[:2]),
        extreme=True,
        share=0.5,
    ),
    Law(
        "extreme-agreement",
        "With queries, keys and values up to the largest float the output is within its bound.",
        BOUND,
        check_agreement,
        Choices(
            lengths=LENGTHS,
            dims=SMALL_DIMS,
            families=("dtype_max", "huge_values", "huge_keys"),
            masks=("none", "causal_top_left"),
        ),
        extreme=True,
        share=0.5,
    ),
    Law(
        "extreme-gradient",
        "With queries, keys and values up to the largest float gradients are within their bound.",
        BOUND,
        check_gradient_agreement,
        Choices(
            lengths=LENGTHS,
            dims=SMALL_DIMS,
            families=("dtype_max", "huge_values", "huge_keys"),
            masks=("none", "causal_top_left"),
        ),
        needs=("gradient",),
        extreme=True,
        share=0.5,
    ),
)
