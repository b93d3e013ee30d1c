"""Laws about gradients: identities that need no reference, and finite differences."""

from __future__ import annotations

from dataclasses import replace

import torch

from stabletx.testing.cases import AttentionCase
from stabletx.testing.laws.ask import Ask
from stabletx.testing.laws.blocked import allowed_pairs
from stabletx.testing.laws.law import Law, Violation
from stabletx.testing.laws.limits import value_gradient_limit
from stabletx.testing.laws.setting import LONG, SHORT, Choices, Setting

ROW_SUMS = "the weights of a row sum to 1, so their differentials sum to 0"


def check_value_gradient_sum(ask: Ask, setting: Setting) -> None:
    """See that dv, summed over the keys, is the upstream gradient, summed over the rows."""
    hold_value_gradient_sum(ask, _offset(setting.case()) if setting.seed % 2 else setting.case())


def _offset(case: AttentionCase) -> AttentionCase:
    """Give all scores a common offset, in a channel that only adds up exactly."""
    if case.shape.d < 2:
        return case
    q, k = case.q.clone(), case.k.clone()
    q[..., 0], k[..., 0] = 64.0, 4096.0
    return replace(case, q=q, k=k, scale=0.25 if case.scale is not None else None)


def hold_value_gradient_sum(ask: Ask, case: AttentionCase) -> None:
    """Hold a case to the identity; a limit that knows nothing of the scores."""
    z = case.shape
    live = case.grad_out.double().cpu() * allowed_pairs(case).any(-1, keepdim=True).cpu()
    want = live.reshape(z.b, z.g, z.h // z.g, z.t, z.e).sum((2, 3))
    dv = ask.answer(case).dv.cpu()
    limit = value_gradient_limit(case, dv, live, ask.profile)
    limit = limit.nan_to_num(nan=0.0)
    largest = case.reference().max_score
    largest = largest[largest.isfinite()]
    size = f" (scores up to {float(largest.abs().max()):.3g})" if largest.numel() else ""
    ask.within(f"Summed over the keys{size}, dv", dv.double().sum(2), want, limit)


def check_score_gradient_sum(ask: Ask, setting: Setting) -> None:
    """Give all keys one equal channel: its gradient in dq is a sum that must vanish."""
    case = setting.case()
    k = case.k.clone()
    k[..., 0] = 1.0
    case = replace(case, k=k)
    bound = ask.bound(case, gradient=True).dq
    assert bound is not None
    dq = ask.answer(case).dq[..., 0]
    ask.within("In a channel where all keys are 1, dq", dq, torch.zeros_like(dq), bound[..., 0])


def check_gradcheck(ask: Ask, setting: Setting) -> None:
    """Compare with finite differences in float64."""
    case = setting.case()

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        q, k, v = inputs
        return ask.tensor(ask.raw(replace(case, q=q, k=k, v=v)), case)

    leaves = [x.detach().contiguous().requires_grad_() for x in (case.q, case.k, case.v)]
    try:
        torch.autograd.gradcheck(call, leaves)
    except RuntimeError as error:
        shown = " ".join(str(error).split())[:200]
        raise Violation(f"Finite differences disagree: {shown}") from error


def check_higher(ask: Ask, setting: Setting) -> None:
    """Compare second derivatives with finite differences of the first."""
    case = setting.case()

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        q, k, v = inputs
        return ask.tensor(ask.raw(replace(case, q=q, k=k, v=v)), case)

    leaves = [x.detach().contiguous().requires_grad_() for x in (case.q, case.k, case.v)]
    try:
        torch.autograd.gradgradcheck(call, leaves, [case.grad_out.detach().requires_grad_()])
    except RuntimeError as error:
        shown = " ".join(str(error).split())[:200]
        raise Violation(f"Second differences disagree: {shown}") from error


LAWS = (
    Law(
        "value-gradient-sum",
        "dv summed over the keys is the upstream gradient summed over the rows, at any offset.",
        ROW_SUMS,
        check_value_gradient_sum,
        Choices(
            lengths=SHORT + LONG[:5],
            dims=((16, 16), (16, 4), (64, 16), (4, 4)),
            masks=("none", "causal_top_left", "random", "empty_rows"),
        ),
        needs=("gradient",),
        share=0.7,
    ),
    Law(
        "score-gradient-sum",
        "In a channel where all keys agree, dq is 0.",
        ROW_SUMS,
        check_score_gradient_sum,
        Choices(lengths=SHORT + LONG[:3], masks=("none", "causal_top_left", "random")),
        needs=("gradient",),
        share=0.4,
    ),
    Law(
        "gradcheck",
        "The gradients agree with finite differences in float64.",
        "definition of the derivative",
        check_gradcheck,
        Choices(
            lengths=((2, 3), (3, 2), (1, 1), (3, 3)),
            heads=((1, 2, 1), (1, 2, 2), (2, 1, 1)),
            dims=((3, 3), (2, 3), (4, 1)),
            masks=("none", "causal_top_left", "empty_rows"),
        ),
        needs=("gradient",),
        dtypes=(torch.float64,),
        share=0.4,
    ),
    Law(
        "second-derivative",
        "The second derivatives agree with finite differences in float64.",
        "definition of the derivative",
        check_higher,
        Choices(
            lengths=((2, 3), (2, 2), (1, 1)),
            heads=((1, 2, 1), (1, 1, 1)),
            dims=((2, 2), (2, 1)),
            masks=("none", "causal_top_left", "empty_rows"),
        ),
        needs=("gradient", "higher"),
        dtypes=(torch.float64,),
        share=0.3,
    ),
)
