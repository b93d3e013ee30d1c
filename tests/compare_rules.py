"""Three ways to judge an attention, on the same cases: ``python -m tests.compare_rules``.

Ours (the laws), ``torch.testing.assert_close`` with its defaults against float64, and "at most
twice the error of the plain formula in the input dtype". Writes
docs/compared-rules.md: mutants caught, and right attentions that were flagged.
"""

import sys
import time
from pathlib import Path

import torch

from stabletx.testing.conformance import check_attention
from stabletx.testing.laws import LAWS, NotAsked, Violation
from stabletx.testing.laws.ask import Ask
from tests.correct_attentions import CORRECT
from tests.mutants import MUTANTS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FEATURES = frozenset({"mask", "scale", "gradient", "grouped", "cross", "value-dim"})
TARGET = Path(__file__).parent.parent / "docs" / "compared-rules.md"
ASKED = ("agreement", "gradient-agreement")


def cases(dtype):
    """The cases of our two laws of agreement in a quick run: the same for every rule."""
    for law in LAWS:
        if law.name in ASKED:
            for setting in law.choices.settings(24, 0, law.name, FEATURES):
                yield law.name, setting.but(dtype=dtype).case()


def plain(case, inputs):
    """The formula in the dtype of the inputs; an empty row gives 0, so that all can be compared."""
    q, k, v = inputs
    n = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(n, 1), v.repeat_interleave(n, 1)
    scores = q @ k.mT * (case.scale if case.scale is not None else q.shape[3] ** -0.5)
    if case.mask is not None:
        empty = ~case.mask.any(-1, keepdim=True)
        scores = scores.masked_fill(~(case.mask | empty), float("-inf"))
        return (scores.softmax(-1) @ v).masked_fill(empty, 0)
    return scores.softmax(-1) @ v


def results(fn, law, case):
    ask = Ask(fn, None, FEATURES)
    if law == "agreement":
        return (ask.out(case),)
    return tuple(ask.answer(case))


class Known:
    """What is exact, and what the plain formula gives, for every case; computed once."""

    def __init__(self, dtype):
        self.items = []
        for law, case in cases(dtype):
            exact = [case.reference().out]
            leaves = [x.detach().clone().requires_grad_() for x in (case.q, case.k, case.v)]
            out = plain(case, leaves)
            yard = [out.detach()]
            if law == "gradient-agreement":
                grads = case.gradients()
                exact += [grads.dq, grads.dk, grads.dv]
                yard += torch.autograd.grad(out, leaves, case.grad_out)
            self.items.append((law, case, exact, yard))


def close(actual, exact, yard):
    try:
        torch.testing.assert_close(actual, exact.to(actual.dtype))
    except AssertionError:
        return False
    return True


def twice(actual, exact, yard):
    error = (actual.double() - exact).abs().max() if actual.numel() else 0
    yardstick = (yard.double() - exact).abs().max() if actual.numel() else 0
    return bool(error <= 2 * yardstick)


def flagged(fn, known, rule):
    for law, case, exact, yard in known.items:
        try:
            found = results(fn, law, case)
        except (Violation, NotAsked):
            return True
        for actual, want, near in zip(found, exact, yard, strict=True):
            if actual.shape != want.shape or not rule(actual, want, near):
                return True
    return False


def by_laws(fn, dtype):
    return not check_attention(fn, dtypes=[dtype], effort="quick", stop_early=True).passed


def main():
    counts = {}
    start = time.monotonic()
    for dtype in DTYPES:
        known = Known(dtype)
        rules = {
            "the laws, quick": lambda fn, dtype=dtype: by_laws(fn, dtype),
            "the same cases, our bound alone": lambda fn, dtype=dtype: (
                not check_attention(
                    fn, dtypes=[dtype], effort="quick", stop_early=True, laws=ASKED
                ).passed
            ),
            "`torch.testing.assert_close`": lambda fn, known=known: flagged(fn, known, close),
            "twice the plain formula": lambda fn, known=known: flagged(fn, known, twice),
        }
        mutants = [mutant for mutant in MUTANTS if dtype in mutant.dtypes]
        for name, rule in rules.items():
            caught = sum(rule(mutant) for mutant in mutants)
            alarms = sum(rule(fn) for fn in CORRECT)
            counts[name, dtype] = (caught, len(mutants), alarms)
            print(
                name, dtype, counts[name, dtype], round(time.monotonic() - start), file=sys.stderr
            )
    write(counts)


def write(counts):
    names = list(dict.fromkeys(name for name, _ in counts))
    rows = [
        "# Three rules compared",
        "",
        f"Written by `python -m tests.compare_rules` with torch {torch.__version__} on CPU: "
        f"{len(MUTANTS)} wrong attentions (`tests/mutants.py`, each in the dtypes where it is "
        f"wrong) and {len(CORRECT)} right ones (`tests/correct_attentions.py`). Caught of wrong / "
        "false alarms of right.",
        "",
        "The last three rows see the same cases: those of the laws *agreement* and "
        "*gradient-agreement*. An attention counts as flagged where one of the 48 cases is. A rule "
        "that flags every right attention tells nothing by flagging the wrong ones, and more time "
        "would not help it: more cases only flag more.",
        "",
        "| rule | " + " | ".join(str(x).removeprefix("torch.") for x in DTYPES) + " |",
        "|---|" + "---|" * len(DTYPES),
    ]
    for name in names:
        cells = []
        for dtype in DTYPES:
            caught, wrong, alarms = counts[name, dtype]
            cells.append(f"{caught} of {wrong} / {alarms} of {len(CORRECT)}")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    TARGET.write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
