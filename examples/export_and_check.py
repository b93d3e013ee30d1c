"""Train, export to ONNX, and check that every way to run the model gives the same answers.

Run it: ``python examples/export_and_check.py``  (needs the extras train and export)
"""

import argparse
import json
from pathlib import Path

from stabletx.data import EncodedSet, Tokenizer, load_named
from stabletx.interop import export
from stabletx.interop.parity import Subject, compare
from stabletx.interop.parity.show import print_table, save_parity_picture
from stabletx.models import SequenceClassifier
from stabletx.training import TrainingConfig, default_model, fit


def main() -> None:
    """Train for a moment, export, ask ONNX Runtime, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4000, help="train rows")
    parser.add_argument("--only", default="float64,bfloat16,packed,onnx", help="environments")
    parser.add_argument("--folder", type=Path, default=Path("runs/exported"))
    arguments = parser.parse_args()

    splits = load_named("docstrings")
    train = list(splits.train)[:: max(1, len(splits.train) // arguments.rows)]
    tokenizer = Tokenizer.train([example.text for example in train], 4000)

    def encode(examples):
        return EncodedSet.encode(examples, tokenizer, splits.labels, 96)

    model = SequenceClassifier(default_model(tokenizer.vocab_size, splits.labels, max_seq_len=96))
    fit(model, encode(train), encode(splits.validation), config=TrainingConfig(epochs=2))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(arguments.folder)
    tokenizer.save(arguments.folder)

    path = export.to_onnx(model, arguments.folder / "model.onnx")
    session = export.onnx_session(path)
    labels = json.loads(session.get_modelmeta().custom_metadata_map["labels"])
    ids = tokenizer.encode_batch(["Return the sum of all elements of a tensor."], 96).ids
    logits = session.run(None, {"input_ids": ids, "attention_mask": [[1] * len(ids[0])]})[0]
    print(f"ONNX Runtime says {labels[int(logits.argmax())]}")

    rows = tokenizer.encode_batch([example.text for example in list(splits.test)[:200]], 96).ids
    found = compare(Subject(model, path), rows, environments=arguments.only.split(","))
    print_table(found)
    print(f"see {save_parity_picture(arguments.folder / 'parity.png', found)}")


if __name__ == "__main__":
    main()
