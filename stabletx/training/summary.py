"""What a run came to: in words for the terminal, in pictures and tables for the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from stabletx.data import EncodedSet, Preflight, Tokenizer
from stabletx.training import plots, report, runs
from stabletx.training.attention_maps import AttentionMap, last_attention, pick_examples
from stabletx.training.baselines import MAX_ROWS, Baseline
from stabletx.training.checkpoint import write_atomically
from stabletx.training.evaluate import Evaluation, label_names
from stabletx.training.events import LOG, read_log
from stabletx.training.metrics import Metrics

Picture = tuple[Path, str]
_LONGEST_MAP = 40  # tokens: more cannot be read


@dataclass(frozen=True)
class Outcome:
    """Everything a run came to. ``str()`` is what the terminal shows at the end."""

    folder: Path
    data: str
    about: str
    source: str
    rights: str
    test: Metrics
    baselines: tuple[Baseline, ...]
    training: Mapping[str, Any]
    settings: Mapping[str, Any]
    checks: Preflight
    left_out: Sequence[str]
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as what JSON can hold."""
        return {
            "data": self.data,
            "source": self.source,
            "accuracy": self.test.accuracy,
            "macro_f1": self.test.macro_f1,
            "test": self.test.to_dict(),
            "baselines": [
                {
                    "name": own.name,
                    "accuracy": own.metrics.accuracy,
                    "macro_f1": own.metrics.macro_f1,
                    "seconds": round(own.seconds, 2),
                    "train_rows": own.n_train,
                }
                for own in self.baselines
            ],
            "training": dict(self.training),
            "settings": dict(self.settings),
            "checks": self.checks.to_dict(),
            "left_out": list(self.left_out),
            "versions": dict(self.versions),
        }

    def rows(self) -> list[tuple[str, float, float, float]]:
        """Return name, accuracy, macro-F1 and seconds of this model and its rivals."""
        own = ("stabletx", self.test.accuracy, self.test.macro_f1, self.training["seconds"])
        rivals = [
            (b.name, b.metrics.accuracy, b.metrics.macro_f1, b.seconds) for b in self.baselines
        ]
        return [own, *rivals]

    def verdict(self) -> str:
        """Say in plain words how the model stands beside its rivals."""
        best = max(self.baselines, key=lambda b: b.metrics.accuracy)
        gap = 100 * (self.test.accuracy - best.metrics.accuracy)
        some = ""
        if best.n_train == MAX_ROWS:
            some = f" It saw the first {MAX_ROWS:,} training texts only."
        if gap < 0:
            return (
                f"{best.name} wins by {-gap:.1f} points of accuracy: "
                f"on these texts it is the better choice.{some}"
            )
        if gap == 0:
            return f"{best.name} is exactly as accurate, and simpler.{some}"
        return f"stabletx is {gap:.1f} points of accuracy ahead of {best.name}.{some}"

    def __str__(self) -> str:
        width = max(len(row[0]) for row in self.rows())
        lines = [f"{self.data}: {self.test.n_rows:,} test texts, never trained on", ""]
        lines.append(f"{'':<{width}}  accuracy  macro-F1  seconds")
        for name, accuracy, macro_f1, seconds in self.rows():
            lines.append(f"{name:<{width}}  {accuracy:8.3f}  {macro_f1:8.3f}  {seconds:7.1f}")
        lines += [self.verdict(), "", str(self.test), ""]
        lines += [
            f"model    {self.folder}",
            f"figures  {self.folder / runs.METRICS}",
            f"report   {self.folder / runs.REPORT}",
            f'try it   echo "some text" | stabletx predict {self.folder}',
        ]
        return "\n".join(lines)


def write_report(
    outcome: Outcome,
    model: nn.Module,
    tokenizer: Tokenizer,
    test: EncodedSet,
    evaluation: Evaluation,
    say: Callable[[str], None],
) -> None:
    """Draw the pictures and write ``report.html``; without matplotlib, the report alone."""
    try:
        pictures = _draw(outcome, _attention_maps(model, tokenizer, test, evaluation))
    except ImportError as error:
        say(f"No pictures: {error}")
        pictures = []
    page = report.render(f"stabletx: {outcome.data}", _sections(outcome, pictures))
    write_atomically(outcome.folder / runs.REPORT, page.encode())


def _attention_maps(
    model: nn.Module, tokenizer: Tokenizer, test: EncodedSet, evaluation: Evaluation
) -> list[AttentionMap]:
    maps = []
    for row in pick_examples(test.lengths, evaluation.probabilities, evaluation.truth):
        ids = list(test[row])[:_LONGEST_MAP]
        p = evaluation.probabilities[row]
        names = label_names(model, len(p))
        predicted = int(p.argmax())
        maps.append(
            AttentionMap(
                tokenizer.tokens(ids),
                last_attention(model, ids).mean(0),
                names[int(evaluation.truth[row])],
                names[predicted],
                float(p[predicted]),
            )
        )
    return maps


def _draw(outcome: Outcome, maps: list[AttentionMap]) -> list[Picture]:
    events = read_log(outcome.folder / LOG)
    side = min(3.6 + 0.4 * len(outcome.test.classes), 14.0)
    wanted: dict[str, tuple[str, Callable[[Any], Any], tuple[float, float]]] = {
        "loss": ("Loss over the steps.", partial(plots.plot_loss, events=events), (6.4, 4.2)),
        "accuracy": (
            "Accuracy over the steps.",
            partial(plots.plot_accuracy, events=events),
            (6.4, 4.2),
        ),
        "confusion": (
            "Confusion matrix on the test texts.",
            partial(plots.plot_confusion, metrics=outcome.test),
            (side + 0.8, side),
        ),
        "calibration": (
            "Where the line is above the dashes, the model is more often right than it claims.",
            partial(plots.plot_calibration, metrics=outcome.test),
            (6.4, 4.6),
        ),
    }
    for i, example in enumerate(maps, start=1):
        text = " ".join(example.tokens[1:]).replace(" ##", "")
        room = 3.6 + 0.2 * len(example.tokens)
        draw = partial(plots.plot_attention, example=example)
        wanted[f"attention-{i}"] = (f"Test text {i}: {text}", draw, (room + 1.0, room))
    return [
        (plots.save_picture(outcome.folder / f"{name}.png", draw, size=size), about)
        for name, (about, draw, size) in wanted.items()
    ]


def _sections(outcome: Outcome, pictures: list[Picture]) -> list[report.Section]:
    show = {path.stem: report.picture(path, about) for path, about in pictures}
    curves = [show[name] for name in ("loss", "accuracy") if name in show]
    maps = [html for name, html in show.items() if name.startswith("attention")]
    scores = report.table(
        ["class", "precision", "recall", "F1", "rows"], [list(c) for c in outcome.test.classes]
    )
    rivals = report.table(["", "accuracy", "macro-F1", "seconds"], outcome.rows())
    warnings = [report.paragraph(text, "warn") for text in outcome.checks.warnings]
    data = [
        report.paragraph(outcome.about),
        report.paragraph(f"From {outcome.source}. Rights: {outcome.rights}."),
        *(report.paragraph(text) for text in outcome.left_out),
    ]
    more = report.folded(
        "Every setting",
        [report.settings(outcome.settings), report.settings(outcome.versions)],
    )
    sections = [
        report.Section("Result", [report.paragraph(outcome.verdict(), "big"), rivals, *warnings]),
        report.Section("Each class", [scores, show.get("confusion", "")]),
        report.Section("How training went", curves),
        report.Section("Can its probabilities be trusted?", [show.get("calibration", "")]),
        report.Section("What it looks at", maps),
        report.Section("Data", [*data, report.preformatted(str(outcome.checks))]),
        report.Section("The run", [report.settings(outcome.training), more]),
    ]
    return [section for section in sections if any(section.parts)]
