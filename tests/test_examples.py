"""Every example runs, on a part of its data."""

import pytest

from stabletx.data import NetworkNeeded, load_named
from tests.run_example import EXAMPLES, run


def test_custom_model_learns():
    said = run("custom_model.py")
    accuracy = float(said.splitlines()[0].split(":")[1])
    assert accuracy > 0.9
    assert "[[1, 1, 1, 1]]" in said


def test_text_classification_says_how_it_went():
    said = run("text_classification.py", "--rows", "400", "--epochs", "1")
    assert "accuracy 0." in said


def test_huggingface_attention_agrees_and_stays_finite():
    said = run("huggingface_attention.py")
    assert float(said.splitlines()[0].rpartition(" ")[2]) < 1e-4
    assert ", stabletx 0\n" in said
    assert "one of the empty text to 0.000" in said


def test_swapped_import_saves_the_model():
    theirs, ours = run("swapped_import.py").splitlines()
    assert theirs.startswith("torch.nn: ")
    assert ", 0 weights are NaN" in ours
    assert float(ours.split("accuracy ")[1].split(",")[0]) > 0.9


def test_trainer_goes_on_where_it_stopped(tmp_path):
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    options = ("--rows", "300", "--epochs", "2", "--folder", str(tmp_path / "run"))
    said = run("fine_tune_with_trainer.py", *options)
    assert "test accuracy: 0." in said
    assert (tmp_path / "run" / "config.json").exists()


@pytest.mark.nightly
def test_exported_model_answers_alike(tmp_path):
    options = ("--rows", "400", "--only", "float64,onnx", "--folder", str(tmp_path / "run"))
    said = run("export_and_check.py", *options)
    assert "ONNX Runtime says" in said
    assert (tmp_path / "run" / "parity.png").exists()


@pytest.mark.network
@pytest.mark.nightly
def test_fine_tuned_minilm_answers():
    try:
        load_named("rotten-tomatoes")
        said = run(
            "fine_tune_minilm.py", "--rows", "64", "--epochs", "1", "--max-len", "32", "fine"
        )
    except NetworkNeeded as error:
        pytest.skip(str(error))
    assert "accuracy: 0." in said


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
