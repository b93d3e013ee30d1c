"""Laws about conduct: form, memory, repetition, and what a call must leave alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from stabletx.testing.cases import AttentionCase
from stabletx.testing.laws.ask import NAMES, Ask
from stabletx.testing.laws.blocked import allowed_pairs
from stabletx.testing.laws.law import Law, NotAsked, Raised, Violation
from stabletx.testing.laws.setting import DIMS, LAYOUTS, LONG, SHORT, SMALL_DIMS, Choices, Setting


def check_form(ask: Ask, setting: Setting) -> None:
    """See that the answer is a tensor of the right shape, dtype and device."""
    ask.out(setting.case())


def check_no_write(ask: Ask, setting: Setting) -> None:
    """Compare the inputs before and after a call, and look back on all calls so far."""
    case = setting.case()
    names = ("q", "k", "v", "mask")
    before = {name: x.clone() for name in names if (x := getattr(case, name)) is not None}
    if "gradient" in ask.features:
        ask.answer(case)
    ask.out(case)
    for name, kept in before.items():
        now = getattr(case, name)
        if bool(((now != kept) & ~((now != now) & (kept != kept))).any()):
            raise Violation(f"The call writes to its input {name}.")
    if ask.wrote:
        raise Violation(f"A call wrote to its input {ask.wrote}.")


def check_determinism(ask: Ask, setting: Setting) -> None:
    """Ask the same twice, with another question in between."""
    case, other = setting.case(), setting.but(seed=setting.seed + 1, t=3, s=4, mask="none").case()
    if "cross" not in ask.features:
        other = setting.but(seed=setting.seed + 1, t=3, s=3, mask="none").case()
    gradient = "gradient" in ask.features
    first = ask.answer(case) if gradient else (ask.out(case),)
    ask.out(other)
    again = ask.answer(case) if gradient else (ask.out(case),)
    for name, x, y in zip(NAMES, again, first, strict=False):
        ask.same_bits(f"Asked again, {name}", x, y)


def check_layout(ask: Ask, setting: Setting) -> None:
    """Compare other memory layouts of the same values with contiguous tensors."""
    case = setting.case()
    grad_out = case.grad_out[..., :1].expand_as(case.grad_out)
    q, k, v = (x.contiguous() for x in (case.q, case.k, case.v))
    mask = case.mask
    plain = replace(case, q=q, k=k, v=v, grad_out=grad_out.contiguous(), layout="contiguous")
    if mask is not None:
        plain = replace(plain, mask=mask.contiguous())
        mask = mask.transpose(2, 3).contiguous().transpose(2, 3)
    case = replace(case, grad_out=grad_out, mask=mask)
    bound = ask.bound(plain, gradient=True)
    why = f"With {setting.layout} inputs"
    try:
        if "gradient" not in ask.features:
            ask.within(f"{why}, out", ask.out(case), ask.out(plain), 2 * bound.out)
            return
        laid, straight = ask.answer(case), ask.answer(plain)
    except Raised as broken:
        raise Violation(f"{why}: {broken}") from broken
    for name, actual, want in zip(NAMES, laid, straight, strict=True):
        ask.within(f"{why}, {name}", actual, want, 2 * getattr(bound, name))


def check_empty_inputs(ask: Ask, setting: Setting) -> None:
    """Ask with no key, no query, no example: zeros of the right shape, or a refusal."""
    refused = []
    for change in ({"s": 0}, {"t": 0}, {"b": 0}):
        case = setting.but(**change).case()
        try:
            out = ask.out(case)
        except (Raised, NotAsked) as error:
            refused.append(f"{next(iter(change))} = 0: {error}")
            continue
        if bool((out != 0).any()):
            raise Violation(f"Without a key, out is {float(out.flatten()[0]):.6g}, not 0.")
    if refused:
        raise NotAsked("; ".join(refused))


def check_mask_forms(ask: Ask, setting: Setting) -> None:
    """Give the same mask in full, broadcast, and where it allows everything, left out."""
    case = setting.case()
    pairs = allowed_pairs(case)
    limit = 2 * ask.bound(case).out
    full = ask.out(replace(case, mask=pairs.contiguous()))
    ask.within("With the mask expanded, out", ask.out(case), full, limit)
    _hold_open(ask, case, pairs)


def _hold_open(ask: Ask, case: AttentionCase, pairs: Tensor) -> None:
    open_mask = torch.ones_like(pairs[:1, :1])
    none = replace(case, mask=None)
    limit = 2 * ask.bound(none).out
    given = ask.out(replace(case, mask=open_mask))
    ask.within("With a mask that allows everything, out", given, ask.out(none), limit)


def check_mode(ask: Ask, setting: Setting) -> None:
    """Compare training with dropout 0 with evaluation."""
    case = setting.case()
    limit = 2 * ask.bound(case).out
    train = ask.out(case, dropout_p=0.0, training=True)
    ask.within("In training with dropout 0, out", train, ask.out(case), limit)
    off = ask.out(case, dropout_p=0.5, training=False)
    ask.within("In evaluation with dropout given, out", off, ask.out(case), limit)


LAWS = (
    Law(
        "form",
        "The answer is a tensor (b, h, t, e) in the dtype and on the device of the queries.",
        "the signature",
        check_form,
        Choices(dims=DIMS, masks=("none", "causal")),
        share=0.5,
    ),
    Law(
        "determinism",
        "The same question has the same answer, to the bit, whatever was asked in between.",
        "repeatable computation",
        check_determinism,
        Choices(lengths=SHORT[2:] + LONG[:2], dims=SMALL_DIMS, masks=("none", "causal_top_left")),
        share=0.4,
    ),
    Law(
        "layout",
        "Permuted, sliced, strided and expanded tensors give what contiguous ones give.",
        "a tensor is its values",
        check_layout,
        Choices(
            lengths=SHORT + LONG[:3],
            heads=((2, 2, 2), (3, 4, 2), (2, 3, 3), (1, 4, 4)),
            dims=DIMS[:6],
            masks=("none", "causal_top_left", "per_head", "padding_left"),
            layouts=LAYOUTS,
        ),
        share=0.7,
    ),
    Law(
        "mask-forms",
        "A mask means the same broadcast, in full, and left out where it allows everything.",
        "a mask is its values",
        check_mask_forms,
        Choices(lengths=SHORT + LONG[:2], dims=SMALL_DIMS, masks=("random", "causal", "dead_head")),
        needs=("mask",),
        share=0.5,
    ),
    Law(
        "empty-inputs",
        "No key gives 0; no query and no example give an empty output.",
        "an empty sum is 0",
        check_empty_inputs,
        Choices(lengths=((3, 3),), dims=((4, 4),), heads=((2, 2, 2),)),
        needs=("cross",),
        share=0.1,
    ),
    Law(
        "mode",
        "Training with dropout 0 equals evaluation, and evaluation never drops.",
        "definition of dropout",
        check_mode,
        Choices(lengths=SHORT, dims=SMALL_DIMS, masks=("none", "causal")),
        needs=("training",),
        share=0.3,
    ),
    Law(
        "no-write",
        "The inputs are as they were after the call.",
        "the caller owns them",
        check_no_write,
        Choices(lengths=SHORT, dims=SMALL_DIMS, masks=("none", "causal", "empty_rows")),
        share=0.4,
    ),
)
