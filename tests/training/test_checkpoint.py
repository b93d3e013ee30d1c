import errno
import os
import signal
import subprocess
import sys

import pytest
import torch

from stabletx.training import checkpoint as ck


def test_checkpoint_gives_back_every_bit(tmp_path):
    tensors = {
        "a": torch.tensor([float("nan"), -0.0, 1e-45]),
        "b": torch.arange(6, dtype=torch.uint8).view(2, 3).t(),
        "c": torch.tensor(3.0, dtype=torch.bfloat16),
    }
    ck.save_checkpoint(tmp_path / ck.FILE, tensors, {"step": 3, "best": float("-inf")})
    read, about = ck.load_checkpoint(tmp_path / ck.FILE)
    assert about == {"step": 3, "best": float("-inf")}
    for name, x in tensors.items():
        assert read[name].dtype == x.dtype
        assert read[name].shape == x.shape
        same = read[name].contiguous().view(-1).view(torch.uint8)
        assert torch.equal(same, x.contiguous().view(-1).view(torch.uint8))


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_old_file_survives_when_the_disk_is_full(tmp_path, monkeypatch, fails):
    path = tmp_path / ck.FILE
    ck.write_atomically(path, b"old")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if fails == "write":
        monkeypatch.setattr(type(path), "open", full)
    else:
        monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="No space left"):
        ck.write_atomically(path, b"new and longer")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_old_file_survives_when_the_process_is_killed_in_mid_save(tmp_path):
    path = tmp_path / ck.FILE
    ck.save_checkpoint(path, {"x": torch.zeros(1000)}, {"step": 1})
    code = (
        "import os, signal, sys, torch; from pathlib import Path\n"
        "from stabletx.training import checkpoint as ck\n"
        "os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)\n"
        "ck.save_checkpoint(Path(sys.argv[1]), {'x': torch.ones(1000)}, {'step': 2})\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    tensors, about = ck.load_checkpoint(path)
    assert about == {"step": 1}
    assert torch.equal(tensors["x"], torch.zeros(1000))
    ck.save_checkpoint(path, tensors, {"step": 3})
    assert list(tmp_path.iterdir()) == [path]  # what the kill left beside it is gone


@pytest.mark.parametrize("n_bytes", [0, 4, 60, 5000])
def test_damaged_checkpoint_is_named(tmp_path, n_bytes):
    path = tmp_path / ck.FILE
    ck.save_checkpoint(path, {"x": torch.zeros(2000)}, {"step": 1})
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(ck.CheckpointError, match=rf"got checkpoint=.*{ck.FILE}"):
        ck.load_checkpoint(path)


def test_pickled_checkpoint_is_not_executed(tmp_path):
    path = tmp_path / ck.FILE
    torch.save({"x": torch.zeros(2)}, path)
    with pytest.raises(ck.CheckpointError, match="got checkpoint="):
        ck.load_checkpoint(path)


def test_optimizer_goes_on_as_if_it_had_not_stopped(tmp_path):
    def step(x, optimizer):
        (x * torch.tensor([1.0, -2.0])).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def fresh(values):
        x = torch.nn.Parameter(torch.tensor(values))
        return x, torch.optim.AdamW([x], lr=0.1, fused=True)

    a, first = fresh([1.0, 2.0])
    for _ in range(3):
        step(a, first)
    b, second = fresh(a.tolist())
    path = tmp_path / ck.FILE
    ck.save_checkpoint(path, ck.optimizer_tensors(first), {})
    ck.restore_optimizer(second, ck.load_checkpoint(path)[0])
    step(a, first)
    step(b, second)
    assert torch.equal(a, b)
