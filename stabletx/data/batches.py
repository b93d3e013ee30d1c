"""Examples as token ids in compact arrays, and batches of them."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, final

import torch
from torch import Tensor

from stabletx._checks import check_positive, must
from stabletx.data.errors import DataError
from stabletx.data.splits import Example
from stabletx.data.tokenizer import Tokenizer

_ROWS_AT_ONCE = 1024
_BATCHES_IN_A_POOL = 32


class Batch(NamedTuple):
    """What a model takes."""

    input_ids: Tensor  # (b, t) int64, padded on the right
    attention_mask: Tensor  # (b, t) bool, True = a real token
    labels: Tensor | None  # (b,) int64


@final
class EncodedSet:
    """Token ids and labels of many examples, without their texts.

    Memory: 4 bytes a token and 12 bytes a row. 100,000 rows of 50 tokens take 21 MB.
    """

    def __init__(self) -> None:
        self._ids = array("i")
        self._starts = array("q", [0])
        self.labels = array("i")  # each row's place in the label names
        self.n_truncated = 0
        self.n_empty = 0

    @classmethod
    def encode(
        cls, examples: Iterable[Example], tokenizer: Tokenizer, labels: Sequence[str], max_len: int
    ) -> "EncodedSet":
        """Encode examples as they stream in; a text is dropped from memory once it is encoded.

        Args:
            examples: read once, 1,024 at a time.
            tokenizer: what to encode with.
            labels: the label names, in the order of the model's classes.
            max_len: tokens kept of each text at most.

        Returns:
            All rows but those with an empty text; ``n_empty`` and ``n_truncated`` count what was
            left out and what was cut.

        Raises:
            DataError: if an example has a label that is not among ``labels``.
        """
        own = cls()
        places = {label: place for place, label in enumerate(labels)}
        stream = iter(examples)
        while chunk := list(islice(stream, _ROWS_AT_ONCE)):
            full = [example for example in chunk if example.text.strip()]
            own.n_empty += len(chunk) - len(full)
            encoded = tokenizer.encode_batch([example.text for example in full], max_len)
            own.n_truncated += encoded.n_truncated
            for example, ids in zip(full, encoded.ids, strict=True):
                if example.label not in places:
                    rule = f"be one of the model's classes ({', '.join(labels)})"
                    instead = "Rename it, or train with rows that have it."
                    raise DataError(must("label", rule, repr(example.label), instead))
                own._ids.extend(ids)
                own._starts.append(len(own._ids))
                own.labels.append(places[example.label])
        return own

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> "array[int]":
        if not -len(self) <= row < len(self):
            raise IndexError(must("row", f"be below {len(self)}", row))
        row %= len(self)
        return self._ids[self._starts[row] : self._starts[row + 1]]

    def __iter__(self) -> Iterator["array[int]"]:
        return (self[row] for row in range(len(self)))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [b - a for a, b in zip(self._starts, self._starts[1:], strict=False)]

    def batch(self, rows: Sequence[int], *, pad_id: int = 0) -> Batch:
        """Return some rows as tensors."""
        return collate(
            [self[row] for row in rows], [self.labels[row] for row in rows], pad_id=pad_id
        )


def bucketed(
    lengths: Sequence[int], *, max_tokens: int, generator: torch.Generator | None = None
) -> list[list[int]]:
    """Group rows of similar length into batches of a bounded number of tokens.

    Args:
        lengths: tokens of each row.
        max_tokens: real tokens in a batch at most; padding does not count, as the models compute
            none of it.
        generator: shuffles rows and batches; the same state gives the same batches. None goes
            from the shortest row to the longest, for evaluation.

    Returns:
        Row numbers, each once. Shuffled rows are sorted by length within pools of 32 batches.

    Raises:
        ValueError: if a row is longer than ``max_tokens``.

    >>> bucketed([3, 1, 2, 4], max_tokens=4)
    [[1, 2], [0], [3]]
    """
    check_positive("max_tokens", max_tokens)
    longest = max(lengths, default=0)
    if longest > max_tokens:
        rule = f"be at least the longest row, which has {longest} tokens"
        raise ValueError(must("max_tokens", rule, max_tokens, "Raise it, or lower max_len."))
    if generator is None:
        return _cut(sorted(range(len(lengths)), key=lengths.__getitem__), lengths, max_tokens)
    rows = torch.randperm(len(lengths), generator=generator).tolist()
    batches = []
    for pool in _cut(rows, lengths, max_tokens * _BATCHES_IN_A_POOL):
        batches += _cut(sorted(pool, key=lengths.__getitem__), lengths, max_tokens)
    order = torch.randperm(len(batches), generator=generator).tolist()
    return [batches[i] for i in order]


def collate(
    ids: Sequence[Sequence[int]], labels: Sequence[int] | None = None, *, pad_id: int = 0
) -> Batch:
    """Pad rows of token ids on the right to the longest.

    Args:
        ids: token ids of each row.
        labels: the class of each row, or None.
        pad_id: what stands where there is no token.

    Returns:
        ``input_ids`` (b, t), ``attention_mask`` (b, t), ``labels`` (b,) or None.

    Raises:
        ValueError: if there are not as many labels as rows.

    >>> collate([[5], [6, 7]]).input_ids
    tensor([[5, 0],
            [6, 7]])
    """
    if labels is not None and len(labels) != len(ids):
        rule = f"have one entry for each of the {len(ids)} rows"
        raise ValueError(must("labels", rule, f"{len(labels)} entries"))
    lengths = torch.tensor([len(row) for row in ids], dtype=torch.int64)
    width = int(lengths.max()) if len(ids) else 0
    flat = array("i")
    for row in ids:
        flat.extend(row)
    attention_mask = torch.arange(width) < lengths[:, None]
    input_ids = torch.full((len(ids), width), pad_id, dtype=torch.int64)
    if flat:
        input_ids[attention_mask] = torch.frombuffer(flat, dtype=torch.int32).long()
    of_rows = None if labels is None else torch.tensor(list(labels), dtype=torch.int64)
    return Batch(input_ids, attention_mask, of_rows)


def _cut(rows: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Cut a sequence of rows where the next one would go beyond ``max_tokens``."""
    batches: list[list[int]] = []
    room = 0
    for row in rows:
        if not batches or lengths[row] > room:
            batches.append([])
            room = max_tokens
        batches[-1].append(row)
        room -= lengths[row]
    return batches
