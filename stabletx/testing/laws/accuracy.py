"""Laws about right numbers: the output and the gradients against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import torch

from stabletx.testing.laws.ask import NAMES, Ask
from stabletx.testing.laws.law import Law, Violation
from stabletx.testing.laws.setting import (
    DIMS,
    FAMILIES,
    LAYOUTS,
    LONG,
    MASKS,
    SCALES,
    SHORT,
    SMALL_DIMS,
    Choices,
    Setting,
)
from stabletx.testing.rounding import Profile, unit_roundoff

BOUND = "Blanchard, Higham & Higham (2021), section 3"


def check_agreement(ask: Ask, setting: Setting) -> None:
    """Compare the output with the reference."""
    case = setting.case()
    expected, bound = case.reference().out, ask.bound(case).out
    ask.within("out", ask.out(case), expected, bound)


def check_gradient_agreement(ask: Ask, setting: Setting) -> None:
    """Compare the gradients, and the output that comes with them, with the reference."""
    case = setting.case()
    exact = case.gradients()
    expected = (case.reference().out, exact.dq, exact.dk, exact.dv)
    bound = ask.bound(case, gradient=True)
    answer = ask.answer(case)
    for name, actual, want in zip(NAMES, answer, expected, strict=True):
        limit = getattr(bound, name)
        assert limit is not None
        ask.within(name, actual, want, limit)


def check_gradient_exists(ask: Ask, setting: Setting) -> None:
    """See that q, k and v all receive a gradient that is not zero."""
    case = setting.case()
    answer = ask.answer(case)
    exact = case.gradients()
    for name in ("dq", "dk", "dv"):
        if not getattr(answer, name).any() and getattr(exact, name).any():
            raise Violation(f"{name} is 0 everywhere.")


def check_exact_selection(ask: Ask, setting: Setting) -> None:
    """Compare with weights of 0, 1/2 or 1: only the last bits of the compute dtype are free."""
    case = setting.case()
    want = case.reference().out
    compute = (ask.profile or Profile()).compute_dtype(setting.dtype)
    # exp, log and a division, should a kernel take weights as exp(score - logsumexp).
    free = 4 * unit_roundoff(compute) if compute == setting.dtype else 0.0
    ask.within("out", ask.out(case), want, torch.tensor(free).double())


def check_cast(ask: Ask, setting: Setting) -> None:
    """Compare the answer for 16-bit inputs with the answer for the same values in float32."""
    case = setting.case()
    wide = replace(case, **{name: getattr(case, name).float() for name in ("q", "k", "v")})
    low, high = ask.bound(case).out, ask.bound(wide).out
    ask.within("out", ask.out(case), ask.out(wide), low + high)


def check_scale(ask: Ask, setting: Setting) -> None:
    """Compare a scale that is left out with the same scale given."""
    case = setting.case()
    bound = ask.bound(case).out
    given = setting.but(scale=float(case.shape.d) ** -0.5).case()
    ask.within("out", ask.out(case), ask.out(given), 2 * bound)


LAWS = (
    Law(
        "agreement",
        "The output lies within the derived rounding bound of the float64 reference.",
        BOUND,
        check_agreement,
        Choices(
            families=FAMILIES,
            masks=MASKS,
            scales=SCALES,
            layouts=("contiguous", *LAYOUTS),
            amplitudes=(1.0, 0.125, 8.0, 64.0),
        ),
        share=4.0,
    ),
    Law(
        "gradient-agreement",
        "dq, dk and dv lie within the derived rounding bound of the float64 reference.",
        "Dao et al. (2022), appendix B.2",
        check_gradient_agreement,
        Choices(
            families=FAMILIES,
            masks=MASKS,
            scales=SCALES,
            layouts=("contiguous", *LAYOUTS),
            amplitudes=(1.0, 0.125, 8.0),
        ),
        needs=("gradient",),
        share=4.0,
    ),
    Law(
        "gradient-exists",
        "The queries, the keys and the values all receive a gradient.",
        "definition of the derivative",
        check_gradient_exists,
        Choices(lengths=SHORT[:1], heads=((2, 2, 2),), dims=SMALL_DIMS[:1]),
        needs=("gradient",),
        share=0.1,
    ),
    Law(
        "exact-selection",
        "Where every weight is exactly 0, 1/2 or 1, the output is exact.",
        "0/1-valued inputs: every partial sum is exact",
        check_exact_selection,
        Choices(families=("exact",), masks=MASKS, layouts=("contiguous", *LAYOUTS)),
        needs=("scale",),
        share=2.0,
    ),
    Law(
        "scale",
        "Leaving out the scale means d ** -0.5.",
        "Vaswani et al. (2017), section 3.2.1",
        check_scale,
        Choices(lengths=SHORT[:4], dims=DIMS[:6]),
        needs=("scale",),
        share=0.4,
    ),
    Law(
        "cast",
        "16-bit inputs give what the same values give in float32, rounded.",
        "Micikevicius et al. (2018), section 3",
        check_cast,
        Choices(lengths=SHORT + LONG[:4], dims=SMALL_DIMS, families=FAMILIES[:8], masks=MASKS[:5]),
        dtypes=(torch.bfloat16, torch.float16),
        share=0.5,
    ),
)
