"""Laws about masks: blocked is absent, empty rows are zero, and an attended NaN is honest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from stabletx.testing.cases import AttentionCase
from stabletx.testing.laws.ask import NAMES, Ask
from stabletx.testing.laws.law import Law, Violation
from stabletx.testing.laws.setting import LONG, SHORT, SMALL_DIMS, Choices, Setting

HIDING = (
    *("padding_right", "padding_left", "padding_left&causal", "padding_holes", "dead_example"),
    *("dead_head", "window", "padding_right&causal"),
)
EMPTY = ("empty_rows", "dead_example", "dead_head", "padding_left&causal", "empty_rows&causal")
# Kernels treat the keys that are left over from their vector width apart.
NEAR_16 = ((5, 5), (1, 5), (9, 17), (4, 33), (16, 16), (65, 65), (2, 3), (3, 130))
CONTRACT = "the formula: a blocked pair does not exist"


def unseen_keys(case: AttentionCase) -> Tensor:  # (b, g, s)
    """Find the keys that no query of their group may attend."""
    z = case.shape
    pairs = allowed_pairs(case).reshape(z.b, z.g, z.h // z.g, z.t, z.s)
    return ~pairs.any(3).any(2)


def allowed_pairs(case: AttentionCase) -> Tensor:  # (b, h, t, s)
    """Return the mask in full."""
    z = case.shape
    if case.mask is None:
        return torch.ones(z.b, z.h, z.t, z.s, dtype=torch.bool, device=case.q.device)
    return case.mask.expand(z.b, z.h, z.t, z.s)


def garbage(dtype: torch.dtype) -> dict[str, float]:
    """Return what may lie in memory that nobody wrote to."""
    largest = torch.finfo(dtype).max
    return {"NaN": torch.nan, "1e4": 1e4, "inf": torch.inf, "the largest float": largest}


def spoil(case: AttentionCase, value: float, names: str = "kvq") -> AttentionCase:
    """Put a value wherever no query looks: unseen keys and values, queries without a key."""
    unseen = unseen_keys(case).unsqueeze(-1)
    empty = ~allowed_pairs(case).any(-1, keepdim=True)
    changed = {"q": empty, "k": unseen, "v": unseen}
    tensors = {name: getattr(case, name).masked_fill(changed[name], value) for name in names}
    return replace(case, **tensors)


def check_blocked_is_absent(ask: Ask, setting: Setting) -> None:
    """Compare the output with garbage and with zeros where nobody may look."""
    case = setting.case()
    clean = ask.out(spoil(case, 0.0))
    for names, tensor in (("v", "values"), ("k", "keys"), ("q", "queries without a key")):
        for what, value in garbage(setting.dtype).items():
            _same(ask, [ask.out(spoil(case, value, names))], [clean], f"{what} in blocked {tensor}")


def check_blocked_gradient(ask: Ask, setting: Setting) -> None:
    """Compare the gradients likewise; what nobody sees has gradient exactly 0."""
    case = setting.case()
    clean = ask.answer(spoil(case, 0.0))
    unseen = unseen_keys(case).unsqueeze(-1)
    for name, grad in (("dk", clean.dk), ("dv", clean.dv)):
        if bool((grad * unseen != 0).any()):
            raise Violation(f"{name} is not 0 at a key that no query may attend.")
    for what, value in garbage(setting.dtype).items():
        spoilt = ask.answer(spoil(case, value))
        _same(ask, spoilt, clean, f"{what} at blocked positions")


def _same(ask: Ask, spoilt: tuple[Tensor, ...] | list[Tensor], clean: object, why: str) -> None:
    try:
        for name, actual, expected in zip(NAMES, spoilt, clean, strict=False):  # type: ignore[call-overload]
            ask.same_bits(name, actual, expected)
    except Violation as broken:
        raise Violation(f"With {why}, {broken}") from None


def check_empty_rows(ask: Ask, setting: Setting) -> None:
    """See that a query without a key gives exactly 0."""
    case = setting.case()
    out = ask.out(case)
    empty = ~allowed_pairs(case).any(-1)
    if bool((out[empty] != 0).any()):
        first = out[empty].flatten()
        shown = float(first[first != 0][0])
        raise Violation(f"A query with no key gives {shown:.6g}, not 0.")


def check_empty_rows_gradient(ask: Ask, setting: Setting) -> None:
    """See that an empty row has gradient 0, and moves no bit of another, read or not."""
    case = setting.case()
    empty = ~allowed_pairs(case).any(-1, keepdim=True)
    unread = replace(case, grad_out=case.grad_out.masked_fill(empty, 0.0))
    clean = ask.answer(unread)
    read = ask.answer(case)
    for whose, answer in (("that the loss does not read", clean), ("that the loss reads", read)):
        for name in ("dq", "dk", "dv"):
            grad = getattr(answer, name)
            bad = int(grad.isnan().sum())
            if bad:
                raise Violation(
                    f"{name} holds {bad} NaN of {grad.numel()} because of a query with no key, "
                    f"one {whose}."
                )
        if bool((answer.dq * empty != 0).any()):
            raise Violation("dq is not 0 for a query with no key.")
    for name in ("dk", "dv"):
        what = f"When the loss reads a query with no key, {name}"
        ask.same_bits(what, getattr(read, name), getattr(clean, name))


def bad_cases(setting: Setting) -> Iterator[tuple[str, AttentionCase]]:
    """Put a NaN, or an infinite score, where some queries attend it."""
    plain = setting.case()
    z = plain.shape
    for what in ("a NaN query", "a NaN key", "a NaN value", "an infinite score"):
        q, k, v = (x.clone() for x in (plain.q, plain.k, plain.v))
        if what == "a NaN query":
            q[0, 0, z.t - 1] = torch.nan
        elif what == "a NaN key":
            k[0, 0, z.s - 1, 0] = torch.nan
        elif what == "a NaN value":
            v[0, 0, z.s - 1, 0] = torch.nan
        else:
            q[0] = 1.0
            k[0, 0, z.s - 1] = torch.inf
        yield what, replace(plain, q=q, k=k, v=v)


def check_honest_nan(ask: Ask, setting: Setting) -> None:
    """See that what a query attends reaches its output."""
    for what, case in bad_cases(setting):
        must = case.reference().out.isnan()
        out = ask.out(case).cpu()
        swallowed = must & out.isfinite()
        if bool(swallowed.any()):
            value = float(out[swallowed][0])
            raise Violation(
                f"With {what}, a query that attends to it gets {value:.6g}, not NaN: "
                "the error is swallowed."
            )


def check_contained_nan(ask: Ask, setting: Setting) -> None:
    """See that it reaches the output of no other query."""
    for what, case in bad_cases(setting):
        exact, bound = case.reference().out, ask.bound(case).out
        out = ask.out(case).cpu()
        others = ~exact.isnan().any(-1, keepdim=True).expand_as(exact)
        stray = ~out.isfinite() & others & (bound < torch.inf)
        if bool(stray.any()):
            raise Violation(
                f"With {what}, {int(stray.any(-1).sum())} queries that may not attend to it "
                "turn non-finite."
            )


LAWS = (
    Law(
        "blocked-is-absent",
        "Whatever lies at a position that no query may attend changes no bit of the output.",
        CONTRACT,
        check_blocked_is_absent,
        Choices(lengths=SHORT + LONG[:6], dims=SMALL_DIMS, masks=HIDING, scales=(None, 1.0)),
        needs=("mask",),
        share=0.7,
    ),
    Law(
        "blocked-has-no-gradient",
        "Whatever lies where no query may attend changes no bit of a gradient, and gets 0.",
        CONTRACT,
        check_blocked_gradient,
        Choices(lengths=SHORT + LONG[:6], dims=SMALL_DIMS, masks=HIDING),
        needs=("mask", "gradient"),
        share=0.7,
    ),
    Law(
        "empty-rows",
        "A query that may attend no key gives exactly 0.",
        "an empty sum is 0",
        check_empty_rows,
        Choices(
            lengths=SHORT + LONG[:5],
            dims=SMALL_DIMS,
            masks=EMPTY,
            layouts=("contiguous", "permuted"),
            families=("gaussian", "key_direction"),
        ),
        needs=("mask",),
    ),
    Law(
        "empty-rows-gradient",
        "A query that may attend no key has gradient 0 and leaves every other gradient alone.",
        "an empty sum is 0",
        check_empty_rows_gradient,
        Choices(lengths=SHORT + LONG[:5], dims=SMALL_DIMS, masks=EMPTY),
        needs=("mask", "gradient"),
        share=0.7,
    ),
    Law(
        "honest-nan",
        "A NaN or an infinite score that a query attends makes that query's output NaN.",
        "IEEE 754-2019, section 6.2: NaN propagates",
        check_honest_nan,
        Choices(lengths=NEAR_16, dims=SMALL_DIMS[:2], masks=("none", "causal")),
        share=0.7,
    ),
    Law(
        "contained-nan",
        "A NaN reaches the output of no query that may not attend it.",
        CONTRACT,
        check_contained_nan,
        Choices(
            lengths=((5, 5), (9, 17), (4, 33), (65, 65), (2, 3)),
            dims=SMALL_DIMS[:3],
            masks=("causal", "none"),
        ),
        share=0.5,
    ),
)
