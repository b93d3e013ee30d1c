"""Train a classifier: the loop, its checkpoints, and what it reports."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from stabletx._checks import must
from stabletx.data import Batch, bucketed
from stabletx.functional.losses import cross_entropy
from stabletx.training import checkpoint as ck
from stabletx.training.config import TrainingConfig
from stabletx.training.evaluate import Encoded, device_of, evaluate
from stabletx.training.events import Event, Listener, StepMeter
from stabletx.training.metrics import Metrics
from stabletx.training.optimizer import autocast_dtype, balanced_weights, make_optimizer
from stabletx.training.schedule import learning_rate_factor

Reason = Literal["epochs", "patience", "time", "request"]
_UNKNOWN_ID = 1  # the tokenizer's token for a word it does not know
_STEPS_SHOWN = 1000  # step events of a run, about


class TrainingError(RuntimeError):
    """A run that cannot go on: its numbers are no longer finite."""


@dataclasses.dataclass(frozen=True)
class FitResult:
    """How a run went. The model holds the best epoch's weights.

    Attributes:
        reason: why it ended: "epochs" done, "patience" over, "time" over, or on "request".
        steps: optimizer steps, those before a resume included.
        epochs: epochs begun.
        seconds: wall-clock time spent, validation included.
        tokens: real tokens trained on.
        best_epoch: the epoch whose weights were kept, from 1; 0 before any validation.
        config: what was asked for, with every choice made.
        history: the events since the run was started or resumed.
    """

    reason: Reason
    steps: int
    epochs: int
    seconds: float
    tokens: int
    best_epoch: int
    config: TrainingConfig
    history: list[Event]


def fit(
    model: nn.Module,
    train: Encoded,
    validation: Encoded,
    *,
    config: TrainingConfig | None = None,
    folder: Path | None = None,
    resume: bool = False,
    listeners: Sequence[Listener] = (),
    should_stop: Callable[[], bool] = lambda: False,
) -> FitResult:
    """Train a classifier where it lies, and leave the best epoch's weights in it.

    Args:
        model: called as ``model(input_ids, attention_mask).logits``.
        train: encoded rows with labels, such as :class:`stabletx.data.EncodedSet`.
        validation: rows that choose the best epoch.
        config: how to train; None takes every default.
        folder: where ``checkpoint.safetensors`` is kept; None keeps none.
        resume: go on from the checkpoint in ``folder``; without one, start.
        listeners: called with each event.
        should_stop: asked after each step; True saves a checkpoint and ends the run.

    Returns:
        How the run went.

    Raises:
        ValueError: if there are no rows.
        CheckpointError: if the checkpoint is damaged or belongs to another run.
        TrainingError: if a loss or gradient is not finite; it names the step.
        OSError: if a checkpoint cannot be written; the one before stays whole.

    Numerics: weights, gradients and optimizer in the model's dtype; loss in at least float32. On
        one machine the same seed gives the same bits, also when killed and resumed.
    Source: Loshchilov and Hutter (2019), Decoupled weight decay regularization, for AdamW.
    """
    for name, rows in (("train", train), ("validation", validation)):
        if len(rows) == 0:
            raise ValueError(must(name, "hold at least one row", "none"))
    config = (config or TrainingConfig()).for_tokens(sum(train.lengths))
    devices = [device_of(model)] if device_of(model).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(config.seed)
        loop = _Loop(model, train, validation, config, folder, listeners)
        if resume and folder is not None and (folder / ck.FILE).exists():
            loop.restore()
        return loop.run(should_stop)


@dataclasses.dataclass
class _State:
    """Where a run stands; what of it is not a tensor."""

    epoch: int = 0
    position: int = 0  # batches of this epoch that are done
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_epoch: int = 0
    best_value: float = -math.inf
    best_loss: float = math.inf
    rounds_without_better: int = 0
    is_over: bool = False


@final
class _Loop:
    """A run: its state, one method for each thing that happens in it."""

    def __init__(
        self,
        model: nn.Module,
        train: Encoded,
        validation: Encoded,
        config: TrainingConfig,
        folder: Path | None,
        listeners: Sequence[Listener],
    ) -> None:
        self.model, self.train, self.validation, self.config = model, train, validation, config
        self.folder, self.device = folder, device_of(model)
        self.state, self.history = _State(), list[Event]()
        self.listeners = [self.history.append, *listeners]
        self.optimizer = make_optimizer(model, config)
        self.lengths = train.lengths
        assert config.epochs is not None
        assert config.batch_tokens is not None
        self.epochs, self.batch_tokens = config.epochs, max(config.batch_tokens, *self.lengths)
        self.total_steps = self.epochs * len(self._batches(0))
        self.weights = self._class_weights()
        self.precision = autocast_dtype(config, self.device)
        self.best: dict[str, Tensor] = {}
        self.recent = StepMeter(max(1, self.total_steps // _STEPS_SHOWN))

    def run(self, should_stop: Callable[[], bool]) -> FitResult:
        self.started = self.saved = time.perf_counter()
        self._emit("start", **self._about())
        reason: Reason = "epochs"
        self.model.train()
        while self.state.epoch < self.epochs and not self.state.is_over:
            stopped = self._epoch(should_stop)
            if stopped == "request":
                self._save()
                return self._result("request")
            reason = self._close_epoch(stopped)
        if self.best:
            self.model.load_state_dict(self.best)
        self.model.eval()
        return self._result(reason)

    def _epoch(self, should_stop: Callable[[], bool]) -> Reason | None:
        batches = self._batches(self.state.epoch)
        for rows in batches[self.state.position :]:
            self._step(self.train.batch(rows))
            self.state.position += 1
            if should_stop():
                self._report()
                return "request"
            if self._is_time_over():
                return "time"
            if time.perf_counter() - self.saved > self.config.save_seconds:
                self._report()
                self._save()
        return None

    def _close_epoch(self, stopped: Reason | None) -> Reason:
        self._report()
        is_better = self._validate()
        state = self.state
        state.epoch, state.position = state.epoch + 1, 0
        state.rounds_without_better = 0 if is_better else state.rounds_without_better + 1
        patience = self.config.patience
        out_of_patience = patience is not None and state.rounds_without_better >= patience
        out_of_time = stopped == "time" or self._is_time_over()
        state.is_over = out_of_time or out_of_patience
        self._save()
        return "time" if out_of_time else "patience" if out_of_patience else "epochs"

    def _step(self, batch: Batch) -> None:
        state, config = self.state, self.config
        assert batch.labels is not None
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * learning_rate_factor(
                self._share(ahead=0.5), warmup=config.warmup, decay=config.decay
            )
        ids = self._drop_tokens(batch).to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        is_low = self.precision != torch.float32
        with torch.autocast(self.device.type, dtype=self.precision, enabled=is_low):
            logits = self.model(ids, batch.attention_mask).logits
        loss = cross_entropy(
            logits, labels, label_smoothing=config.label_smoothing, class_weights=self.weights
        )
        state.step += 1
        if self.device.type == "cpu":
            self._check_finite("loss", float(loss.detach()))
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        if self.device.type == "cpu":
            self._check_finite("gradient norm", float(norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        n_tokens = int(batch.attention_mask.sum())
        state.tokens += n_tokens
        right = (logits.detach().argmax(1) == labels).sum()
        self.recent.add(loss.detach(), norm, right, len(labels), n_tokens)
        if self.recent.is_full:
            self._report()

    def _drop_tokens(self, batch: Batch) -> Tensor:
        if self.config.token_dropout == 0:
            return batch.input_ids
        drop = torch.rand(batch.input_ids.shape) < self.config.token_dropout
        drop[:, 0] = False  # the token that opens every text
        return batch.input_ids.masked_fill(drop & batch.attention_mask, _UNKNOWN_ID)

    def _check_finite(self, what: str, value: float, step: int | None = None) -> None:
        if math.isfinite(value):
            return
        step = self.state.step if step is None else step
        best = self.state.best_epoch
        kept = f" The weights of epoch {best} are in the checkpoint." if best else ""
        raise TrainingError(
            f"the {what} must be finite, got {value} in step {step} "
            f"(epoch {self.state.epoch + 1}).{kept} Try a lower lr than {self.config.lr:g}."
        )

    def _report(self) -> None:
        """Tell the listeners about the steps since the last report."""
        if not self.recent.losses:
            return
        losses, norms = self.recent.read()
        first = self.state.step - len(losses) + 1
        for i, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            self._check_finite("loss", loss, first + i)
            self._check_finite("gradient norm", norm, first + i)
        self._emit(
            "step",
            share=self._share(),
            loss=sum(losses) / len(losses),
            lr=self.optimizer.param_groups[0]["lr"],
            gradient_norm=max(norms),
            total_steps=self.total_steps,
            **self.recent.close(),
        )

    def _validate(self) -> bool:
        metrics = evaluate(self.model, self.validation).metrics
        self._check_finite("validation loss", metrics.loss)
        is_better = self._is_better(metrics)
        if is_better:
            self.state.best_epoch = self.state.epoch + 1
            self.best = {k: x.detach().clone() for k, x in self.model.state_dict().items()}
        self._emit(
            "validation",
            loss=metrics.loss,
            accuracy=metrics.accuracy,
            macro_f1=metrics.macro_f1,
            is_best=is_better,
        )
        self.recent.restart_clock()
        return is_better

    def _is_better(self, metrics: Metrics) -> bool:
        value = metrics.macro_f1 if self.config.monitor == "macro_f1" else -metrics.loss
        state = self.state
        if (value, -metrics.loss) <= (state.best_value, -state.best_loss):
            return False
        state.best_value, state.best_loss = value, metrics.loss
        return True

    def _save(self) -> None:
        self.saved = time.perf_counter()
        if self.folder is None:
            return
        state = dataclasses.replace(self.state, seconds=self._seconds())
        tensors = ck.together(
            model=self.model.state_dict(),
            best=self.best,
            optimizer=ck.optimizer_tensors(self.optimizer),
            random=ck.random_tensors(self.device),
        )
        about = {"state": dataclasses.asdict(state), "run": self._identity()}
        self.folder.mkdir(parents=True, exist_ok=True)
        ck.save_checkpoint(self.folder / ck.FILE, tensors, about)

    def restore(self) -> None:
        assert self.folder is not None
        path = self.folder / ck.FILE
        tensors, about = ck.load_checkpoint(path)
        for name, value in self._identity().items():
            old = about["run"].get(name)
            if old != value:
                rule = f"be {old}, as when the run was started"
                instead = "Give the same options, or begin anew with --overwrite."
                raise ck.CheckpointError(must(name, rule, value, instead))
        self.state = _State(**about["state"])
        ck.restore_model(self.model, ck.part(tensors, "model"), path)
        self.best = {k: x.to(self.device) for k, x in ck.part(tensors, "best").items()}
        ck.restore_optimizer(self.optimizer, ck.part(tensors, "optimizer"))
        ck.restore_random(ck.part(tensors, "random"), self.device)

    def _identity(self) -> dict[str, Any]:
        """Return what must not change between a run and its continuation."""
        rows = {"train_rows": len(self.train), "train_tokens": sum(self.lengths)}
        return {**self.config.to_dict(), **rows, "validation_rows": len(self.validation)}

    def _about(self) -> dict[str, Any]:
        return {
            "total_steps": self.total_steps,
            "train_rows": len(self.train),
            "validation_rows": len(self.validation),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "device": str(self.device),
            "precision": str(self.precision).removeprefix("torch."),
        }

    def _emit(self, event: str, **values: Any) -> None:
        own = {"event": event, "step": self.state.step, "epoch": self.state.epoch + 1}
        for listener in self.listeners:
            listener({**own, **values, "seconds": round(self._seconds(), 3)})

    def _result(self, reason: Reason) -> FitResult:
        state = self.state
        epochs = min(state.epoch + (state.position > 0), self.epochs)
        self._emit("end", reason=reason, best_epoch=state.best_epoch, tokens=state.tokens)
        return FitResult(
            reason=reason,
            steps=state.step,
            epochs=epochs,
            seconds=self._seconds(),
            tokens=state.tokens,
            best_epoch=state.best_epoch,
            config=self.config,
            history=self.history,
        )

    def _batches(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        return bucketed(self.lengths, max_tokens=self.batch_tokens, generator=generator)

    def _share(self, *, ahead: float = 0.0) -> float:
        """How much of the run is done: by steps, or by the clock where that is ahead."""
        by_steps = (self.state.step + ahead) / self.total_steps
        limit = self.config.max_seconds
        return min(by_steps if limit is None else max(by_steps, self._seconds() / limit), 1.0)

    def _seconds(self) -> float:
        return self.state.seconds + time.perf_counter() - self.started

    def _is_time_over(self) -> bool:
        limit = self.config.max_seconds
        return limit is not None and self._seconds() >= limit

    def _class_weights(self) -> Tensor | None:  # (c,)
        if self.config.class_weights == "none":
            return None
        n_classes = getattr(getattr(self.model, "config", None), "n_classes", None)
        labels = list(self.train.labels)
        return balanced_weights(labels, n_classes or max(labels) + 1).to(self.device)
