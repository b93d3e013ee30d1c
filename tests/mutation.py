"""Test the mutants that mutmut makes: all tests are collected once, and each mutant is a fork.

    export OMP_NUM_THREADS=1
    python -m mutmut run --max-children 1 "stabletx.masks.x__not_blocked__mutmut_1"  # make them all
    python -m tests.mutation                        # test those not tested yet
    python -m tests.mutation masks functional/tiled # of these files only
    python -m tests.mutation --again                # give those that survived every test there is
    python -m tests.mutation --again --seconds 5    # or five seconds of tests each
    python -m tests.mutation --report               # count them; name survivors without a reason

At first a mutant that lives through BUDGET seconds of tests counts as a survivor, which can only
make the figures look worse; ``--again`` has no such end unless it is given one.

mutmut's own runner starts pytest anew for each mutant, which takes longer than the tests do. The
results are written where mutmut keeps them, so ``mutmut results`` and ``mutmut show`` work.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import resource
import signal
import sys
import time
import tomllib
from collections import Counter, defaultdict
from pathlib import Path

import pytest

MUTANTS = Path("mutants").resolve()
REASONS = Path("docs/mutants.md").resolve()
SURVIVED, KILLED, NO_TESTS, TIMEOUT = 0, 1, 33, 36
# Seconds of processor time that one test may take beyond ten times its usual ones.
PATIENCE = 3.0
BUDGET = 1.5


class Results:
    """What became of each mutant, in the files that mutmut reads."""

    def __init__(self, wanted: list[str]) -> None:
        paths = sorted(MUTANTS.glob("stabletx/**/*.py.meta"))
        names = {path: path.relative_to(MUTANTS / "stabletx").as_posix() for path in paths}
        self.files = {
            path: json.loads(path.read_text())
            for path, name in names.items()
            if not wanted or any(name.startswith(one) for one in wanted)
        }

    def having(self, wanted: int | None) -> list[tuple[Path, str]]:
        return [
            (path, name)
            for path, file in self.files.items()
            for name, code in file["exit_code_by_key"].items()
            if code == wanted
        ]

    def table(self) -> str:
        """Count the mutants of each file; one that never ends is killed."""
        rows = ["| file | mutants | killed | survived | not tested |", "|---|---|---|---|---|"]
        total: Counter[int | None] = Counter()
        for path, file in sorted(self.files.items()):
            counts = Counter(file["exit_code_by_key"].values())
            total += counts
            if counts:
                rows.append(_row(path.relative_to(MUTANTS).as_posix()[: -len(".meta")], counts))
        return "\n".join([*rows, _row("all", total)])

    def put(self, path: Path, mutant: str, code: int) -> None:
        self.files[path]["exit_code_by_key"][mutant] = code
        path.write_text(json.dumps(self.files[path], indent=4))


def _row(name: str, counts: Counter[int | None]) -> str:
    tested = {code: n for code, n in counts.items() if code is not None}
    survived = tested.get(SURVIVED, 0) + tested.get(NO_TESTS, 0)
    killed = sum(tested.values()) - survived
    share = 100 * killed / max(1, killed + survived)
    return f"| {name} | {counts.total()} | {killed} ({share:.1f} %) | {survived} | {counts[None]} |"


class Session:
    """A pytest plugin that, in place of running the tests, tests every mutant with them."""

    def __init__(self, results: Results, *, again: bool, seconds: float) -> None:
        stats = json.loads((MUTANTS / "mutmut-stats.json").read_text())
        self.results = results
        self.work = results.having(SURVIVED if again else None)
        self.budget = seconds
        self.tests = stats["tests_by_mangled_function_name"]
        self.seconds: dict[str, float] = stats["duration_by_test"]
        self.kills: dict[str, Counter[str]] = defaultdict(Counter)
        self.failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {i.nodeid: i for i in session.items if i.nodeid in self.seconds}
        began = time.monotonic()
        # Whatever fails without a mutant would seem to kill every one.
        code, failing = self._fork("none", sorted(items.values(), key=self._time))
        if code != SURVIVED:
            pytest.exit(f"without a mutant {failing} fails", returncode=1)
        gc.freeze()
        for done, (path, mutant) in enumerate(self.work):
            function = mutant.rpartition("__mutmut_")[0]
            kills, file = self.kills[function], self.kills[path.name]
            names = [name for name in self.tests.get(function, ()) if name in items]
            # What killed a sibling, or mirrors the file, is likely to kill this one, and the quick
            # ones cost nothing; of many cases of one test the first says the most.
            mirror = f"/test_{path.name.partition('.')[0].strip('_')}"
            names.sort(
                key=lambda name: (
                    -(0.1 + 4 * (mirror in name) + file[name] + 9 * kills[name])
                    / (0.02 + self.seconds[name])
                )
            )
            tests = {name.partition("[")[0]: name for name in reversed(names)}
            firsts = {*tests.values(), *names[:3]}
            firsts.update(name for name in names if mirror in name and self.seconds[name] < 0.1)
            names.sort(key=lambda name: name not in firsts)
            code = NO_TESTS
            if names:
                code, killer = self._fork(mutant, [items[name] for name in names])
                kills.update(killer)
                file.update(killer)
            self.results.put(path, mutant, code)
            if code != KILLED:
                word = {SURVIVED: "survived", NO_TESTS: "no tests", TIMEOUT: "timeout"}[code]
                spent = f"{done + 1}/{len(self.work)}, {time.monotonic() - began:.0f} s"
                print(f"{mutant}: {word} ({spent})", file=sys.__stderr__, flush=True)
        return True

    def _time(self, item: pytest.Item) -> float:
        return self.seconds[item.nodeid]

    def _fork(self, mutant: str, items: list[pytest.Item]) -> tuple[int, list[str]]:
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            code = KILLED
            try:
                code = self._test(mutant, items, writer)
            finally:
                os._exit(code)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            killer = pipe.read().split("\n")[-2:-1]
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status in (-signal.SIGPROF, -signal.SIGXCPU, -signal.SIGKILL):
            return TIMEOUT, killer
        return (SURVIVED, []) if status == 0 else (KILLED, killer)

    def _test(self, mutant: str, items: list[pytest.Item], writer: int) -> int:
        os.environ["MUTANT_UNDER_TEST"] = mutant
        config = items[0].config
        config.pluginmanager.unregister(name="terminalreporter")
        # Nobody reads the traceback, and pytest's own takes seconds in a file of so many mutants.
        config.option.tbstyle = "native"
        resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
        for item in items:
            if mutant != "none" and time.process_time() > self.budget:
                break
            os.write(writer, f"{item.nodeid}\n".encode())
            signal.setitimer(signal.ITIMER_PROF, PATIENCE + 10 * self.seconds[item.nodeid])
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            if self.failed:
                return KILLED
        return SURVIVED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="files below stabletx, such as functional/tiled")
    parser.add_argument("--again", action="store_true", help="test those that survived")
    parser.add_argument("--seconds", type=float, help="of tests a mutant, processor time")
    parser.add_argument("--report", action="store_true", help="count them and leave")
    arguments = parser.parse_args()
    results = Results(arguments.files)
    if arguments.report:
        print(results.table())
        reasons = REASONS.read_text()
        names = [name for _, name in results.having(SURVIVED) + results.having(NO_TESTS)]
        print(*(f"no reason yet: {name}" for name in names if f"`{name}`" not in reasons), sep="\n")
        return
    seconds = arguments.seconds or (math.inf if arguments.again else BUDGET)
    session = Session(results, again=arguments.again, seconds=seconds)
    settings = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["mutmut"]
    chosen = settings["pytest_add_cli_args"] + settings["pytest_add_cli_args_test_selection"]
    os.environ["MUTANT_UNDER_TEST"] = ""
    os.chdir(MUTANTS)
    sys.path.insert(0, str(MUTANTS))
    # Nobody reads why an assertion failed either.
    sys.exit(pytest.main(["--rootdir=.", "--assert=plain", *chosen], [session]))


if __name__ == "__main__":
    main()
