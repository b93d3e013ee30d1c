"""What to look at before training, so that the data is a task to be learned and measured."""

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from stabletx._checks import must
from stabletx.data.errors import DataError
from stabletx.data.splits import Example, Splits, text_key

_RARE = 10  # rows: fewer of a label can hardly be learned
_SKEWED = 10.0  # times: the most frequent label over the rarest
_MUCH_CUT = 0.1  # share of rows that lose their end


@dataclass(frozen=True)
class Preflight:
    """Counts and warnings. ``str()`` is the report to print, ``to_dict()`` the one to keep."""

    labels: dict[str, dict[str, int]]  # split -> label -> rows
    empty: dict[str, int]  # split -> rows without a visible character, which training leaves out
    duplicates: dict[str, int]  # split -> rows whose text stood earlier in the same split
    leaked: dict[str, int]  # split other than train -> rows whose text is also in train
    truncated: dict[str, int] = field(default_factory=dict)  # split -> rows that lose their end

    @property
    def warnings(self) -> list[str]:
        """What does not forbid training, but makes its figures worth less."""
        train = self.labels["train"]
        found = [
            f"{split}: {n} texts are in train too, so its figures are too good"
            for split, n in self.leaked.items()
            if n
        ]
        found += [f"{split}: {n} empty texts are left out" for split, n in self.empty.items() if n]
        found += [f"{split}: {n} repeated texts" for split, n in self.duplicates.items() if n]
        rare = [f"{label!r} ({n})" for label, n in sorted(train.items()) if n < _RARE]
        if rare:
            found.append(f"train: fewer than {_RARE} rows of {', '.join(rare)}")
        most, least = max(train.values()), min(train.values())
        if most > _SKEWED * least:
            times = f"{most / least:.0f} times"
            found.append(f"train: the most frequent label has {times} the rows of the rarest")
        for split, n in self.truncated.items():
            share = n / max(sum(self.labels[split].values()), 1)
            if share > _MUCH_CUT:
                found.append(f"{split}: {share:.0%} of the texts lose their end at max_len")
        return found

    def with_truncated(self, truncated: Mapping[str, int]) -> "Preflight":
        """Add how many texts of each split were cut, which only the encoding knows."""
        return replace(self, truncated=dict(truncated))

    def to_dict(self) -> dict[str, Any]:
        """Return the counts and the warnings for a JSON file."""
        return {**asdict(self), "warnings": self.warnings}

    def __str__(self) -> str:
        splits = list(self.labels)
        rows = [["label", *splits]]
        for label in sorted({label for counts in self.labels.values() for label in counts}):
            rows.append([label, *(str(self.labels[split].get(label, 0)) for split in splits)])
        rows.append(["all", *(str(sum(self.labels[split].values())) for split in splits)])
        for name in ("empty", "duplicates", "leaked", "truncated"):
            counts = getattr(self, name)
            if any(counts.values()):
                rows.append([name, *(str(counts.get(split, "")) for split in splits)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            f"{row[0]:<{widths[0]}}"
            + "".join(f"  {c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
            for row in rows
        ]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


def preflight(splits: Splits | Mapping[str, Iterable[Example]]) -> Preflight:
    """Count what is in each split, and refuse what cannot be trained on or measured.

    Args:
        splits: ``Splits``, or examples by the name of their split, ``"train"`` among them. Each is
            read once, as a stream; about 80 bytes a row are kept.

    Returns:
        The counts with their warnings: texts in two splits, repeated and empty texts, rare and
        skewed labels.

    Raises:
        DataError: if a split has no text, if train has one class only, or if another split has a
            label that train lacks.

    >>> good, bad = Example("A good film", "+"), Example("A bad film", "-")
    >>> preflight({"train": [good, bad], "test": [bad]}).leaked
    {'test': 1}
    """
    parts = splits.parts() if isinstance(splits, Splits) else splits
    if "train" not in parts:
        raise DataError(must("splits", "have a split named 'train'", sorted(parts)))
    labels: dict[str, dict[str, int]] = {}
    keys: dict[str, array[int]] = {}
    empty: dict[str, int] = {}
    for split, examples in parts.items():
        labels[split], keys[split], empty[split] = _count(examples)
        if not keys[split]:
            got = f"no text among {empty[split]} rows"
            raise DataError(must(split, "hold at least one text", got, "Check the text column."))
    _check_labels(labels)
    seen = set(keys["train"])
    return Preflight(
        labels,
        empty,
        {split: len(own) - len(set(own)) for split, own in keys.items()},
        {split: sum(key in seen for key in own) for split, own in keys.items() if split != "train"},
    )


def _count(examples: Iterable[Example]) -> tuple[dict[str, int], "array[int]", int]:
    counts: Counter[str] = Counter()
    keys = array("Q")
    n_empty = 0
    for text, label in examples:
        if text.strip():
            counts[label] += 1
            keys.append(text_key(text))
        else:
            n_empty += 1
    return dict(sorted(counts.items())), keys, n_empty


def _check_labels(labels: Mapping[str, Mapping[str, int]]) -> None:
    known = labels["train"]
    if len(known) < 2:
        instead = "Check the label column: there is nothing to learn."
        raise DataError(must("train", "have at least two classes", f"only {list(known)}", instead))
    for split, counts in labels.items():
        new = [f"{label!r} ({n} rows)" for label, n in counts.items() if label not in known]
        if new:
            instead = "Rename them, add such rows to train, or divide the rows anew."
            rule = f"have only labels that train has ({', '.join(map(repr, known))})"
            raise DataError(must(split, rule, ", ".join(new), instead))
