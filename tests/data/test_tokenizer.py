import builtins
import json
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stabletx.data import DataError, Tokenizer

WORDS = ["attention", "gradient", "softmax", "masked", "tensor", "row", "sum", "the", "of", "is"]
# What the normalizer treats in its own way: accents, joiners, controls, other blanks, ideographs.
ODD = " \t\n\r.,-'éÀßİſﬁ中文\u0301\u200b\u200d\u00a0\u2028\x00\x0b\x0c\x1c\x85\ufffd"


def sentences(n, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=8)) + draw.choice(".?!") for _ in range(n)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([*sentences(200), "é中a b", "abcdefghijklmnopqrstuvwxyz"], 300)


def test_training_gives_the_same_tokens_every_time():
    texts = ["".join(random.Random(i).choices("abcdefgh é中", k=60)) for i in range(300)]
    first, *others = [Tokenizer.train(texts, 200) for _ in range(6)]
    names = first.tokens(range(first.vocab_size))
    for other in others:
        assert other.tokens(range(other.vocab_size)) == names


def test_training_does_not_depend_on_the_order_of_the_texts():
    texts = sentences(100)
    one, other = Tokenizer.train(texts, 200), Tokenizer.train(texts[::-1], 200)
    assert one.tokens(range(one.vocab_size)) == other.tokens(range(other.vocab_size))


def test_special_tokens_come_first(tokenizer):
    assert tokenizer.tokens([0, 1, 2]) == ["[PAD]", "[UNK]", "[CLS]"]
    assert tokenizer.pad_id == 0


@pytest.mark.parametrize("vocab_size", [60, 100, 300])
def test_vocabulary_keeps_its_bound(vocab_size):
    assert Tokenizer.train(sentences(100), vocab_size).vocab_size <= vocab_size


def test_vocabulary_keeps_its_bound_when_there_are_many_characters():
    texts = [chr(0x4E00 + i) * 2 for i in range(3000)] + ["common"] * 9
    tokenizer = Tokenizer.train(texts, 300)
    assert tokenizer.vocab_size <= 300
    assert 1 not in tokenizer.encode_batch(["common"], 9).ids[0]
    assert 1 in tokenizer.encode_batch([texts[2999]], 9).ids[0]


def test_known_words_become_pieces_that_spell_them(tokenizer):
    (ids,) = tokenizer.encode_batch(["The GRADIENT of attention"], 50).ids
    spelled = "".join(tokenizer.tokens(ids)).replace("##", "")
    assert spelled == "[CLS]thegradientofattention"


@pytest.mark.parametrize("written", ["[PAD]", "[CLS] a [PAD]", "[UNK]", "##a"])
def test_tokens_written_in_a_text_are_plain_characters(written, tmp_path):
    Tokenizer.train([*sentences(20), "[PAD] [CLS] [UNK] ##a"] * 2, 200).save(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    (ids,) = tokenizer.encode_batch([written], 50).ids
    assert set(ids[1:]).isdisjoint([0, 1, 2])
    assert "".join(tokenizer.tokens(ids[1:])).startswith(written[0])


def test_empty_text_is_the_first_token_alone(tokenizer):
    assert tokenizer.encode_batch(["", " \n"], 5).ids == [[2], [2]]
    assert tokenizer.encode_batch([], 5) == ([], 0)


@settings(max_examples=300)
@given(
    texts=st.lists(
        st.tuples(
            st.text(f"ab{ODD}", max_size=30), st.integers(1, 40), st.text(ODD, max_size=9)
        ).map(lambda parts: parts[0] * parts[1] + parts[2]),
        max_size=4,
    ),
    max_len=st.integers(1, 6),
)
def test_cut_text_keeps_the_tokens_that_the_whole_text_begins_with(tokenizer, texts, max_len):
    whole = [tokenizer._inner.encode(text).ids for text in texts]
    found = tokenizer.encode_batch(texts, max_len)
    assert found.ids == [ids[:max_len] for ids in whole]
    assert found.n_truncated == sum(len(ids) > max_len for ids in whole)


def test_cut_is_not_made_at_a_control_character_that_joins_two_words(tokenizer):
    text = "ab" * 30 + "\x1c" + "ab" * 30 + " c" * 30
    found = tokenizer.encode_batch([text], 3).ids
    assert found == [tokenizer._inner.encode(text).ids[:3]]


@pytest.mark.parametrize("unit", ["the ", "a", " ", ". ", "é", "\n"])
def test_text_of_100000_characters_is_cut_and_counted(unit, tokenizer):
    text = (unit * 100_000)[:100_000]
    found = tokenizer.encode_batch([text, "the sum"], 512)
    assert len(found.ids[0]) <= 512
    assert found.n_truncated == (len(found.ids[0]) == 512)
    assert found.n_truncated or len(unit.strip()) == len(unit) or not unit.strip()


def test_long_texts_are_not_tokenized_whole(tokenizer, monkeypatch):
    seen = []

    class Spy:
        def encode_batch_fast(self, heads):
            seen.extend(map(len, heads))
            return tokenizer._inner.encode_batch_fast(heads)

    Tokenizer(Spy()).encode_batch(["the sum of " * 100_000], 8)
    assert sum(seen) < 500


def test_tokenizer_comes_back_from_its_folder(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "model")
    again = Tokenizer.load(tmp_path / "model")
    assert again.vocab_size == tokenizer.vocab_size
    assert again.encode_batch(sentences(20), 9) == tokenizer.encode_batch(sentences(20), 9)
    assert os.listdir(tmp_path / "model") == ["tokenizer.json"]


def test_save_that_fails_keeps_the_old_file(tokenizer, tmp_path, monkeypatch):
    Tokenizer.train(["old"]).save(tmp_path)
    old = (tmp_path / "tokenizer.json").read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        tokenizer.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == old
    assert os.listdir(tmp_path) == ["tokenizer.json"]


def test_missing_file_is_named(tmp_path):
    with pytest.raises(
        DataError, match=r"folder must hold tokenizer\.json, got .*Save the model ag"
    ):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("damage", ["", "{", "{}", "[]", "null", "half", "\x00\x01"])
def test_damaged_file_is_named(damage, tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2] if damage == "half" else damage)
    with pytest.raises(
        DataError, match=r"tokenizer\.json must be a whole tokenizer, got .*copy the"
    ):
        Tokenizer.load(tmp_path)


def test_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"tokenizer\.json must be a whole tokenizer"):
        Tokenizer.load(tmp_path)


def test_tokenizer_of_another_kind_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content).replace("[PAD]", "[BOS]"))
    with pytest.raises(DataError, match=r"tokenizer\.json must begin with the tokens \['\[PAD\]'"):
        Tokenizer.load(tmp_path)


def test_training_refuses_texts_that_can_be_read_only_once():
    with pytest.raises(TypeError, match=r"texts must be read more than once, got texts=generator"):
        Tokenizer.train(text for text in ["a"])


def test_training_refuses_what_holds_no_text():
    with pytest.raises(ValueError, match=r"texts must hold a text, got texts=none\. Check"):
        Tokenizer.train(["", ""])
    with pytest.raises(TypeError, match=r"texts must hold str only, got texts=float"):
        Tokenizer.train(["a", float("nan")])
    with pytest.raises(ValueError, match=r"texts must be Unicode, got .*half a surrogate pair"):
        Tokenizer.train(["a\ud800"])


@pytest.mark.parametrize("vocab_size", [0, -1, 3, 5])
def test_training_refuses_a_vocabulary_without_room(vocab_size):
    with pytest.raises(ValueError, match=rf"vocab_size must .*, got vocab_size={vocab_size}"):
        Tokenizer.train(["abc"], vocab_size)


def test_encoding_refuses_what_is_no_list_of_texts(tokenizer):
    with pytest.raises(
        TypeError, match=r"texts must be a list of str, got texts=one str\. Pass \["
    ):
        tokenizer.encode_batch("a film", 5)
    with pytest.raises(TypeError, match=r"texts\[1\] must be a str, got texts\[1\]=NoneType"):
        tokenizer.encode_batch(["a", None], 5)
    with pytest.raises(
        ValueError, match=r"texts\[0\] must be Unicode, got .* at character 1\. Dec"
    ):
        tokenizer.encode_batch(["a\udfff"], 5)
    with pytest.raises(ValueError, match=r"max_len must be positive, got max_len=0"):
        tokenizer.encode_batch(["a"], 0)


def test_missing_package_is_named_with_the_way_to_it(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("tokenizers"):
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr("importlib.import_module", without)
    with pytest.raises(ImportError, match=r"tokenizers must be installed, .*stabletx\[text\]"):
        Tokenizer.train(["a"])
