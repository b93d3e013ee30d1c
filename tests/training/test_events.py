import io
import json

import pytest

from stabletx.training.events import JsonLinesLog, TensorBoardLog, read_log
from stabletx.training.progress import PlainLines, clock, progress, time_left


def step(n, **more):
    return {
        "event": "step", "step": n, "epoch": 1, "seconds": 2.0 * n, "share": n / 10, "loss": 1 / n,
        "accuracy": 0.5, "lr": 0.1, "gradient_norm": 1.0, "tokens_per_second": 12_345, **more,
    }  # fmt: skip


def start(n):
    return {"event": "start", "step": n, "epoch": 1, "seconds": 0.0}


ROUND = {"event": "validation", "step": 4, "epoch": 1, "seconds": 75.0, "loss": 0.5,
         "accuracy": 0.75, "macro_f1": 0.7, "is_best": True}  # fmt: skip


def test_log_reads_back_what_was_written(tmp_path):
    log = JsonLinesLog(tmp_path / "log.jsonl")
    events = [start(0), step(1), step(2), ROUND]
    for event in events:
        log(event)
    assert read_log(log.path) == events


def test_log_begins_anew_when_a_run_does(tmp_path):
    log = JsonLinesLog(tmp_path / "log.jsonl")
    for event in (start(0), step(1), start(0), step(1, loss=7.0)):
        log(event)
    assert read_log(log.path) == [start(0), step(1, loss=7.0)]


def test_log_drops_the_steps_that_a_resumed_run_does_again(tmp_path):
    log = JsonLinesLog(tmp_path / "log.jsonl")
    for event in (start(0), step(1), step(2), step(3)):
        log(event)
    with log.path.open("a") as file:
        file.write('{"event": "step", "st')  # cut short by a kill
    for event in (start(1), step(2, loss=7.0)):
        log(event)
    assert read_log(log.path) == [start(0), step(1), step(2, loss=7.0)]


def test_log_of_no_run_is_empty(tmp_path):
    assert read_log(tmp_path / "log.jsonl") == []


def test_tensorboard_log_holds_the_numbers(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = TensorBoardLog(tmp_path)
    for event in (step(1), step(2), {**ROUND}, {"event": "end", "step": 4, "epoch": 1}):
        log(event)
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("step/loss")] == [(1, 1.0), (2, 0.5)]
    assert [(e.step, e.value) for e in read.Scalars("validation/accuracy")] == [(4, 0.75)]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0:00"), (59.7, "1:00"), (3599.6, "1:00:00"), (-3.0, "0:00")]
)
def test_clock_rounds_to_whole_seconds(seconds, text):
    assert clock(seconds) == text


def test_time_left_goes_by_the_share_done():
    assert time_left(step(4)) == 8.0 * (1 - 0.4) / 0.4


def test_plain_lines_show_validations_and_steps_now_and_then(monkeypatch):
    stream, now = io.StringIO(), iter([0.0, 1.0, 6.0, 7.0, 8.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    with progress(stream) as line:
        assert isinstance(line, PlainLines)
        for event in (step(1), step(2), step(3), ROUND):
            line(event)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0] == "epoch 1   20%  loss 0.500  accuracy 0.500  12.3k tokens/s  0:16 left"
    assert lines[1].startswith("epoch 1 done after 1:15: validation loss 0.500")


def test_live_line_shows_loss_accuracy_rate_and_time_left_on_a_terminal():
    pytest.importorskip("rich", reason="needs rich")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with progress(stream) as line:
        for event in (step(1), step(2), ROUND, step(5)):
            line(event)
    shown = stream.getvalue()
    for word in ("loss", "accuracy", "12.3k", "tokens/s", "left", "validation loss 0.500"):
        assert word in shown


def test_events_are_json():
    json.dumps([start(0), step(1), ROUND], allow_nan=False)
