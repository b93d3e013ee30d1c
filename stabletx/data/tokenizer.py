"""A WordPiece tokenizer trained on the user's own texts, alike on every machine and run."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

from stabletx._checks import check_positive, must
from stabletx.data.errors import DataError, optional

PAD, UNKNOWN, FIRST = "[PAD]", "[UNK]", "[CLS]"
FILE = "tokenizer.json"
_HOW_TO_DECODE = "Decode the text with errors='replace'."
_SPECIAL = [PAD, UNKNOWN, FIRST]
_BLANK = re.compile(r"[ \t\n\r]")  # not \s: the normalizer deletes the other control characters


class EncodedTexts(NamedTuple):
    """Token ids of each text, and how many texts were cut."""

    ids: list[list[int]]
    n_truncated: int


@final
class Tokenizer:
    """Lower-cased WordPiece. Id 0 pads, 1 is an unknown word, 2 opens every text.

    Build one with ``Tokenizer.train`` or ``Tokenizer.load``.
    """

    pad_id = 0

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 8000) -> "Tokenizer":
        """Learn a vocabulary from texts.

        Args:
            texts: anything that can be looped over twice, such as a list; it is read as a stream,
                and memory grows with the number of different words.
            vocab_size: tokens at most, the three special ones included.

        Returns:
            A tokenizer that depends on nothing but the texts and ``vocab_size``.

        Raises:
            TypeError: if ``texts`` can be looped over only once, or holds something but text.
            ValueError: if there is no text, or no room for the characters.

        Source: Schuster and Nakajima (2012), Japanese and Korean voice search; as in BERT.

        >>> Tokenizer.train(["a good film", "a bad film"]).tokens([0, 1, 2])
        ['[PAD]', '[UNK]', '[CLS]']
        """
        tokenizers = optional("tokenizers")
        check_positive("vocab_size", vocab_size)
        if isinstance(texts, Iterator):
            instead = "Pass a list: the texts are read twice."
            raise TypeError(must("texts", "be read more than once", type(texts).__name__, instead))
        draft = _pipeline(tokenizers.models.WordPiece(unk_token=UNKNOWN))
        alphabet = _alphabet(texts, draft.normalizer, vocab_size)
        # Left alone, the trainer numbers characters in the order of a randomly seeded hash map,
        # and breaks ties by those numbers: naming every piece first makes each run the same.
        pieces = _SPECIAL + alphabet + ["##" + letter for letter in alphabet]
        trainer = tokenizers.trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            special_tokens=pieces,
            limit_alphabet=len(alphabet),
            initial_alphabet=alphabet,
            show_progress=False,
        )
        draft.train_from_iterator(texts, trainer)
        return cls(_finished(draft.get_vocab()))

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        return int(self._inner.get_vocab_size())

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Return the written form of each id, such as ``"##ing"``."""
        return [str(self._inner.id_to_token(int(i))) for i in ids]

    def encode_batch(self, texts: Sequence[str], max_len: int) -> EncodedTexts:
        """Turn texts into token ids, ``[CLS]`` first, cut to ``max_len``.

        Args:
            texts: any length; of a long one no more is read than the cut can need.
            max_len: tokens kept of each text at most, ``[CLS]`` included.

        Returns:
            The ids of each text, unpadded, and the number of texts that lost their end.

        Raises:
            TypeError: if an entry is not text.
            ValueError: if an entry holds half a surrogate pair, or ``max_len`` is not positive.

        >>> tokenizer = Tokenizer.train(["a good film", "a bad film"])
        >>> tokenizer.encode_batch(["a film", "a good bad film"], max_len=4).n_truncated
        1
        """
        check_positive("max_len", max_len)
        _check_texts(texts)
        ids: list[list[int]] = [[] for _ in texts]
        n_truncated = 0
        left, width = list(range(len(texts))), 16 * max_len
        while left:
            heads = [_head(texts[i], width) for i in left]
            again = []
            # The fast form leaves out offsets, which nobody reads here.
            for i, head, found in zip(
                left, heads, self._inner.encode_batch_fast(heads), strict=True
            ):
                if len(found.ids) <= max_len and len(head) < len(texts[i]):
                    again.append(i)
                else:
                    ids[i] = found.ids[:max_len]
                    n_truncated += len(found.ids) > max_len
            left, width = again, 8 * width
        return EncodedTexts(ids, n_truncated)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``tokenizer.json`` into a folder: beside first, then renamed over the old one."""
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{FILE}.{os.getpid()}")
        try:
            beside.write_text(self._inner.to_str(), encoding="utf-8")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Tokenizer":
        """Read ``tokenizer.json`` from a folder.

        Raises:
            DataError: if the file is missing, damaged or of another kind of tokenizer.
        """
        path = Path(folder) / FILE
        instead = "Save the model again, or copy the whole folder."
        try:
            inner = optional("tokenizers").Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(
                must("folder", f"hold {FILE}", f"{folder} ({error})", instead)
            ) from error
        except Exception as error:  # the library raises bare Exceptions
            got = f"{path} ({error})"
            raise DataError(must(FILE, "be a whole tokenizer", got, instead)) from error
        if [inner.id_to_token(i) for i in range(3)] != _SPECIAL:
            raise DataError(must(FILE, f"begin with the tokens {_SPECIAL}", path, instead))
        return cls(inner)


def _pipeline(model: Any) -> Any:
    tokenizers = optional("tokenizers")
    inner = tokenizers.Tokenizer(model)
    inner.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    return inner


def _finished(vocab: dict[str, int]) -> Any:
    """Build the tokenizer anew without special pieces: "[PAD]" in a text is brackets and a word."""
    tokenizers = optional("tokenizers")
    inner = _pipeline(tokenizers.models.WordPiece(vocab=vocab, unk_token=UNKNOWN))
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{FIRST} $A", special_tokens=[(FIRST, _SPECIAL.index(FIRST))]
    )
    return inner


def _alphabet(texts: Iterable[str], normalizer: Any, vocab_size: int) -> list[str]:
    """Return the characters that get a token, sorted: the most frequent, in a third of the room."""
    counts: Counter[str] = Counter()
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(must("texts", "hold str only", type(text).__name__))
        counts.update(text)
    if not counts:
        raise ValueError(must("texts", "hold a text", "none", "Check the name of the column."))
    plain: Counter[str] = Counter()
    for letter, n in counts.items():
        if "\ud800" <= letter <= "\udfff":
            got = f"half a surrogate pair ({letter!r})"
            raise ValueError(must("texts", "be Unicode", got, _HOW_TO_DECODE))
        for part in normalizer.normalize_str(letter):
            if not part.isspace():
                plain[part] += n
    room = (vocab_size - len(_SPECIAL)) // 3
    kept = sorted(plain, key=lambda letter: (-plain[letter], letter))[:room]
    if not kept:
        instead = "Thousands are usual."
        raise ValueError(must("vocab_size", "leave room for the characters", vocab_size, instead))
    return sorted(kept)


def _head(text: str, width: int) -> str:
    """Return the text up to the first blank at or after ``width``.

    Words are split at blanks before anything else happens to them, so that what follows it
    cannot change a token before it.
    """
    blank = _BLANK.search(text, width) if len(text) > width else None
    return text[: blank.start()] if blank else text


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise TypeError(must("texts", "be a list of str", "one str", "Pass [text]."))
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(must(f"texts[{i}]", "be a str", type(text).__name__))
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                got = f"half a surrogate pair at character {error.start}"
                raise ValueError(must(f"texts[{i}]", "be Unicode", got, _HOW_TO_DECODE)) from error
