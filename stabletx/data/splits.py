"""Texts with labels, divided into train, validation and test the same way on every machine.

A row goes to a split by a hash of its text, label by label, so that the division depends neither
on the order of the rows nor on a random generator, keeps the balance of the labels, and never puts
two copies of one text on different sides.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, NamedTuple

from stabletx._checks import must
from stabletx.data.errors import DataError

PART_NAMES = ("train", "validation", "test")
TRAIN, VALIDATION, TEST, DROPPED = range(4)


class Example(NamedTuple):
    """A text and its label; the label is ``""`` where none was asked for."""

    text: str
    label: str = ""


class Dropped(NamedTuple):
    """How many rows were left out before splitting, and why."""

    duplicates: int  # copies of a text that is kept once
    conflicts: int  # texts that occur with more than one label: no copy is kept
    empty: int  # texts without a visible character


ThreeLists = tuple[list[Example], list[Example], list[Example]]


class Assignment(NamedTuple):
    """Which split each row belongs to."""

    parts: bytearray  # one code a row: TRAIN, VALIDATION, TEST or DROPPED
    order: "array[int]"  # the rows that are kept, in the order of their hashes
    labels: tuple[str, ...]  # sorted
    sizes: tuple[int, int, int]
    dropped: Dropped


@dataclass(frozen=True)
class Splits:
    """Three sets of examples, and where they come from.

    Each set can be iterated again and again and has a length; it need not be in memory.
    """

    train: Collection[Example]
    validation: Collection[Example]
    test: Collection[Example]
    labels: tuple[str, ...]
    n_rows: int
    dropped: Dropped
    about: str = ""
    source: str = ""
    rights: str = ""
    citation: str = ""

    def parts(self) -> dict[str, Collection[Example]]:
        """Return the three sets by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


class Rows:
    """The rows of one split, read from their source anew by every loop.

    Memory: one byte for each row of the source, shared by its splits.
    """

    def __init__(
        self, read: Callable[[], Iterable[Example]], parts: bytearray, part: int, n_rows: int
    ) -> None:
        self._read, self._parts, self._part, self._n_rows = read, parts, part, n_rows

    def __len__(self) -> int:
        return self._n_rows

    def __contains__(self, example: object) -> bool:
        return any(example == own for own in self)

    def __iter__(self) -> Iterator[Example]:
        n_read = 0
        for example in self._read():
            if n_read < len(self._parts) and self._parts[n_read] == self._part:
                yield example
            n_read += 1
        if n_read != len(self._parts):
            rule = f"hold {len(self._parts)} rows, as it did when it was split"
            raise DataError(must("data", rule, f"{n_read} rows", "Do not write to it."))


def text_key(text: str, seed: int = 0) -> int:
    """Hash a text to 64 bits; case and the kind of white space do not matter.

    >>> text_key("Good  film") == text_key("good film")
    True
    """
    plain = " ".join(text.split()).casefold()
    salt = seed.to_bytes(8, "little", signed=True)
    digest = blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=8, salt=salt).digest()
    return int.from_bytes(digest, "big")


def assign(
    examples: Iterable[Example],
    *,
    validation: int | float = 0.1,
    test: int | float = 0.1,
    seed: int = 0,
) -> Assignment:
    """Decide for every row which split it belongs to.

    Args:
        examples: read once and not kept.
        validation: rows (an int) or share of the rows kept (a float) for the validation split; a
            share above 0 is at least one row.
        test: the same for the test split.
        seed: another seed, another division.

    Returns:
        One code a row. Empty texts, copies and texts with contradicting labels are dropped.

    Raises:
        DataError: if the rows do not suffice for the sizes asked for.

    Numerics: none; about 110 bytes a row at the peak and 9 afterwards, no texts.

    >>> rows = [Example(f"text {i}", "ab"[i % 2]) for i in range(20)]
    >>> assign(rows).sizes
    (16, 2, 2)
    """
    keys, codes, label_codes = array("Q"), array("i"), dict[str, int]()
    for text, label in examples:
        code = label_codes.setdefault(label, len(label_codes)) if text.strip() else -1
        keys.append(text_key(text, seed) if code >= 0 else 0)
        codes.append(code)
    order, dropped = _unique(keys, codes)
    if not order:
        got = f"{len(keys)} rows, {dropped.empty} empty and {dropped.conflicts} with two labels"
        raise DataError(must("data", "hold at least one text", got, "Check the text column."))
    counts = Counter(codes[row] for row in order)
    labels = tuple(sorted(label for label, code in label_codes.items() if counts[code]))
    places = [label_codes[label] for label in labels]
    left = _shares(_sizes(len(order), validation, test), places, counts)
    parts = bytearray([DROPPED]) * len(keys)
    for row in order:
        of_label = left[codes[row]]
        part = TEST if of_label[TEST] else VALIDATION if of_label[VALIDATION] else TRAIN
        of_label[part] -= 1
        parts[row] = part
    sizes = (parts.count(TRAIN), parts.count(VALIDATION), parts.count(TEST))
    return Assignment(parts, order, labels, sizes, dropped)


def arrange(examples: Sequence[Example], assignment: Assignment) -> ThreeLists:
    """Return the train, validation and test examples, mixed by their hashes."""
    lists: ThreeLists = ([], [], [])
    for row in assignment.order:
        lists[assignment.parts[row]].append(examples[row])
    return lists


def _unique(keys: "array[int]", codes: "array[int]") -> tuple["array[int]", Dropped]:
    """Return the rows that are kept, in the order of their keys, and what was left out."""
    rows = sorted((row for row in range(len(keys)) if codes[row] >= 0), key=keys.__getitem__)
    kept = array("q")
    duplicates = conflicts = start = 0
    while start < len(rows):
        end = start + 1
        while end < len(rows) and keys[rows[end]] == keys[rows[start]]:
            end += 1
        if len({codes[row] for row in rows[start:end]}) > 1:
            conflicts += end - start
        else:
            kept.append(rows[start])
            duplicates += end - start - 1
        start = end
    return kept, Dropped(duplicates, conflicts, len(keys) - len(rows))


def _sizes(n_rows: int, validation: int | float, test: int | float) -> tuple[int, int]:
    n_validation = _size("validation", validation, n_rows)
    n_test = _size("test", test, n_rows)
    if n_validation + n_test >= n_rows:
        rule = f"leave rows to train on, with {n_rows} different texts in all"
        got = f"{n_validation} and test={n_test}"
        raise DataError(must("validation", rule, got, "Ask for less, or bring more texts."))
    return n_validation, n_test


def _size(argument: Literal["validation", "test"], value: int | float, n_rows: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, float) and 0.0 <= value < 1.0:
        return max(round(value * n_rows), 1 if value else 0)
    instead = "Give a number of rows or a share."
    raise ValueError(must(argument, "be an int >= 0 or a float in [0, 1)", repr(value), instead))


def _shares(
    sizes: tuple[int, int], places: list[int], counts: Counter[int]
) -> dict[int, list[int]]:
    """Return how many rows of each label go to train, validation and test; train gets one."""
    n_each = [counts[place] for place in places]
    n_test = _allocate(sizes[1], n_each, [n - 1 for n in n_each])
    room = [n - 1 - taken for n, taken in zip(n_each, n_test, strict=True)]
    n_validation = _allocate(sizes[0], n_each, room)
    return {
        place: [n - v - t, v, t]
        for place, n, v, t in zip(places, n_each, n_validation, n_test, strict=True)
    }


def _allocate(size: int, counts: list[int], room: list[int]) -> list[int]:
    """Share ``size`` rows in proportion to ``counts``, by largest remainder, up to ``room``."""
    total = max(sum(counts), 1)
    given = [min(size * n // total, r) for n, r in zip(counts, room, strict=True)]
    order = sorted(range(len(counts)), key=lambda i: (-(size * counts[i] % total), i))
    while sum(given) < size:
        before = sum(given)
        for i in order:
            if sum(given) < size and given[i] < room[i]:
                given[i] += 1
        if sum(given) == before:
            break
    return given
