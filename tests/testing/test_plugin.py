"""The pytest plugin and the command, as a project that uses them sees them."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stabletx.testing.command import add_check_arguments, run_check
from stabletx.testing.scoreboard import write_scoreboard

ROOT = Path(__file__).parent.parent.parent
PROJECT = """
import torch
from stabletx.testing.conformance import law_tests
from tests.{module} import {name} as attention

test_laws = law_tests(attention, dtypes=[torch.float32], max_examples=1)
"""


def run_pytest(tmp_path, module, name, *options):
    (tmp_path / "test_mine.py").write_text(PROJECT.format(module=module, name=name))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options,
               str(tmp_path / "test_mine.py")]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_one_test_a_law_passes_or_is_skipped_with_a_reason(tmp_path):
    done = run_pytest(
        tmp_path, "correct_attentions", "in_float32", "-rs", "--stabletx-effort=quick"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "attention held to the laws" in done.stdout
    assert "not asked: not named in supports" in done.stdout


def test_the_failure_shows_the_code(tmp_path):
    text = PROJECT.format(module="mutants", name="worse_attention")
    text = text.replace("import worse_attention as attention", "import MUTANTS")
    text = text.replace("(attention,", "(next(m for m in MUTANTS if m.name == 'zeros'),")
    (tmp_path / "test_mine.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "agreement or form",
         str(tmp_path / "test_mine.py")],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert 'replay("agreement"' in done.stdout


def parsed(*words):
    parser = argparse.ArgumentParser()
    add_check_arguments(parser)
    return parser.parse_args(words)


def test_the_command_reports_and_fails(capsys, tmp_path):
    fast = ("--effort", "quick", "--max-examples", "1", "--dtypes", "float32")
    good = parsed("tests.correct_attentions:in_float32", *fast, "--html", str(tmp_path / "a.html"),
                  "--json", str(tmp_path / "deep" / "a.json"))  # fmt: skip
    assert run_check(good) == 0
    assert (tmp_path / "a.html").exists()
    assert (tmp_path / "deep" / "a.json").exists()
    assert run_check(parsed("torch:mha", *fast)) == 1
    assert "FAILED" in capsys.readouterr().out


def test_the_command_says_what_is_missing(capsys):
    assert run_check(parsed("no.such:thing")) == 2
    assert "not available" in capsys.readouterr().err
    assert run_check(parsed()) == 2
    assert "name must be given" in capsys.readouterr().err
    assert run_check(parsed("--list")) == 0
    assert "torch:sdpa" in capsys.readouterr().out


@pytest.mark.timeout(120)
def test_the_scoreboard_has_a_row_for_each_attention(tmp_path):
    said = []
    page = write_scoreboard(
        tmp_path, progress=said.append, max_examples=1, budget_seconds=0.05, dtypes=[torch.float32]
    )
    text = page.read_text(encoding="utf-8")
    for name in ("torch:sdpa", "torch:mha", "stabletx"):
        assert f"\n| {name}" in text
    assert (tmp_path / "laws.svg").read_text(encoding="utf-8").startswith("<svg")
    assert len(said) == 9


def test_the_plugin_itself_is_light():
    code = (
        "import ast, pathlib, importlib.util as u; "
        "p = pathlib.Path(u.find_spec('stabletx').submodule_search_locations[0])"
        " / 'testing' / 'plugin.py'; "
        "t = ast.parse(p.read_text()); "
        "print([a.name for n in t.body if isinstance(n, ast.Import) for a in n.names])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['pytest']"
