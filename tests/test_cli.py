"""The program, as a user meets it: what it prints, what it leaves behind, how it ends."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from stabletx.cli import main

pytest.importorskip("tokenizers", reason="needs the text extra")

WORDS = {
    "sport": "match goal team player score win league coach",
    "food": "bread soup salt taste cook oven sugar meal",
}
SMALL = ["--epochs", "3", "--max-len", "24", "--lr", "0.01", "--batch-tokens", "256"]
SMALL += ["--no-baseline"]


def rows(n):
    for i in range(n):
        label = ("sport", "food")[i % 2]
        words = WORDS[label].split()
        yield " ".join(words[(i * k + k) % 8] for k in (1, 3, 5)) + f" number {i}", label


def write_csv(path, lines, header="text,label"):
    path.write_text(header + "\n" + "".join(f"{text},{label}\n" for text, label in lines))
    return str(path)


def run(capsys, *argv):
    """Run the program in this process; return its exit code and what it printed."""
    capsys.readouterr()
    try:
        code = main(list(argv))
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def refused(capsys, *argv, code=2):
    """Run the program, which must end with one line about the error and no traceback."""
    found, out, err = run(capsys, *argv)
    assert found == code, (out, err)
    assert "Traceback" not in err
    line = err.strip().splitlines()[-1]
    assert line.startswith(f"stabletx {argv[0]}: ")
    return line


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train a small model once; give the folder that holds its data and its run."""
    folder = tmp_path_factory.mktemp("trained")
    before = os.getcwd()
    os.chdir(folder)
    try:
        data = write_csv(folder / "small.csv", rows(160))
        options = [*SMALL[:-1], "--epochs", "8", "--max-seconds", "60", "--tensorboard"]
        assert main(["train", data, "--name", "small", *options]) == 0
    finally:
        os.chdir(before)
    return folder


def test_run_folder_holds_everything(trained):
    names = {path.name for path in (trained / "runs" / "small").iterdir()}
    assert names == {
        "config.json", "model.safetensors", "tokenizer.json", "metrics.json", "log.jsonl",
        "report.html", "run.json", "tensorboard", "loss.png", "accuracy.png", "confusion.png",
        "calibration.png", "attention-1.png", "attention-2.png",
    }  # fmt: skip
    metrics = json.loads((trained / "runs" / "small" / "metrics.json").read_text())
    assert metrics["accuracy"] > 0.9
    names = [own["name"] for own in metrics["baselines"]]
    assert names == ["majority class", "TF-IDF + logistic regression"]


def test_report_shows_every_picture_and_needs_no_other_file(trained):
    page = (trained / "runs" / "small" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert 'src="http' not in page


def test_train_tells_how_it_went(capsys, here):
    data = write_csv(here / "small.csv", rows(60))
    code, out, err = run(capsys, "train", data, "--name", "a", *SMALL)
    assert code == 0
    for words in (
        "6 test texts", "accuracy  macro-F1", "majority class", "class  precision",
        "sport", "runs/a/report.html", "stabletx predict runs/a",
    ):  # fmt: skip
        assert words in out, words
    assert "epoch 3 done" in err


def test_train_repeats_every_figure(capsys, here):
    data = write_csv(here / "small.csv", rows(60))
    for name in ("a", "b"):
        assert run(capsys, "train", data, "--name", name, *SMALL)[0] == 0
    weights = [(here / "runs" / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_train_names_a_run_by_its_data_and_the_time(capsys, here):
    data = write_csv(here / "small.csv", rows(40))
    assert run(capsys, "train", data, *SMALL)[0] == 0
    assert [p.name.rpartition("small-")[0] for p in (here / "runs").iterdir()] == [""]


def test_finished_run_is_only_replaced_when_asked_to(capsys, here):
    data = write_csv(here / "small.csv", rows(40))
    command = ("train", data, "--name", "a", *SMALL)
    assert run(capsys, *command)[0] == 0
    before = (here / "runs" / "a" / "metrics.json").read_bytes()
    assert "a finished run" in refused(capsys, *command)
    assert (here / "runs" / "a" / "metrics.json").read_bytes() == before
    assert run(capsys, *command, "--overwrite")[0] == 0


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_train_and_evaluate_read_other_formats(capsys, here, suffix):
    table = [{"body": text, "kind": label} for text, label in rows(60)]
    path = here / f"small.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    else:
        pytest.importorskip("pyarrow", reason="needs pyarrow")
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(table), path)
    command = ("train", str(path), "--text", "body", "--label", "kind", "--name", "a", *SMALL)
    assert run(capsys, *command)[0] == 0
    code, out, _ = run(capsys, "evaluate", "runs/a", str(path))
    assert code == 0
    assert "6 test texts (the model was trained on the others of this file)" in out


def test_evaluate_measures_all_rows_of_a_new_file(capsys, trained):
    new = write_csv(trained / "new.csv", [*rows(30), ("", "food"), ("soup " * 90, "food")])
    code, out, _ = run(capsys, "evaluate", str(trained / "runs" / "small"), new, "--json")
    assert code == 0
    figures = json.loads(out)
    assert figures["n_rows"] == 31
    assert figures["about"].endswith("31 texts; 1 empty ones left out; 1 cut to 24 tokens")
    assert figures["accuracy"] > 0.9


def test_predict_answers_each_line(capsys, trained, monkeypatch):
    model = str(trained / "runs" / "small")
    (trained / "lines.txt").write_text("goal player win number 7\n\nsalt cook sugar number 7")
    code, out, _ = run(capsys, "predict", model, str(trained / "lines.txt"))
    assert code == 0
    labels = [line.split("\t")[0] for line in out.splitlines()]
    assert (len(labels), labels[0], labels[2]) == (3, "sport", "food")

    stream = io.TextIOWrapper(io.BytesIO("goal player win number 7\r\n".encode("utf-8-sig")))
    monkeypatch.setattr(sys, "stdin", stream)
    code, out, _ = run(capsys, "predict", model, "--json")
    answer = json.loads(out)
    assert (code, answer["label"], set(answer["probabilities"])) == (0, "sport", set(WORDS))


def test_predict_reads_a_column_of_a_table(capsys, trained):
    data = str(trained / "small.csv")
    code, out, _ = run(capsys, "predict", str(trained / "runs" / "small"), data, "--text", "text")
    assert (code, len(out.splitlines())) == (0, 160)


def test_predict_counts_the_texts_that_were_cut(capsys, trained):
    (trained / "long.txt").write_text("salt cook sugar number 7 " * 4_000 + "\n")
    code, out, err = run(
        capsys, "predict", str(trained / "runs" / "small"), str(trained / "long.txt")
    )
    assert (code, out.split("\t")[0]) == (0, "food")
    assert "1 texts are longer than 24 tokens" in err


@pytest.mark.parametrize("verb", ["", "train", "evaluate", "predict", "check", "bench"])
def test_help_has_an_example(capsys, verb):
    code, out, _ = run(capsys, *([verb] if verb else []), "--help")
    assert code == 0
    assert "example" in out
    assert f"stabletx {verb}".strip() in out.partition("example")[2]


def test_no_verb_prints_the_help(capsys):
    code, out, _ = run(capsys)
    assert (code, "usage: stabletx" in out) == (2, True)


@pytest.mark.parametrize(
    ("write", "options", "words"),
    [
        (None, [], "data must name a file that exists"),
        (b"", [], "hold at least one row"),
        (b"text,label\n", [], "hold at least one row"),
        (b"text,label\na,b\n", ["--text", "txt"], "Did you mean 'text'?"),
        (b"text,label\na,b\n", ["--label", "lable"], "Did you mean 'label'?"),
        (b"text,label\n" + b"some text,one\n" * 3, [], "leave rows to train on"),
        (b"text,label\ncaf\xe9,one\n", [], "UTF-8 text"),
        (b'text,label\n"open,one\n', [], "well quoted"),
        (b"text,label\na,one\nb\n", [], "2 fields in every row"),
    ],
)
def test_train_refuses_a_bad_file(capsys, here, write, options, words):
    path = here / "bad.csv"
    if write is not None:
        path.write_bytes(write)
    assert words in refused(capsys, "train", str(path), *options, *SMALL)
    assert not (here / "runs").exists()


def test_train_refuses_one_class(capsys, here):
    data = write_csv(here / "one.csv", [(f"text {i}", "same") for i in range(30)])
    assert "at least two classes, got train=only ['same']" in refused(capsys, "train", data)


def test_train_refuses_labels_that_only_the_test_file_has(capsys, here):
    data = write_csv(here / "a.csv", rows(40))
    test = write_csv(here / "b.csv", [("a text", "sport"), ("another", "music")])
    line = refused(capsys, "train", data, "--test", test)
    assert "test must have only labels that train has" in line
    assert "'music' (1 rows)" in line


def test_train_refuses_a_file_without_any_text(capsys, here):
    data = write_csv(here / "a.csv", [(" ", "ab"[i % 2]) for i in range(30)])
    assert "text" in refused(capsys, "train", data)


def test_train_counts_empty_and_long_texts(capsys, here):
    lines = [*rows(60), ("", "food"), ("  ", "sport"), ("soup " * 20_000, "food")]
    data = write_csv(here / "a.csv", lines)
    code, out, _ = run(capsys, "train", data, "--name", "a", *SMALL)
    assert code == 0
    assert "1 of 61 texts are longer than 24 tokens" in out
    assert "left out: 2 empty texts" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lr", "0"], "lr must be positive"),
        (["--epochs", "0"], "epochs must be positive"),
        (["--max-len", "1"], "max_len must be at least 2"),
        (["--device", "cuda:99"], "device must be usable here, got device=cuda:99"),
        (["--device", "gpu"], "device must be usable here, got device=gpu"),
        (["--resume"], "--resume must come with --name"),
        (["--resume", "--name", "none"], "name must be a run that can go on"),
    ],
)
def test_train_refuses_bad_options(capsys, here, options, words):
    data = write_csv(here / "a.csv", rows(40))
    assert words in refused(capsys, "train", data, *options)


def test_train_refuses_an_unknown_name(capsys, here):
    assert "Did you mean trec?" in refused(capsys, "train", "trek")


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_damaged_model_is_refused(capsys, trained, here, verb):
    (here / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (here / "model" / name).write_bytes((trained / "runs/small" / name).read_bytes())
    (here / "model" / "model.safetensors").write_bytes(b"\x00" * 50)
    argv = (verb, "model", str(trained / "small.csv"))
    assert "model/model.safetensors" in refused(capsys, *argv)
    (here / "model" / "model.safetensors").unlink()
    assert "model.safetensors" in refused(capsys, *argv)
    (here / "model" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pytorch_model.bin" in refused(capsys, *argv)
    assert "model must be a folder, got model=gone" in refused(capsys, verb, "gone", "x.csv")


def test_predict_refuses_bytes_that_are_not_utf8(capsys, trained, here):
    (here / "lines.txt").write_bytes(b"good\ncaf\xe9\n")
    model = str(trained / "runs" / "small")
    assert "byte 0xe9 in line 2" in refused(capsys, "predict", model, "lines.txt")
    assert "No such file" in refused(capsys, "predict", model, "gone.txt")
    assert "files must be named" in refused(capsys, "predict", model, "--text", "text")


def test_evaluate_refuses_labels_that_the_model_does_not_have(capsys, trained, here):
    data = write_csv(here / "new.csv", [("a text", "music")])
    line = refused(capsys, "evaluate", str(trained / "runs" / "small"), data)
    assert "label must be one of the model's classes (food, sport), got label='music'" in line


def test_full_disk_ends_the_run_and_keeps_the_checkpoint(capsys, here, monkeypatch):
    import errno

    from stabletx.training import checkpoint as ck

    data = write_csv(here / "a.csv", rows(60))
    real, count = ck.save_checkpoint, iter(range(1, 100))

    def full(path, tensors, about):
        if next(count) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, tensors, about)

    monkeypatch.setattr(ck, "save_checkpoint", full)
    command = ("train", data, "--name", "a", *SMALL)
    line = refused(capsys, *command, code=1)
    assert "No space left on device (runs/a/checkpoint.safetensors)" in line
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert ck.load_checkpoint(here / "runs/a/checkpoint.safetensors")[1]["state"]["epoch"] == 2
    assert "a run that was stopped" in refused(capsys, *command)
    assert run(capsys, *command, "--resume")[0] == 0
    assert not (here / "runs/a/checkpoint.safetensors").exists()


def test_numbers_that_are_not_finite_end_the_run(capsys, here):
    data = write_csv(here / "a.csv", rows(60))
    line = refused(capsys, "train", data, "--name", "a", *SMALL, "--lr", "1e38", code=1)
    assert "must be finite" in line
    assert "in step" in line


def test_first_interrupt_keeps_the_checkpoint_and_says_how_to_go_on(here):
    write_csv(here / "a.csv", rows(200))
    command = [sys.executable, "-m", "stabletx.cli", "train", "a.csv", "--name", "a b", *SMALL]
    command[command.index("3")] = "2000"
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=here
    )
    log = here / "runs" / "a b" / "log.jsonl"
    end = time.monotonic() + 100
    while time.monotonic() < end and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert (here / "runs" / "a b" / "checkpoint.safetensors").exists()
    again = "stabletx train a.csv --name 'a b' --epochs 2000"
    assert again in err
    assert err.strip().endswith("--resume")


def test_bench_outside_a_clone_says_so(capsys, here, monkeypatch):
    monkeypatch.setattr("stabletx.cli.__file__", str(here / "stabletx" / "cli.py"))
    assert "bench must run in a clone" in refused(capsys, "bench")
