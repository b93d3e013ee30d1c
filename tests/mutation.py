"""Test the mutants that mutmut makes: all tests are collected once, and each mutant is a fork.

    export OMP_NUM_THREADS=1
    python -m mutmut run --max-children 1 nothing   # make the mutants, find the tests of each
    python -m tests.mutation                        # test those not tested yet
    python -m tests.mutation masks functional/tiled # of these files only

mutmut's own runner starts pytest anew for each mutant, which takes longer than the tests do. The
results are written where mutmut keeps them, so ``mutmut results`` and ``mutmut show`` work.
"""

from __future__ import annotations

import argparse
import json
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
SURVIVED, KILLED, NO_TESTS, TIMEOUT = 0, 1, 33, 36
# Seconds of processor time that one test may take beyond ten times its usual ones.
PATIENCE = 3.0


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

    def untested(self) -> list[tuple[Path, str]]:
        return [
            (path, name)
            for path, file in self.files.items()
            for name, code in file["exit_code_by_key"].items()
            if code is None
        ]

    def put(self, path: Path, mutant: str, code: int) -> None:
        self.files[path]["exit_code_by_key"][mutant] = code
        path.write_text(json.dumps(self.files[path], indent=4))


class Session:
    """A pytest plugin that, in place of running the tests, tests every mutant with them."""

    def __init__(self, results: Results) -> None:
        stats = json.loads((MUTANTS / "mutmut-stats.json").read_text())
        self.results = results
        self.tests = stats["tests_by_mangled_function_name"]
        self.seconds = stats["duration_by_test"]
        self.kills: dict[str, Counter[str]] = defaultdict(Counter)
        self.failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        work, began = self.results.untested(), time.monotonic()
        for done, (path, mutant) in enumerate(work):
            function = mutant.rpartition("__mutmut_")[0]
            kills, file = self.kills[function], self.kills[path.name]
            names = [name for name in self.tests.get(function, ()) if name in items]
            # What killed a sibling is likely to kill this one; then the quick ones.
            names.sort(key=lambda name: (-kills[name], -file[name], self.seconds[name]))
            code = NO_TESTS
            if names:
                code, killer = self._fork(mutant, [items[name] for name in names])
                kills.update(killer)
                file.update(killer)
            self.results.put(path, mutant, code)
            if code != KILLED:
                word = {SURVIVED: "survived", NO_TESTS: "no tests", TIMEOUT: "timeout"}[code]
                spent = f"{done + 1}/{len(work)}, {time.monotonic() - began:.0f} s"
                print(f"{mutant}: {word} ({spent})", file=sys.__stdout__, flush=True)
        return True

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
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
        for item in items:
            os.write(writer, f"{item.nodeid}\n".encode())
            signal.setitimer(signal.ITIMER_PROF, PATIENCE + 10 * self.seconds[item.nodeid])
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            if self.failed:
                return KILLED
        return SURVIVED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="files below stabletx, such as functional/tiled")
    results = Results(parser.parse_args().files)
    settings = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["mutmut"]
    chosen = settings["pytest_add_cli_args"] + settings["pytest_add_cli_args_test_selection"]
    os.environ["MUTANT_UNDER_TEST"] = ""
    os.chdir(MUTANTS)
    sys.path.insert(0, str(MUTANTS))
    sys.exit(pytest.main(["--rootdir=.", *chosen], [Session(results)]))


if __name__ == "__main__":
    main()
