"""Print the cost of attention against torch's own, as the table of docs/measured.md.

``python -m benchmarks.attention_cost [--rounds N]``
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path

import torch

from benchmarks.attention import attention_workloads, build
from benchmarks.interleave import interleaved
from benchmarks.machine import machine


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"{machine()}\n\n| workload | ours, ms | torch, ms | ratio | spread |\n"
        "|---|---|---|---|---|"
    )
    groups: dict[str, list[float]] = defaultdict(list)
    rows = {}
    for work in attention_workloads():
        found = interleaved(*build(work), rounds=arguments.rounds)
        rows[work.name] = found._asdict()
        groups[f"{str(work.dtype).removeprefix('torch.')} {work.kind}"].append(found.ratio)
        figures = " | ".join(f"{x:.3g}" for x in found)
        print(f"| {work.name} | {figures} |", flush=True)
    print("\n| group | geometric mean | worst |\n|---|---|---|")
    for name, ratios in groups.items():
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"| {name} | {mean:.3f} | {max(ratios):.3f} |")
    if arguments.save:
        arguments.save.parent.mkdir(parents=True, exist_ok=True)
        arguments.save.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
