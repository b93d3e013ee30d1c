"""Our classifier in the usual script of Hugging Face's Trainer: train, evaluate, resume, predict.

Run it: ``python examples/fine_tune_with_trainer.py``  (needs transformers and accelerate)
"""

import argparse
from pathlib import Path

import torch
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from stabletx.data import Tokenizer, load_named
from stabletx.models import SequenceClassifier
from stabletx.training import default_model


def main() -> None:
    """Train on docstrings, stop after the first epoch, go on, and label the test texts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path("runs/trainer"))
    asked = parser.parse_args()

    splits = load_named("docstrings")
    train = list(splits.train)[:: max(1, len(splits.train) // asked.rows)]
    own = Tokenizer.train([example.text for example in train])
    own.save(asked.folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(asked.folder / "tokenizer.json"),
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip

    def encode(examples):
        rows = tokenizer([e.text for e in examples], truncation=True, max_length=96)
        labels = [splits.labels.index(e.label) for e in examples]
        ids = zip(rows["input_ids"], rows["attention_mask"], labels, strict=True)
        return [{"input_ids": a, "attention_mask": b, "labels": c} for a, b, c in ids]

    def accuracy(found):
        return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}

    def trainer(epochs):
        set_seed(0)
        model = SequenceClassifier(default_model(own.vocab_size, splits.labels, dropout_p=0.1))
        settings = TrainingArguments(
            output_dir=str(asked.folder), num_train_epochs=epochs, learning_rate=3e-3,
            per_device_train_batch_size=16, per_device_eval_batch_size=64,
            warmup_steps=50, weight_decay=0.01, logging_steps=50, report_to=[],
            save_strategy="epoch", eval_strategy="epoch", use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        return Trainer(
            model=model, args=settings, train_dataset=encode(train), eval_dataset=held,
            data_collator=DataCollatorWithPadding(tokenizer), compute_metrics=accuracy,
        )  # fmt: skip

    held, test = encode(list(splits.validation)[::5]), encode(splits.test)
    trainer(1).train()  # as if the machine had stopped here
    again = trainer(asked.epochs)
    again.train(resume_from_checkpoint=True)
    print(f"validation accuracy: {again.evaluate()['eval_accuracy']:.3f}")
    print(f"test accuracy: {again.predict(test).metrics['test_accuracy']:.3f}")
    again.model.save_pretrained(asked.folder)  # what stabletx predict, export and parity read
    print(f"try it: echo 'some text' | stabletx predict {asked.folder}")


if __name__ == "__main__":
    main()
