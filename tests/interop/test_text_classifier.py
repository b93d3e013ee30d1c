"""TextClassifier keeps scikit-learn's manners, and learns."""

import io
import pickle

import pytest
import torch

pytest.importorskip("tokenizers", reason="needs the text extra")
pytest.importorskip("sklearn", reason="needs the train extra")

import numpy as np
from sklearn.base import clone, is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks

from stabletx.data import load_named
from stabletx.interop.sklearn import TextClassifier

WORDS = {
    "sport": ["match", "goal", "team", "player", "score", "win", "league", "coach"],
    "food": ["bread", "soup", "salt", "taste", "cook", "oven", "sugar", "meal"],
    "trains": ["track", "station", "ticket", "delay", "engine", "wagon", "signal", "platform"],
}


def rows(n=120):
    generator = torch.Generator().manual_seed(0)
    labels = [list(WORDS)[i % 3] for i in range(n)]
    picks = torch.randint(8, (n, 4), generator=generator).tolist()
    texts = [" ".join(WORDS[y][j] for j in own) for y, own in zip(labels, picks, strict=True)]
    return [f"{text} {i}" for i, text in enumerate(texts)], labels


def small(**changes):
    settings = {"max_len": 12, "vocab_size": 200, "epochs": 6, "lr": 1e-2, "device": "cpu"}
    return TextClassifier(**{**settings, **changes})


@pytest.fixture(scope="module")
def fitted():
    return small().fit(*rows())


def test_it_learns(fitted):
    texts = ["goal by the player", "salt in the soup", "the engine and a signal"]
    assert fitted.predict(texts).tolist() == ["sport", "food", "trains"]
    assert fitted.score(*rows()) > 0.95
    assert fitted.classes_.tolist() == ["food", "sport", "trains"]


def test_probabilities_stand_in_the_order_of_the_classes(fitted):
    texts = ["goal by the player", "", "x" * 1000]
    shares = fitted.predict_proba(texts)
    assert shares.shape == (3, 3)
    assert np.abs(shares.sum(1) - 1).max() <= 4 * np.finfo(np.float32).eps
    assert fitted.classes_[shares.argmax(1)].tolist() == fitted.predict(texts).tolist()
    assert fitted.predict([]).shape == (0,)
    assert fitted.predict_proba([]).shape == (0, 3)


def test_parameters_are_cloned_set_and_shown():
    own = small(dropout_p=0.3)
    assert clone(own).get_params() == own.get_params()
    assert own.set_params(epochs=9).epochs == 9
    assert "epochs=9" in repr(own)
    assert is_classifier(own)
    with pytest.raises(ValueError, match=r"Invalid parameter 'depth'"):
        own.set_params(depth=3)


@pytest.mark.parametrize(
    "check",
    [
        "check_estimator_cloneable",
        "check_estimator_repr",
        "check_get_params_invariance",
        "check_set_params",
        "check_no_attributes_set_in_init",
        "check_parameters_default_constructible",
    ],
)
def test_it_passes_scikit_learns_own_checks_of_parameters(check):
    getattr(estimator_checks, check)("TextClassifier", TextClassifier())


def test_the_same_seed_gives_the_same_model(fitted):
    again = clone(fitted).fit(*rows())
    texts = ["goal by the player", "salt"]
    assert np.array_equal(again.predict_proba(texts), fitted.predict_proba(texts))


def test_fitting_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    small(epochs=1).fit(*rows(30))
    assert torch.equal(torch.get_rng_state(), before)


def test_it_works_in_cross_validation_and_searches():
    texts, y = rows()
    assert cross_val_score(small(), texts, y, cv=2).min() > 0.8
    search = GridSearchCV(small(epochs=1), {"dropout_p": [0.0, 0.3]}, cv=2).fit(texts, y)
    assert search.best_params_["dropout_p"] in (0.0, 0.3)


def test_it_is_a_step_of_a_pipeline():
    texts, y = rows()
    lower = FunctionTransformer(lambda own: [text.lower() for text in own])
    steps = Pipeline([("lower", lower), ("classify", small())])
    assert steps.fit([text.upper() for text in texts], y).score(texts, y) > 0.9
    assert steps.get_params()["classify__max_len"] == 12


@pytest.mark.parametrize("y", [[0, 1, 2], [True, False, True], ["a", "b", "a"]])
def test_classes_keep_their_kind(y):
    texts, _ = rows(30)
    own = small(epochs=1).fit(np.array(texts), y * 10)
    assert own.predict(texts).dtype == np.asarray(y).dtype
    assert set(own.predict(texts)) <= set(np.asarray(y))


def test_pickling_keeps_every_answer(fitted, tmp_path):
    joblib = pytest.importorskip("joblib")
    texts, _ = rows(10)
    joblib.dump(fitted, tmp_path / "own.joblib")
    for again in (pickle.loads(pickle.dumps(fitted)), joblib.load(tmp_path / "own.joblib")):
        assert np.array_equal(again.predict_proba(texts), fitted.predict_proba(texts))


def test_a_saved_model_is_read_by_the_program(fitted, tmp_path, monkeypatch, capsys):
    from stabletx.cli import main

    fitted.model_.save_pretrained(tmp_path)
    fitted.tokenizer_.save(tmp_path)
    stdin = io.TextIOWrapper(io.BytesIO(b"goal by the player\n"))
    monkeypatch.setattr("sys.stdin", stdin)
    assert main(["predict", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("sport")


def test_asking_before_fitting_is_refused():
    for ask in (small().predict, small().predict_proba):
        with pytest.raises(NotFittedError, match="not fitted"):
            ask(["a"])


@pytest.mark.parametrize(
    ("texts", "y", "changes", "said"),
    [
        ("one text", ["a"], {}, r"texts must be a sequence of strings, got"),
        (["a", 3], ["a", "b"], {}, r"texts\[1\] must be a string, got .*int"),
        (["a", float("nan")], ["a", "b"], {}, r"texts\[1\] must be a string, got .*float"),
        (None, ["a"], {}, r"texts must be a sequence of strings, got texts=a NoneType"),
        ({"a": 1}, ["a"], {}, r"texts must be a sequence of strings, got texts=a dict"),
        (np.array([["a", "b"]]), ["a"], {}, r"got texts=a ndarray of 2 axes"),
        (np.array("a"), ["a"], {}, r"got texts=a ndarray of 0 axes"),
        (["a", "b"], ["a"], {}, r"one class for each of the 2 texts"),
        (["a", "b"], ["a", "a"], {}, r"at least two classes"),
        (["a", "b"], [0.5, 0.25], {}, r"continuous"),
        (["a", "b"], ["a", "b"], {"validation": 1.5}, r"validation=1\.5"),
        (["a", "b"], ["a", "b"], {"max_len": 0}, r"max_len=0"),
        (["a", "b"], ["a", "b"], {"lr": -1.0}, r"lr=-1\.0"),
        (["a", "b"], ["a", "b"], {"dropout_p": 1.0}, r"dropout_p=1\.0"),
        (["", " "], ["a", "b"], {}, r"at least one text"),
    ],
)
def test_wrong_input_is_refused(texts, y, changes, said):
    with pytest.raises((TypeError, ValueError), match=said):
        small(**changes).fit(texts, y)


def test_a_table_is_not_read_as_the_names_of_its_columns(fitted):
    class Table(list):  # as pandas has it: iterating gives the columns
        ndim = 2

    with pytest.raises(TypeError, match=r"texts must be a sequence .*=a Table of 2 axes"):
        fitted.predict(Table(["text"]))


def test_numbers_of_numpy_are_taken_as_searches_draw_them():
    texts, y = rows(30)
    space = {"max_len": np.arange(8, 10), "validation": np.array([0.2], dtype=np.float32)}
    search = GridSearchCV(small(epochs=np.int64(1), random_state=np.int64(3)), space, cv=2)
    assert search.fit(texts, y).best_params_["max_len"] in (8, 9)


def test_a_fit_that_fails_leaves_what_was_fitted_before(fitted):
    own = small(dropout_p=1.0)
    with pytest.raises(ValueError, match=r"dropout_p=1\.0"):
        own.fit(*rows(30))
    with pytest.raises(NotFittedError, match="not fitted"):
        own.predict(["a"])
    again = pickle.loads(pickle.dumps(fitted)).set_params(dropout_p=1.0)
    with pytest.raises(ValueError, match=r"dropout_p=1\.0"):
        again.fit(["a", "b"] * 20, ["x", "y"] * 20)
    assert again.predict(["goal by the player"]).tolist() == ["sport"]


def test_real_texts_are_learnt():
    splits = load_named("docstrings")
    train, test = list(splits.train)[:1500], list(splits.test)[:300]
    own = small(vocab_size=2000, max_len=48, epochs=4, lr=3e-3, dropout_p=0.3)
    own.fit([e.text for e in train], [e.label for e in train])
    majority = max(np.unique([e.label for e in test], return_counts=True)[1]) / len(test)
    assert own.score([e.text for e in test], [e.label for e in test]) > majority + 0.15
