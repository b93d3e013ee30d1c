"""Every workload of every part, each contestant a row of the workload's table.

The contestants of a workload are measured together, turn by turn, when the first of them is asked
for; each row then replays its own rounds into pytest-benchmark.
"""

import resource

import pytest

from benchmarks.contest import BenchmarkError
from benchmarks.machine import commit, machine


class Replay:
    """A clock that ticks what was measured: twice a round, a round apart."""

    def __init__(self):
        self.ticks = iter(())

    def load(self, milliseconds):
        self.ticks = iter([tick for ms in milliseconds for tick in (0.0, ms / 1e3)])

    def __call__(self):
        return next(self.ticks)


REPLAY = Replay()


def record(benchmark, case, about):
    benchmark.group = f"{case.part}-{case.name}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    benchmark.extra_info.update(about, machine=machine(), commit=commit(), peak_process_mb=peak)


@pytest.mark.benchmark(timer=REPLAY, disable_gc=False)
def bench_workload(benchmark, settings, outcomes, case, name):
    key = (case.part, case.name)
    if key not in outcomes:
        outcomes[key] = case.run(settings)
    row = outcomes[key].rows[name]
    if row.reason:
        if row.reason.startswith("wrong"):
            raise BenchmarkError(f"{name} is {row.reason}.")
        pytest.skip(row.reason)
    ratio = {"ratio": row.ratio, "ratio_spread": row.ratio_spread, "error": row.error}
    record(benchmark, case, {**outcomes[key].about, **ratio, "asked": case.asked.get(name)})
    REPLAY.load(row.rounds_ms)
    benchmark.pedantic(lambda: None, rounds=len(row.rounds_ms))


@pytest.mark.benchmark(disable_gc=False)
def bench_curve(benchmark, settings, case):
    """Measure against length; the row's time is that of the whole measurement."""
    outcome = benchmark.pedantic(case.run, args=(settings,))
    points = {name: row.points for name, row in outcome.rows.items()}
    record(benchmark, case, {**outcome.about, "points": points, "unit": case.unit})
