"""Every example runs, on a part of its data."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stabletx.data import NetworkNeeded, load_named

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, *arguments):
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_custom_model_learns():
    said = run("custom_model.py")
    accuracy = float(said.splitlines()[0].split(":")[1])
    assert accuracy > 0.9
    assert "[[1, 1, 1, 1]]" in said


def test_text_classification_says_how_it_went():
    said = run("text_classification.py", "--rows", "400", "--epochs", "1")
    assert "accuracy 0." in said


@pytest.mark.network
def test_sentiment_analysis_answers():
    try:
        load_named("rotten-tomatoes")
    except NetworkNeeded as error:
        pytest.skip(str(error))
    said = run("sentiment_analysis.py", "--rows", "200", "--epochs", "1", "a fine film")
    assert "a fine film" in said


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) <= 80
