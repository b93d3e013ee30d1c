"""Hold every method to the derived bound on very many drawn cases, and record how near it comes.

    python -m tests.many_cases --summary cases.jsonl             # 100,000 a dtype: an hour
    python -m tests.many_cases --dtypes float16 --parts 4 8      # four parts of 2,500 cases

A part is drawn from its own number, so that a run can be repeated, gone on with, and divided: parts
0 to 20 in one process and 20 to 40 in another are the 40 parts of the whole.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from hypothesis import HealthCheck, given, seed, settings

from stabletx.testing.strategies import attention_cases
from tests.ways import METHODS, attention

CASES_A_PART = 2_500
PARTS = 40
OTHERS = tuple(method for method in METHODS if method != "kernel")


def run(case, method):
    """Attend to a case; give the output and every gradient that the bound speaks of."""
    names = ["q", "k", "v", "bias", "sinks"]
    given_ = {name: getattr(case, name) for name in names if getattr(case, name) is not None}
    leaves = {name: x.detach().requires_grad_() for name, x in given_.items()}
    options = {name: leaves.get(name) for name in ("bias", "sinks")}
    out = attention(
        leaves["q"], leaves["k"], leaves["v"], mask=case.mask, scale=case.scale,
        softcap=case.softcap, method=method, **options,
    )  # fmt: skip
    grads = torch.autograd.grad(out, list(leaves.values()), case.grad_out)
    return {"out": out.detach(), **{f"d{n}": x for n, x in zip(leaves, grads, strict=True)}}


def occupancies(case):
    """Give, for each method, the largest share of the bound that any element takes."""
    exact, bound = answers(case)
    names = list(exact)
    limits, expected = joined(bound, names), joined(exact, names)
    methods = METHODS if may_reach_the_kernel(case) else OTHERS
    results = [run(case, method) for method in methods]
    found = torch.stack([joined(result, names) for result in results])
    error = (found - expected).abs()
    fits = torch.where(expected.isnan(), found.isnan(), error <= limits)
    if not fits.all():
        sizes = [exact[name].numel() for name in names]
        outside = {
            (method, name): float(ratio.nan_to_num(math.inf).max())
            for method, row, held in zip(methods, error / limits, fits, strict=True)
            for name, ratio, kept in zip(names, row.split(sizes), held.split(sizes), strict=True)
            if not kept.all()
        }
        raise AssertionError(f"outside the bound, in times the bound: {outside}")
    if not error.shape[1]:
        return dict.fromkeys(methods, 0.0)
    shares = (error / limits.clamp(min=torch.finfo(torch.float64).tiny)).nan_to_num(0.0)
    return dict(zip(methods, shares.amax(1).tolist(), strict=True))


def may_reach_the_kernel(case):
    """Tell whether "kernel" may be another way than "auto", which takes tiles for all these."""
    needs_tiles = (case.bias, case.softcap, case.sinks)
    return all(x is None for x in needs_tiles) and case.q.shape[3] == case.v.shape[3]


def answers(case):
    """Give the exact output and gradients by name, and their bounds."""
    judged = case.judged()
    exact = {"out": judged.out, **judged.gradients._asdict()}
    return {name: x for name, x in exact.items() if x is not None}, judged.bound._asdict()


def joined(tensors, names):
    return torch.cat([tensors[name].flatten().double() for name in names])


class Held(NamedTuple):
    """How many cases were held to the bound, and the largest share of it by method."""

    cases: int
    occupancy: dict[str, float]


def hold_to_the_bound(dtype, part, n_cases=CASES_A_PART):
    """Draw one part of the cases; fail at the first outside, or say how near they came."""
    worst = dict.fromkeys(METHODS, 0.0)
    count = 0

    @seed(part)
    @settings(
        max_examples=n_cases, derandomize=False, database=None, deadline=None,
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip
    @given(
        attention_cases(dtypes=[dtype], max_len=65, bias=True, softcap=True, sinks=True, empty=True)
    )
    def holds(case):
        nonlocal count
        count += 1
        for method, share in occupancies(case).items():
            assert share <= 1.0, method
            worst[method] = max(worst[method], share)

    holds()
    return Held(count, worst)


def run_parts(name: str, parts: range) -> dict[str, object]:
    """Hold the parts of one dtype to the bound, print a line for each and sum them up."""
    cases, outside, worst, began = 0, [], dict.fromkeys(METHODS, 0.0), time.process_time()
    for part in parts:
        started = time.process_time()
        try:
            held = hold_to_the_bound(getattr(torch, name), part)
        except AssertionError as error:
            outside.append(part)
            print(f"{name} part {part}: OUTSIDE the bound", error, *error.__notes__, sep="\n")
            continue
        cases += held.cases
        worst = {method: max(worst[method], held.occupancy[method]) for method in METHODS}
        seconds = time.process_time() - started
        print(f"{name} part {part}: {_line(held.occupancy)} ({seconds:.0f} s)", flush=True)
    print(f"{name}: {cases:,} cases inside the bound; occupancy {_line(worst)}", flush=True)
    return {
        "dtype": name, "parts": [parts.start, parts.stop], "cases": cases,
        "violations": len(outside), "parts_outside": outside, "occupancy": worst,
        "core_minutes": round((time.process_time() - began) / 60, 1), "torch": torch.__version__,
    }  # fmt: skip


def main() -> None:
    """Hold the parts that are asked for; leave with 1 where a case fell outside."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dtypes", nargs="+", default=["float64", "float32", "bfloat16", "float16"]
    )
    parser.add_argument("--parts", nargs=2, type=int, default=(0, PARTS), metavar=("FROM", "TO"))
    parser.add_argument("--summary", type=Path, help="file that gains a JSON line a dtype")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    violations = 0
    for name in arguments.dtypes:
        found = run_parts(name, range(*arguments.parts))
        violations += found["violations"]
        if arguments.summary:
            with arguments.summary.open("a") as file:
                file.write(json.dumps(found) + "\n")
    raise SystemExit(1 if violations else 0)


def _line(shares: dict[str, float]) -> str:
    return ", ".join(f"{method} {share:.3f}" for method, share in shares.items())


if __name__ == "__main__":
    main()
