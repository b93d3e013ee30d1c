"""Hugging Face's Trainer trains, evaluates, checkpoints, resumes and predicts with our models."""

from pathlib import Path

import numpy as np
import pytest
import torch

from stabletx.data import Tokenizer, collate, load_named
from stabletx.interop import checkpoints
from stabletx.models import SequenceClassifier, TransformerConfig

transformers = pytest.importorskip("transformers", reason="needs the huggingface extra")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
pytest.importorskip("tokenizers", reason="needs the text extra")

LABELS = ("networkx", "stdlib", "sympy", "torch")


@pytest.fixture(scope="module")
def data():
    """A slice of real texts: train and test rows, and the size of the vocabulary."""
    splits = load_named("docstrings")
    parts = [list(splits.train)[::30], list(splits.test)[::50]]
    tokenizer = Tokenizer.train([e.text for e in parts[0]], 600)

    def rows(examples):
        ids = tokenizer.encode_batch([e.text for e in examples], 24).ids
        pairs = zip(ids, examples, strict=True)
        return [{"input_ids": own, "labels": LABELS.index(e.label)} for own, e in pairs]

    return *(rows(part) for part in parts), tokenizer.vocab_size


def pad(rows):
    labels = [row["labels"] for row in rows] if "labels" in rows[0] else None
    batch = collate([row["input_ids"] for row in rows], labels)
    named = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long()}
    return named if labels is None else {**named, "labels": batch.labels}


def model_of(vocab_size, seed=0):
    torch.manual_seed(seed)
    sizes = {"d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 24, "dropout_p": 0.1}
    return SequenceClassifier(TransformerConfig(vocab_size, labels=LABELS, **sizes))


def trainer_of(model, data, folder, **changes):
    settings = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "learning_rate": 1e-2,
        "warmup_steps": 5,
        "weight_decay": 0.01,
        "logging_steps": 1,
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    arguments = transformers.TrainingArguments(str(folder), **{**settings, **changes})
    train, test, _ = data
    return transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=test,
        data_collator=pad,
        compute_metrics=lambda own: {"right": float(np.mean(own[0].argmax(-1) == own[1]))},
    )


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run of two epochs that nothing interrupted."""
    trainer = trainer_of(model_of(data[2]), data, tmp_path_factory.mktemp("trainer"))
    trainer.train()
    return trainer


def test_training_learns_and_reports(trained, data):
    losses = [line["loss"] for line in trained.state.log_history if "loss" in line]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.2
    assert trained.evaluate()["eval_right"] > 0.5
    rates = [line["learning_rate"] for line in trained.state.log_history if "loss" in line]
    assert rates[0] < max(rates)
    assert rates[-1] < max(rates)


def test_predictions_are_those_of_the_model(trained, data):
    without_labels = [{"input_ids": row["input_ids"]} for row in data[1]]
    found = trained.predict(without_labels).predictions
    assert found.shape == (len(data[1]), len(LABELS))
    trained.model.eval()
    with torch.inference_mode():
        batch = pad(without_labels[:64])
        expected = trained.model(**batch).logits.numpy()
    # The Trainer cuts the rows into the very same first batch.
    assert np.array_equal(found[:64], expected[: len(found)])


def test_an_interrupted_run_ends_with_the_same_bits(trained, data, tmp_path):
    first = _checkpoints(trained)[0]
    again = trainer_of(model_of(data[2], seed=99), data, tmp_path)
    again.train(resume_from_checkpoint=str(first))
    assert again.state.global_step == trained.state.global_step
    expected = trained.model.state_dict()
    for name, x in again.model.state_dict().items():
        assert torch.equal(x, expected[name]), name


def _checkpoints(trainer):
    folder = trainer.args.output_dir
    return sorted(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def test_the_best_epoch_and_a_logging_folder_are_kept(data, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="needs the train extra")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    options = {"report_to": ["tensorboard"], "load_best_model_at_end": True, "num_train_epochs": 1}
    trainer = trainer_of(model_of(data[2]), data, tmp_path / "out", **options)
    trainer.train()
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))
    trainer.model.save_pretrained(tmp_path / "own")
    again = SequenceClassifier.from_pretrained(tmp_path / "own")
    batch = pad(data[1][:8])
    with torch.inference_mode():
        expected = trainer.model.eval()(batch["input_ids"], batch["attention_mask"]).logits
        assert torch.equal(again(batch["input_ids"], batch["attention_mask"]).logits, expected)


def test_a_loaded_checkpoint_is_fine_tuned(data, tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=data[2], hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=24,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    model = checkpoints.load(tmp_path / "bert", labels=LABELS)
    start = model.encoder.blocks[0].attention.qkv.weight.detach().clone()
    trainer = trainer_of(model, data, tmp_path / "out", save_strategy="no", eval_strategy="no")
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    assert not torch.equal(model.encoder.blocks[0].attention.qkv.weight, start)
