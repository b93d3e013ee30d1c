import json
import re

import pytest
import torch

from stabletx.data import DataError, Tokenizer
from stabletx.models import SequenceClassifier
from stabletx.training import default_model, runs, sources


@pytest.fixture
def folder(tmp_path):
    """Give a folder with a whole model in it."""
    path = tmp_path / "model"
    tokenizer = Tokenizer.train(["a good film", "a bad film"])
    torch.manual_seed(0)
    SequenceClassifier(default_model(tokenizer.vocab_size, ["no", "yes"])).save_pretrained(path)
    tokenizer.save(path)
    return path


def test_default_name_fits_a_folder():
    assert re.fullmatch(r"my-data-v-2-\d{8}-\d{6}", runs.default_name("my data/v:2"))


def test_whole_model_is_read_back(folder):
    model, tokenizer = runs.load_model(folder)
    assert model.config.labels == ("no", "yes")
    assert tokenizer.vocab_size == model.config.vocab_size


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_file_of_a_model_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(DataError, match=name):
        runs.load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("n_bytes", [0, 20])
def test_damaged_file_of_a_model_is_named(folder, name, n_bytes):
    path = folder / name
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(DataError, match=re.escape(str(path))):
        runs.load_model(folder)


def test_pickled_weights_are_refused_and_not_opened(folder):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was executed",))

    (folder / "model.safetensors").unlink()
    torch.save(Evil(), folder / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"pytorch_model\.bin"):
        runs.load_model(folder)


def test_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"got model=.*nowhere"):
        runs.load_model(tmp_path / "nowhere")


def test_tokenizer_of_another_model_is_refused(folder):
    Tokenizer.train(["many other words " + " ".join("abcdefghij"), "more"]).save(folder)
    with pytest.raises(DataError, match=r"tokenizer\.json must have at most the model's"):
        runs.load_model(folder)


def test_run_that_was_stopped_is_not_yet_a_model(folder):
    (folder / "model.safetensors").unlink()
    (folder / "checkpoint.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="must be a finished run"):
        runs.load_model(folder)


def check(folder, *, overwrite=False, resume=False):
    runs.check_free(folder, overwrite=overwrite, resume=resume)


def test_new_or_empty_folder_is_free(tmp_path):
    check(tmp_path / "new")
    check(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        (["run.json", "metrics.json"], {}, "a finished run. Choose another --name"),
        (["run.json"], {}, "a run that was stopped. Go on with --resume"),
        (["run.json", "metrics.json"], {"resume": True}, "a finished run"),
        (["notes.txt"], {}, "nothing in it was touched"),
        (["notes.txt"], {"overwrite": True}, "nothing in it was touched"),
        ([], {"resume": True}, "be a run that can go on"),
        (["run.json"], {"resume": True, "overwrite": True}, "resume must be left out"),
    ],
)
def test_folder_in_use_is_refused(tmp_path, files, options, message):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=message):
        check(tmp_path, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)


def test_clearing_a_run_leaves_what_is_not_its_own(tmp_path):
    for name in ("run.json", "metrics.json", "loss.png", "notes.txt"):
        (tmp_path / name).write_text("{}")
    check(tmp_path, overwrite=True)
    runs.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_settings_of_a_run_are_nothing_where_there_are_none(tmp_path):
    assert runs.read_run(tmp_path) == {}
    (tmp_path / "run.json").write_text("[1]")
    assert runs.read_run(tmp_path) == {}
    (tmp_path / "run.json").write_text(json.dumps({"source": "x"}))
    assert runs.read_run(tmp_path) == {"source": "x"}


def write_rows(path, rows):
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return str(path)


def test_files_of_their_own_become_the_splits(tmp_path):
    train = write_rows(tmp_path / "a.csv", [(f"text {i}", "ny"[i % 2]) for i in range(20)])
    test = write_rows(tmp_path / "b.csv", [("one", "n"), ("one", "n"), ("two", "y")])
    splits = sources.load_splits(train, test=test)
    assert [len(part) for part in splits.parts().values()] == [18, 2, 3]
    assert [example.text for example in splits.test] == ["one", "one", "two"]
    both = sources.load_splits(train, test=test, validation=test)
    assert [len(part) for part in both.parts().values()] == [20, 3, 3]


def test_word_that_is_neither_file_nor_name_gets_the_names():
    with pytest.raises(DataError, match="Did you mean docstrings"):
        sources.load_splits("docstring")


def test_named_set_takes_no_files_beside_it():
    with pytest.raises(DataError, match=r"test must be left out .* got test=x\.csv"):
        sources.load_splits("sms", test="x.csv")


def test_digest_knows_a_file_again(tmp_path):
    a = write_rows(tmp_path / "a.csv", [("x", "y")])
    b = write_rows(tmp_path / "b.csv", [("x", "y")])
    c = write_rows(tmp_path / "c.csv", [("x", "z")])
    assert sources.digest(a) == sources.digest(b) != sources.digest(c)
