"""Hold every method to the derived bound on very many drawn cases, and record how near it comes.

    python -m tests.many_cases                                   # 100,000 a dtype: hours
    python -m tests.many_cases --dtypes float16 --parts 4 8      # four parts of 2,500 cases

A part is drawn from its own number, so that a run can be divided, repeated and gone on with.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict

import torch
from hypothesis import HealthCheck, given, seed, settings

from stabletx import attention
from stabletx.testing.strategies import attention_cases

METHODS = ("auto", "tiled", "exact")
CASES_A_PART = 2_500
PARTS = 40


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
    expected = {"out": case.reference().out, **case.gradients()._asdict()}
    bound = case.bound()._asdict()
    return {method: _share(run(case, method), expected, bound) for method in METHODS}


def _share(found, expected, bound):
    worst = 0.0
    for name, actual in found.items():
        if bound[name] is None:
            continue
        error = (actual.double() - expected[name]).abs()
        fits = torch.where(expected[name].isnan(), actual.isnan(), error <= bound[name])
        assert fits.all(), (name, float((error / bound[name]).nan_to_num(math.inf).max()))
        share = (error / bound[name].clamp(min=torch.finfo(torch.float64).tiny)).nan_to_num(0.0)
        worst = max(worst, float(share.max())) if share.numel() else worst
    return worst


def hold_to_the_bound(dtype, part, n_cases=CASES_A_PART):
    """Draw one part of the cases; fail at the first outside, or return each method's occupancy."""
    worst = defaultdict(float)

    @seed(part)
    @settings(
        max_examples=n_cases, derandomize=False, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(
        attention_cases(dtypes=[dtype], max_len=65, bias=True, softcap=True, sinks=True, empty=True)
    )
    def holds(case):
        for method, share in occupancies(case).items():
            assert share <= (0.0 if case.exact else 1.0), method
            worst[method] = max(worst[method], share)

    holds()
    return dict(worst)


def main() -> None:
    """Draw parts, and print a line for each and the worst of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dtypes", nargs="+", default=["float64", "float32", "bfloat16", "float16"]
    )
    parser.add_argument("--parts", nargs=2, type=int, default=(0, PARTS), metavar=("FROM", "TO"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.dtypes:
        worst = dict.fromkeys(METHODS, 0.0)
        for part in range(*arguments.parts):
            started = time.perf_counter()
            found = hold_to_the_bound(getattr(torch, name), part)
            worst = {method: max(worst[method], found[method]) for method in METHODS}
            seconds = time.perf_counter() - started
            print(f"{name} part {part}: {_line(found)} ({seconds:.0f} s)", flush=True)
        n_cases = (arguments.parts[1] - arguments.parts[0]) * CASES_A_PART
        print(f"{name}: {n_cases:,} cases inside the bound; occupancy {_line(worst)}", flush=True)


def _line(shares: dict[str, float]) -> str:
    return ", ".join(f"{method} {share:.3f}" for method, share in shares.items())


if __name__ == "__main__":
    main()
