import dataclasses
import errno
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stabletx.training import CheckpointError, JsonLinesLog, TrainingConfig, TrainingError, fit
from stabletx.training import checkpoint as ck
from stabletx.training.events import read_log
from stabletx.training.optimizer import balanced_weights, make_optimizer
from tests.training.standins import TinyModel, TinyRows, losses

fit_module = sys.modules["stabletx.training.fit"]  # the package's name `fit` is the function

TRAIN, VALIDATION = TinyRows(90, seed=1), TinyRows(30, seed=2)
CONFIG = TrainingConfig(epochs=4, batch_tokens=64, lr=0.05, seed=3)


def run(config=CONFIG, **more):
    model = TinyModel()
    return model, fit(model, TRAIN, VALIDATION, config=config, **more)


def after(n_steps):
    """Ask for a stop after so many steps."""
    steps = iter(range(1, 10_000))
    return lambda: next(steps) == n_steps


def test_fit_learns_and_keeps_the_best_epoch():
    model, result = run(dataclasses.replace(CONFIG, epochs=12))
    rounds = [e for e in result.history if e["event"] == "validation"]
    assert [e["is_best"] for e in rounds].count(True) >= 1
    kept = next(e for e in rounds if e["epoch"] == result.best_epoch)
    assert kept["macro_f1"] == max(e["macro_f1"] for e in rounds)
    assert kept["accuracy"] > 0.8
    assert not model.training


def test_fit_repeats_every_bit_with_the_same_seed():
    (a, first), (b, second) = run(), run()
    assert losses(first.history) == losses(second.history)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_fit_goes_another_way_with_another_seed():
    assert losses(run()[1].history) != losses(run(dataclasses.replace(CONFIG, seed=4))[1].history)


def test_fit_leaves_the_random_numbers_of_the_caller_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run()
    assert torch.equal(torch.rand(3), expected)


def test_resumed_run_is_equal_to_the_bit_when_stopped_at_any_step(tmp_path):
    whole, result = run()
    for stop in (1, result.steps // 2, result.steps - 1):
        folder = tmp_path / str(stop)
        part = run(folder=folder, should_stop=after(stop))[1]
        assert (part.reason, part.steps) == ("request", stop)
        resumed, rest = run(folder=folder, resume=True)
        steps = [own for own in losses(part.history) if own[0] <= stop]
        assert steps + losses(rest.history) == losses(result.history)
        for x, y in zip(whole.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(x, y)


KILLED = """
import os, signal, sys
from pathlib import Path
from stabletx.training import JsonLinesLog, TrainingConfig, fit
from stabletx.training import checkpoint as ck
from tests.training.standins import TinyModel, TinyRows

folder, way, at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def listen(event):
    if way == "step" and event["event"] == "step" and event["step"] == at:
        die()

if way == "save":
    count, sync = iter(range(1, 1000)), os.fsync
    os.fsync = lambda handle: die() if next(count) == at else sync(handle)
config = TrainingConfig(epochs=4, batch_tokens=64, lr=0.05, seed=3, save_seconds=1e-9)
fit(TinyModel(), TinyRows(90, seed=1), TinyRows(30, seed=2), config=config, folder=folder,
    listeners=[JsonLinesLog(folder / "log.jsonl"), listen])
"""


@pytest.mark.parametrize(("way", "at"), [("step", 11), ("save", 14)])
def test_killed_run_goes_on_to_the_same_bits(tmp_path, way, at):
    config = dataclasses.replace(CONFIG, save_seconds=1e-9)
    whole, result = run(config)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), way, str(at)],
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parent),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        },
    )
    assert done.returncode == -signal.SIGKILL
    log = JsonLinesLog(tmp_path / "log.jsonl")
    resumed, _ = run(config, folder=tmp_path, resume=True, listeners=[log])
    assert losses(read_log(log.path)) == losses(result.history)
    for x, y in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(x, y)


def test_last_checkpoint_survives_when_the_disk_fills_up(tmp_path, monkeypatch):
    sync, count = os.fsync, iter(range(1, 1000))

    def full(handle):
        if next(count) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run(folder=tmp_path)
    monkeypatch.undo()
    assert ck.load_checkpoint(tmp_path / ck.FILE)[1]["state"]["epoch"] == 2
    assert run(folder=tmp_path, resume=True)[1].steps == run()[1].steps


def test_resume_of_a_finished_run_does_nothing_more(tmp_path):
    whole, first = run(folder=tmp_path)
    again, second = run(folder=tmp_path, resume=True)
    assert second.steps == first.steps
    assert losses(second.history) == []
    assert all(
        torch.equal(x, y) for x, y in zip(whole.parameters(), again.parameters(), strict=True)
    )


@pytest.mark.parametrize(("name", "value"), [("lr", 0.5), ("epochs", 9), ("seed", 7)])
def test_resume_refuses_other_settings(tmp_path, name, value):
    run(folder=tmp_path, should_stop=lambda: True)
    config = dataclasses.replace(CONFIG, **{name: value})
    with pytest.raises(CheckpointError, match=f"{name} must be .* got {name}={value}"):
        run(config, folder=tmp_path, resume=True)


def test_resume_refuses_weights_of_another_model(tmp_path):
    run(folder=tmp_path, should_stop=lambda: True)
    model = TinyModel()
    model.out = torch.nn.Linear(8, 3)
    with pytest.raises(CheckpointError, match="checkpoint must fit the model, got checkpoint="):
        fit(model, TRAIN, VALIDATION, config=CONFIG, folder=tmp_path, resume=True)


def test_fit_stops_with_the_step_when_the_loss_is_not_finite(tmp_path):
    class Breaks(TinyModel):
        def forward(self, input_ids, attention_mask):
            out = super().forward(input_ids, attention_mask)
            self.calls = getattr(self, "calls", 0) + self.training
            if self.training and self.calls == 12:
                out.logits = out.logits * math.nan
            return out

    model = Breaks()
    with pytest.raises(TrainingError, match="loss must be finite, got nan in step 12"):
        fit(model, TRAIN, VALIDATION, config=CONFIG, folder=tmp_path)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert ck.load_checkpoint(tmp_path / ck.FILE)[1]["state"]["step"] < 12


def test_fit_stops_with_the_step_when_a_gradient_is_not_finite():
    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * math.inf

    model = TinyModel()
    model.out.register_forward_hook(lambda layer, args, out: Breaks.apply(out))
    with pytest.raises(TrainingError, match=r"gradient norm must be finite, got .* in step 1 "):
        fit(model, TRAIN, VALIDATION, config=CONFIG)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_fit_stops_when_patience_is_over():
    config = dataclasses.replace(CONFIG, epochs=30, patience=2, lr=1e-9)
    result = run(config)[1]
    assert result.reason == "patience"
    assert result.epochs - result.best_epoch == 2


def test_fit_ends_with_a_validation_when_the_time_is_over():
    result = run(dataclasses.replace(CONFIG, epochs=10_000, max_seconds=0.3))[1]
    assert result.reason == "time"
    assert result.best_epoch >= 1
    rates = [e["lr"] for e in result.history if e["event"] == "step"]
    assert rates[-1] < max(rates)


def test_monitor_loss_keeps_the_epoch_of_the_lowest_loss():
    result = run(dataclasses.replace(CONFIG, epochs=12, monitor="loss"))[1]
    rounds = {e["epoch"]: e["loss"] for e in result.history if e["event"] == "validation"}
    assert rounds[result.best_epoch] == min(rounds.values())


def test_balanced_weights_give_every_class_the_same_say():
    labels = [0] * 30 + [1] * 10 + [2]
    weights = balanced_weights(labels, 4)
    shares = [float(weights[i]) * labels.count(i) for i in range(3)]
    assert float(weights[3]) == 0.0
    assert max(shares) - min(shares) <= 4 * torch.finfo(torch.float32).eps * max(shares)


def test_class_weights_change_the_training():
    balanced = dataclasses.replace(CONFIG, class_weights="balanced")
    uneven = TinyRows(60, seed=1)
    uneven.labels[0] = 1
    results = [fit(TinyModel(), uneven, VALIDATION, config=c) for c in (CONFIG, balanced)]
    assert losses(results[0].history) != losses(results[1].history)


def test_optimizer_does_not_pull_vectors_to_zero():
    groups = make_optimizer(TinyModel(), CONFIG).param_groups
    assert [group["weight_decay"] for group in groups] == [CONFIG.weight_decay, 0.0]
    assert [{p.ndim for p in group["params"]} for group in groups] == [{2}, {1}]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_fit_runs_in_each_precision(precision):
    result = run(dataclasses.replace(CONFIG, precision=precision))[1]
    assert all(math.isfinite(loss) for _, loss in losses(result.history))


def test_long_run_reports_only_now_and_then(monkeypatch):
    every_step = run()[1]
    monkeypatch.setattr(fit_module, "_STEPS_SHOWN", 5)
    seldom = run()[1]
    n_events = [sum(e["event"] == "step" for e in r.history) for r in (every_step, seldom)]
    assert n_events[0] == every_step.steps
    assert 5 <= n_events[1] <= 5 + 2 * CONFIG.epochs
    means = [e["loss"] for e in seldom.history if e["event"] == "step"]
    assert min(means) > min(loss for _, loss in losses(every_step.history))


@pytest.mark.parametrize("name", ["train", "validation"])
def test_fit_refuses_no_rows(name):
    rows = {"train": TRAIN, "validation": VALIDATION, name: TinyRows(0, seed=0)}
    with pytest.raises(ValueError, match=f"{name} must hold at least one row, got {name}=none"):
        fit(TinyModel(), rows["train"], rows["validation"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1), ("epochs", 0), ("max_seconds", 0.0), ("max_seconds", math.inf),
        ("batch_tokens", 0), ("lr", 0.0), ("lr", math.nan), ("weight_decay", -1.0),
        ("warmup", 1.0), ("decay", "steps"), ("clip_norm", -1.0), ("label_smoothing", 1.0),
        ("class_weights", "some"), ("token_dropout", -0.1), ("monitor", "f1"), ("patience", 0),
        ("precision", "float16"), ("save_seconds", 0.0),
    ],
)  # fmt: skip
def test_config_refuses_values_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} must .* got {name}="):
        TrainingConfig(**{name: value})


@given(n_tokens=st.integers(0, 10**9))
def test_size_of_the_data_decides_what_was_left_open(n_tokens):
    config = TrainingConfig().for_tokens(n_tokens)
    assert 2 <= config.epochs <= 20
    assert 256 <= config.batch_tokens <= 2048
    fixed = TrainingConfig(epochs=77, batch_tokens=33)
    assert fixed.for_tokens(n_tokens) == fixed


def test_result_says_what_was_decided():
    result = fit(TinyModel(), TRAIN, VALIDATION, config=TrainingConfig(max_seconds=0.2))
    assert result.config == TrainingConfig(max_seconds=0.2).for_tokens(sum(TRAIN.lengths))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0.06), ("weight_decay", 0.5), ("warmup", 0.5), ("decay", "cosine"),
        ("clip_norm", 1e-3), ("label_smoothing", 0.3), ("token_dropout", 0.5),
        ("batch_tokens", 32), ("precision", "bfloat16"),
    ],
)  # fmt: skip
def test_each_setting_changes_the_training(name, value):
    assert losses(run()[1].history) != losses(
        run(dataclasses.replace(CONFIG, **{name: value}))[1].history
    )


def test_token_dropout_spares_the_first_token_and_the_padding():
    seen = []

    class Looks(TinyModel):
        def forward(self, input_ids, attention_mask):
            if self.training:
                seen.append((input_ids.clone(), attention_mask))
            return super().forward(input_ids, attention_mask)

    rows = TinyRows(60, seed=1)
    rows.rows = [[2, *row] for row in rows.rows]
    rows.lengths = [len(row) for row in rows.rows]
    fit(Looks(), rows, VALIDATION, config=dataclasses.replace(CONFIG, token_dropout=0.5))
    ids = torch.cat([x[mask] for x, mask in seen])
    share = float((ids == 1).sum()) / float((ids != 2).sum())
    # Half of n tokens, give or take six standard deviations.
    assert abs(share - 0.5) < 6 * 0.5 / len(ids) ** 0.5
    assert all(bool((x[:, 0] == 2).all()) for x, _ in seen)
    assert all(bool((x[~mask] == 0).all()) for x, mask in seen)


def test_learning_rate_rises_and_falls():
    config = dataclasses.replace(CONFIG, warmup=0.5, decay="cosine")
    rates = [e["lr"] for e in run(config)[1].history if e["event"] == "step"]
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[-1] < rates[0] < max(rates) <= CONFIG.lr
