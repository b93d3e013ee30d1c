"""Text in: tables, named data sets, a tokenizer, batches, and checks before training.

The way of a user's file: ``load_table`` (or ``load_named``), ``preflight``, ``Tokenizer.train`` on
the train split, ``EncodedSet.encode`` for each split, then in each epoch ``bucketed`` and
``EncodedSet.batch``.
"""

from stabletx.data.batches import Batch, EncodedSet, bucketed, collate
from stabletx.data.checks import Preflight, preflight
from stabletx.data.errors import DataError, NetworkNeeded
from stabletx.data.named import NAMES, load_named
from stabletx.data.splits import Dropped, Example, Splits, assign
from stabletx.data.tables import load_table, read_rows, read_table
from stabletx.data.tokenizer import EncodedTexts, Tokenizer

__all__ = [
    "NAMES",
    "Batch",
    "DataError",
    "Dropped",
    "EncodedSet",
    "EncodedTexts",
    "Example",
    "NetworkNeeded",
    "Preflight",
    "Splits",
    "Tokenizer",
    "assign",
    "bucketed",
    "collate",
    "load_named",
    "load_table",
    "preflight",
    "read_rows",
    "read_table",
]
