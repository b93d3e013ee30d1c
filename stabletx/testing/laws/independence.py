"""Laws about leaks: a query's answer moves only with what that query may attend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stabletx.testing.cases import AttentionCase
from stabletx.testing.laws.ask import Ask
from stabletx.testing.laws.blocked import allowed_pairs
from stabletx.testing.laws.law import Law, NotAsked, Violation
from stabletx.testing.laws.setting import LONG, SHORT, SMALL_DIMS, Choices, Setting

LENGTHS = ((5, 5), (2, 3), (8, 8), (9, 17), (65, 65), (16, 16), (160, 192), (192, 192), (128, 130))
MANY = ((2, 2, 2), (2, 4, 2), (3, 3, 1), (2, 4, 4))
FORMULA = "the formula: nothing else occurs in it"


def redraw(x: Tensor, where: Tensor, setting: Setting, size: float) -> Tensor:
    """Put other numbers of a given size at the marked places."""
    fresh = torch.randn(x.shape, generator=setting.source(), dtype=torch.float64) * size
    return torch.where(where, fresh.to(x.dtype).to(x.device), x)


def move_future(case: AttentionCase, setting: Setting, cut: int, size: float) -> AttentionCase:
    """Change keys and values from ``cut`` on, and the queries that may see them."""
    z = case.shape
    future = (torch.arange(z.s, device=case.k.device) >= cut)[None, None, :, None]
    sees = allowed_pairs(case)[..., cut:].any(-1, keepdim=True)
    return replace(
        case,
        q=redraw(case.q, sees, setting, size),
        k=redraw(case.k, future, setting, size),
        v=redraw(case.v, future, setting, size),
    )


def _cuts(setting: Setting) -> list[int]:
    """Return where the future may begin: the last keys, and a run at any place before.

    A leak of one key shows only where the cut lies between the row and that key, and kernels leak
    every so many rows: hence runs of successive cuts.
    """
    s = setting.shape.s
    start = (setting.seed * 7919) % max(1, s - 3)
    return sorted({*range(s - 4, s), *range(start, start + 4)} & set(range(1, s)))


def check_causality(ask: Ask, setting: Setting) -> None:
    """Move the future; the past keeps every bit."""
    case = setting.case()
    before = ask.out(case)
    for i, cut in enumerate(_cuts(setting)):
        past = ~allowed_pairs(case)[..., cut:].any(-1)
        after = ask.out(move_future(case, setting, cut, (1.0, 1e3)[i % 2]))
        _hold(ask, after, before, past, f"When keys from {cut} on change")


def check_causality_gradient(ask: Ask, setting: Setting) -> None:
    """Read only the past; the future gets gradient 0, and moves no bit of the past's."""
    case = setting.case()
    for cut in _cuts(setting)[::3]:
        past = ~allowed_pairs(case)[..., cut:].any(-1)
        read = replace(case, grad_out=case.grad_out * past.unsqueeze(-1))
        before = ask.answer(read)
        for name, grad in (("dk", before.dk), ("dv", before.dv)):
            if bool((grad[:, :, cut:] != 0).any()):
                raise Violation(f"{name} is not 0 at a key that no query that is read may attend.")
        after = ask.answer(move_future(read, setting, cut, 1.0))
        _hold(ask, after.dq, before.dq, past, f"When keys from {cut} on change, in dq")
        for name, x, y in (("dk", after.dk, before.dk), ("dv", after.dv, before.dv)):
            ask.same_bits(f"When keys from {cut} on change, {name}", x[:, :, :cut], y[:, :, :cut])


def _hold(ask: Ask, after: Tensor, before: Tensor, rows: Tensor, why: str) -> None:
    """Compare the marked rows to the bit, and name the first that moves."""
    moved = ((after != before) & ~(after.isnan() & before.isnan())).any(-1) & rows
    if not bool(moved.any()):
        return
    b, h, i = (int(x) for x in moved.nonzero()[0])
    ask.same_bits(f"{why}, row ({b}, {h}, {i}) moves although it may not see them: out",
                  after[b, h, i], before[b, h, i])  # fmt: skip


def check_sight(ask: Ask, setting: Setting) -> None:
    """Change what the first query may not see; queries that do not see it keep every bit."""
    case = setting.case()
    pairs = allowed_pairs(case)
    hidden = ~pairs[:, :, 0].any(1)  # (b, s)
    if not bool(hidden.any()):
        raise NotAsked("the first query sees every key in all examples")
    blind = ~(pairs & hidden[:, None, None, :]).any(-1)
    where = hidden[:, None, :, None]
    before = ask.out(case)
    for size in (1.0, 1e3):
        k, v = (redraw(x, where, setting, size) for x in (case.k, case.v))
        after = ask.out(replace(case, k=k, v=v))
        _hold(ask, after, before, blind, "When keys of other segments change")


def check_batch(ask: Ask, setting: Setting) -> None:
    """Change all examples but the first; the first keeps every bit."""
    case = setting.case()
    others = torch.arange(case.shape.b, device=case.q.device)[:, None, None, None] > 0
    _hold_others(ask, setting, case, (others, others), "another example of the batch")


def check_heads(ask: Ask, setting: Setting) -> None:
    """Change all heads but those of the first group; these keep every bit."""
    case = setting.case()
    z = case.shape
    queries = torch.arange(z.h, device=case.q.device)[None, :, None, None] >= z.h // z.g
    keys = torch.arange(z.g, device=case.q.device)[None, :, None, None] >= 1
    _hold_others(ask, setting, case, (queries, keys), "another head")


def _hold_others(
    ask: Ask, setting: Setting, case: AttentionCase, others: Sequence[Tensor], who: str
) -> None:
    gradient = "gradient" in ask.features
    answers = []
    queries, keys = others
    for size in (0.0, 1.0, 1e3):
        moved = case
        if size:
            q = redraw(case.q, queries, setting, size)
            k, v = (redraw(x, keys, setting, size) for x in (case.k, case.v))
            moved = replace(case, q=q, k=k, v=v)
        answers.append(ask.answer(moved) if gradient else (ask.out(moved),))
    for after in answers[1:]:
        for name, x, y in zip(("out", "dq", "dk", "dv"), after, answers[0], strict=False):
            keep = ~(queries if name in ("out", "dq") else keys).expand_as(x)
            ask.same_bits(
                f"When {who} changes, {name}", torch.where(keep, x, 0), torch.where(keep, y, 0)
            )


def check_decode(ask: Ask, setting: Setting) -> None:
    """Ask a few rows of a causal call alone, each with the keys up to its own."""
    case = setting.case()
    z = case.shape
    full, bound = ask.out(case), ask.bound(case).out
    for i in sorted({0, z.t // 2, z.t - 1}):
        n = i + 1 + z.s - z.t
        if n < 1:
            continue
        q, grad_out = case.q[:, :, i : i + 1], case.grad_out[:, :, i : i + 1]
        step = replace(case, q=q, k=case.k[:, :, :n], v=case.v[:, :, :n], grad_out=grad_out)
        alone = ask.out(replace(step, mask=None))
        limit = bound[:, :, i : i + 1] + ask.bound(replace(step, mask=None)).out
        ask.within(f"Asked alone, row {i}: out", alone, full[:, :, i : i + 1], limit)


LAWS = (
    Law(
        "causality",
        "Changing a future token moves no bit of the output before it.",
        FORMULA,
        check_causality,
        Choices(
            lengths=LENGTHS, dims=SMALL_DIMS, masks=("causal", "causal_top_left", "causal&window")
        ),
        needs=("mask",),
        share=0.7,
    ),
    Law(
        "causality-gradient",
        "The gradient of the past with respect to the future is exactly 0.",
        FORMULA,
        check_causality_gradient,
        Choices(lengths=LENGTHS, dims=SMALL_DIMS, masks=("causal",)),
        needs=("mask", "gradient"),
        share=0.5,
    ),
    Law(
        "segment-independence",
        "Changing a key moves no bit of the queries that may not attend it.",
        FORMULA,
        check_sight,
        Choices(
            lengths=((5, 5), (8, 8), (17, 17), (65, 65), (9, 17), (64, 128)),
            dims=SMALL_DIMS,
            masks=("segments", "segments&causal", "window", "padding_left"),
        ),
        needs=("mask",),
        share=0.6,
    ),
    Law(
        "batch-independence",
        "Changing one example of a batch moves no bit of another, gradients included.",
        FORMULA,
        check_batch,
        Choices(
            lengths=SHORT + LONG[:2],
            heads=MANY,
            dims=SMALL_DIMS,
            masks=("none", "causal", "padding_right", "empty_rows"),
        ),
        share=0.5,
    ),
    Law(
        "head-independence",
        "Changing one head moves no bit of another, gradients included.",
        FORMULA,
        check_heads,
        Choices(
            lengths=SHORT, heads=MANY[:2] + MANY[3:], dims=SMALL_DIMS, masks=("none", "causal")
        ),
        share=0.4,
    ),
    Law(
        "decode",
        "A query asked alone with the keys up to its own gives what the causal call gives.",
        "the formula: rows do not know of each other",
        check_decode,
        Choices(lengths=((5, 5), (9, 17), (65, 65), (130, 130), (4, 64)), masks=("causal",)),
        needs=("mask", "cross"),
        share=0.4,
    ),
)
