"""Contestants in processes of their own, so that one runtime's threads do not slow another's.

CTranslate2 loaded beside torch waits on the same OpenMP, which then counts more threads than there
are cores and puts them to sleep between any two steps: everybody's short calls, its own too, take
up to half as long again.

``python -m benchmarks.apart PART WORKLOAD CONTESTANT DEVICE THREADS`` serves one contestant.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.errors import BenchmarkError
from benchmarks.interleave import TURN_APART, turn_of

ROOT = Path(__file__).resolve().parents[1]


class Apart:
    """A contestant in another process, which times itself when it is its turn.

    Raises:
        ImportError: if what it needs is not installed.
        BenchmarkError: if its process ends by itself, in its turns too.
    """

    def __init__(self, part: str, workload: str, name: str, device: str) -> None:
        self._name = name
        words = [part, workload, name, device, str(torch.get_num_threads())]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.apart", *words],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            found = self._answer("built")
            if "missing" in found:
                raise ImportError(name=found["missing"])
            self.error = float(found["error"])
        except BaseException:  # an interrupt too
            self.close()
            raise

    def seconds(self) -> float:
        """Take a turn; give the mean time of a call."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("turn\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:  # the command line would take it for its reader leaving
            raise self._has_ended() from error
        return float(self._answer("turn")["seconds"])

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _answer(self, kind: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(f'{{"{kind}"'):  # all else is what a peer prints
                found: dict[str, Any] = json.loads(line)[kind]
                return found
        raise self._has_ended()

    def _has_ended(self) -> BenchmarkError:
        code = self._process.wait()
        return BenchmarkError(
            f"{self._name} must take its turns to the end, got a process that ended with {code}. "
            "What it said stands above; uninstall what it needs to leave it out."
        )


def serve(part: str, workload: str, name: str, device: str) -> None:
    """Build one contestant, say its error, and take a turn for every line that comes in."""
    contest = importlib.import_module(f"benchmarks.{part}").contest(workload, device)
    with torch.inference_mode(contest.is_inference):
        try:
            call = contest.makers[name]()
        except ImportError as missing:
            _say("built", {"missing": missing.name or str(missing)})
            return
        _say("built", {"error": contest.error(call())})
        turn = turn_of(call, TURN_APART, device)
        for _ in sys.stdin:
            _say("turn", {"seconds": turn()})


def _say(kind: str, found: dict[str, Any]) -> None:
    # On a line of its own: a peer may have left one open.
    print(f"\n{json.dumps({kind: found})}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[5]))
    serve(*sys.argv[1:5])
