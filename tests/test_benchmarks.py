"""The benchmarks: every case at its smallest size, what they refuse, file, page and pictures."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs the bench extra")

from benchmarks import apart, command, imports, memory, page, pictures, results
from benchmarks.apart import Apart
from benchmarks.contest import (
    OURS,
    BenchmarkError,
    Contest,
    Outcome,
    Row,
    Settings,
    hold,
    ragged_lengths,
)
from benchmarks.encoder import cases as encoder_cases
from benchmarks.interleave import Timing, in_turns
from benchmarks.parts import PARTS, chosen_cases
from stabletx.cli import main

ROOT = Path(__file__).parent.parent
QUICK = Settings(rounds=1, is_quick=True)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Run every part once, at its smallest size, and write the page."""
    folder = tmp_path_factory.mktemp("results")
    said = []
    request = command.Request(rounds=1, is_quick=True, folder=folder, machine="mill")
    path = command.bench(request, said.append)
    page.write(folder, folder)
    return path, json.loads(path.read_text()), "\n".join(said)


def test_results_hold_every_part_workload_and_contestant(measured):
    path, found, _ = measured
    assert path.name == "mill--cpu.json"
    assert set(found["parts"]) == set(PARTS)
    for case in chosen_cases([], QUICK):
        rows = found["parts"][case.part]["workloads"][case.name]["rows"]
        assert set(case.names) <= set(rows)
        for row in rows.values():
            assert row.get("reason") or row.get("points") or row["ms"] > 0.0
        assert "reason" not in rows[OURS]


def test_a_peer_is_missing_only_where_it_is_not_installed(measured):
    found = measured[1]
    reasons = {
        row["reason"]
        for part in found["parts"].values()
        for work in part["workloads"].values()
        for row in work["rows"].values()
        if "reason" in row
    }
    assert all(reason.endswith("is not installed") for reason in reasons)


def test_results_say_commit_versions_and_threads(measured):
    for part in measured[1]["parts"].values():
        assert part["commit"]
        assert part["machine"]["threads"] == torch.get_num_threads()
        assert part["machine"]["versions"]["torch"] == torch.__version__


def test_what_is_printed_names_workload_and_ratio(measured):
    said = measured[2]
    assert "encoder: tiny-b2-n16-float32" in said
    assert "ratio" in said
    assert f"Written to {measured[0]}" in said


def test_pictures_are_drawn_for_every_part_that_has_one(measured):
    folder = measured[0].parent
    for part in (*pictures.BAR_PARTS, "growth", "memory"):
        for place in (folder, folder / "images"):
            drawn = place / pictures.picture_name("mill--cpu", part)
            assert drawn.read_bytes().startswith(b"\x89PNG")


def test_page_says_what_was_asked_who_is_ahead_and_that_no_gpu_was_used(measured):
    text = (measured[0].parent / "speed.md").read_text()
    assert "| encoder, tiny-b2-n16-float32 | CTranslate2 | at most 0.85 |" in text
    assert "### Where a peer is ahead" in text
    assert "| memory of the process, 1,024 tokens, width 384 |  | at most 2,048 MB |" in text
    assert "images/speed-mill--cpu-encoder.png" in text
    assert "**Not measured.**" in text


def test_page_lists_a_faster_peer_and_what_is_short():
    rows = {OURS: {"ms": 2.0, "ratio": 1.0}, "rival": {"ms": 1.0, "ratio": 2.0}}
    work = {"unit": "ms", "asked": {"best": 0.8}, "about": {}, "rows": rows}
    found = {"parts": {"encoder": {"workloads": {"some": work}}}}
    (line,) = page.asked_lines(found)
    assert (line.peer, line.is_met) == ("best of all: rival", False)
    assert list(page.peers_ahead(found)) == [("encoder", "some", "rival", "2.000 ± 0.000")]


def test_page_of_the_clone_is_made_from_its_results(tmp_path):
    page.write(results.folder(), tmp_path)
    assert (tmp_path / "speed.md").read_text() == (ROOT / "docs" / "speed.md").read_text()


def contest(ours, theirs, **options):
    makers = {OURS: lambda: lambda: ours, "rival": lambda: lambda: theirs}
    return Contest(makers, lambda out: abs(out - 1.0), {"": 0.1}, **options)


def test_a_wrong_peer_gets_no_time():
    row = hold(contest(1.0, 2.0), QUICK).rows["rival"]
    assert row.ms is None
    assert row.reason == "wrong by 1, more than 0.1"


@pytest.mark.parametrize("value", [2.0, float("nan")])
def test_a_wrong_answer_of_ours_is_refused(value):
    with pytest.raises(BenchmarkError, match="stabletx is off by"):
        hold(contest(value, 1.0), QUICK)


def test_a_peer_that_is_not_installed_is_left_out(monkeypatch):
    for name in ("transformers", "x_transformers", "onnxruntime", "ctranslate2"):
        monkeypatch.setitem(sys.modules, name, None)
    case = encoder_cases(QUICK)[0]
    rows = case.run(QUICK).rows
    missing = {name for name, row in rows.items() if row.reason.endswith("is not installed")}
    assert missing == set(case.names) - {OURS, "nn.TransformerEncoder"}


def test_shares_are_of_limits_timed_in_the_same_rounds():
    about = hold(contest(1.0, 1.0, flops=1e9, n_bytes=1e6), Settings(rounds=1)).about
    assert about["peak_gflops"] > 0
    assert about["share_of_products"] > 0
    assert about["share_of_bandwidth"] > 0


def test_a_contestant_in_another_process_says_its_error_and_takes_turns():
    other = Apart("encoder", "minilm-b1-n32-full-float32", "nn.TransformerEncoder", "cpu")
    timings = in_turns({"other": other}, rounds=2)
    other.close()
    assert other.error < 1e-4
    assert all(seconds > 0 for seconds in timings["other"].rounds)


def test_a_contestant_that_ends_in_another_process_is_no_result():
    with pytest.raises(BenchmarkError, match=f"{OURS} must take its turns .* ended with 1"):
        Apart("encoder", "no such workload", OURS, "cpu")
    other = Apart("encoder", "minilm-b1-n32-full-float32", "nn.TransformerEncoder", "cpu")
    other._process.kill()
    other._process.wait()
    with pytest.raises(BenchmarkError, match=r"TransformerEncoder must take .* ended with -9"):
        other.seconds()
    other.close()


def test_an_answer_is_found_behind_what_a_peer_printed(capfd):
    print("no end of line", end="")
    apart._say("turn", {"seconds": 1.0})
    assert capfd.readouterr().out.splitlines() == ["no end of line", '{"turn": {"seconds": 1.0}}']
    said = "print('hello'); print('no end of line', end=''); print('\\n', 1.5, 2.5)"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert memory._figures(done.stdout) == (1.5, 2.5)


@pytest.mark.parametrize("allowed", [{"": 1.0, "other": 0.0}, {"": 1.0}])
def test_no_contestant_in_another_process_is_left_behind(allowed, monkeypatch):
    ended = []
    monkeypatch.setattr(Apart, "__init__", lambda self: setattr(self, "error", 0.5))
    monkeypatch.setattr(Apart, "close", lambda self: ended.append(self))
    monkeypatch.setattr(Apart, "seconds", lambda _: 1 / 0)
    tried = Contest({"other": Apart, OURS: Apart}, float, allowed)
    with pytest.raises(ZeroDivisionError):
        hold(tried, Settings(rounds=1))
    assert len(ended) == 2


def test_ratio_is_taken_round_by_round():
    ours, theirs = Timing(0.0, 0.0, (1.0, 20.0, 3.0)), Timing(0.0, 0.0, (2.0, 40.0, 6.0))
    assert theirs.ratio_of(ours) == (0.5, 0.0)


def test_every_round_begins_with_another_contestant_and_every_turn_with_a_call_to_warm_up():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    in_turns(calls, rounds=3, seconds_a_turn=0.0)
    assert "".join(order[-18:]) == "aabbccbbccaaccaabb"


@pytest.mark.parametrize("b", [8, 32])
def test_lengths_reach_the_longest_and_have_the_asked_mean(b):
    lengths = ragged_lengths(b, 128, 0.4)
    assert int(lengths.max()) == 128
    assert abs(float(lengths.float().mean()) / 128 - 0.4) < 0.01
    assert torch.equal(lengths, ragged_lengths(b, 128, 0.4))


def test_another_run_of_a_part_keeps_the_others(tmp_path):
    path = tmp_path / "mill--cpu.json"
    case = imports.cases(QUICK)[0]
    entry = results.entry(case, Outcome({OURS: Row(ms=1.0)}))
    results.save(path, "cpu", {"encoder": {"one": entry}}, seconds={})
    results.save(path, "cpu", {"decode": {"two": entry}}, seconds={})
    assert set(results.read(path)["parts"]) == {"encoder", "decode"}


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": {}}', '{"format": 1}', '{"format": 2}'])
def test_a_file_that_is_no_results_file_is_not_written_over(tmp_path, text):
    (tmp_path / "mill--cpu.json").write_text(text)
    request = command.Request(["guards"], machine="mill", folder=tmp_path, is_quick=True)
    with pytest.raises(BenchmarkError, match=r"mill--cpu\.json must be a results file"):
        command.bench(request, print)
    assert (tmp_path / "mill--cpu.json").read_text() == text


def test_results_that_cannot_be_written_are_refused_before_the_work(tmp_path):
    (tmp_path / "taken").write_text("a file")
    request = command.Request(["guards"], machine="mill", folder=tmp_path / "taken", is_quick=True)
    said = []
    with pytest.raises(BenchmarkError, match=r"results must be a folder .*taken: "):
        command.bench(request, said.append)
    request = request._replace(folder=tmp_path, machine="m" * 300)
    with pytest.raises(BenchmarkError, match=r"results must be a folder .* too long"):
        command.bench(request, said.append)
    assert not said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--part", "speed"], "part must be one of encoder, .*, got part='speed'"),
        (["--rounds", "0"], "rounds must be at least 1, got rounds=0"),
        (["--threads", "-1"], "threads must be at least 1, got threads=-1"),
        (["--machine", "../mill"], "machine must be of letters, .*, got machine='../mill'"),
        (["--quick"], "quick must come with a folder of its own"),
        pytest.param(
            ["--device", "cuda"],
            "device must be there, got device='cuda'",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bench_refuses_what_it_cannot_measure(capsys, options, message):
    assert main(["bench", *options]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert re.search(message, error)


def test_bench_measures_a_part_from_the_command_line(capsys, tmp_path):
    options = ["--part", "guards", "--quick", "--rounds", "1", "--machine", "mill"]
    assert main(["bench", *options, "--results", str(tmp_path)]) == 0
    assert "guards: 1x2x8x4" in capsys.readouterr().out
    assert set(results.read(tmp_path / "mill--cpu.json")["parts"]) == {"guards"}


def test_page_without_results_says_so(tmp_path, capsys):
    assert page.main(["--results", str(tmp_path / "none")]) == 2
    assert "results must lie in" in capsys.readouterr().err


def pytest_of_benchmarks(*options):
    command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider", *options]
    # A child of a parallel run is not one of its workers: it would be told not to measure.
    own = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    return subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=False)


def test_pytest_runs_a_part_with_a_row_for_each_contestant():
    pytest.importorskip("pytest_benchmark", reason="needs the bench extra")
    done = pytest_of_benchmarks("--quick", "--rounds", "1", "--part", "guards")
    assert done.returncode == 0, done.stdout
    assert "cpu-guards-1x2x8x4-torch SDPA" in done.stdout
    assert "3 passed" in done.stdout


def test_pytest_refuses_an_unknown_part():
    done = pytest_of_benchmarks("--part", "speed")
    assert done.returncode == 4
    assert "part must be one of" in done.stderr
