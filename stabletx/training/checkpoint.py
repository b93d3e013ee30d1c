"""Files that are either the old ones or the new ones, and the state of a run in one of them.

A checkpoint is one safetensors file: the tensors, and in its header the rest as JSON. Nothing is
pickled, so that nothing in it can be executed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stabletx._checks import must

FILE = "checkpoint.safetensors"
_HEADER = "stabletx"


class CheckpointError(ValueError):
    """A checkpoint that is damaged or belongs to another run."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file beside ``path``, bring it to the disk, and put it in the place of ``path``.

    A full disk or a kill at any moment leaves the old file whole.

    Raises:
        OSError: if the disk is full or the folder cannot be written.
    """
    new = path.with_name(f".{path.name}.new")  # one name: a kill leaves one file, not many
    try:
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def save_checkpoint(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write tensors and the JSON value ``about`` into one file.

    Raises:
        OSError: if the disk is full or the folder cannot be written.
    """
    from safetensors.torch import save

    own = {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()}
    write_atomically(path, save(own, metadata={_HEADER: json.dumps(about)}))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``save_checkpoint`` wrote.

    Raises:
        CheckpointError: if the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    instead = "Train anew with --overwrite."
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[_HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        got = f"{path} ({type(error).__name__}: {error})"
        raise CheckpointError(must("checkpoint", "be a whole file", got, instead)) from error
    return tensors, about


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's memory by ``<number of the parameter>.<name>``."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": x for i, own in state.items() for name, x in own.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what ``optimizer_tensors`` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, x in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = x
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_tensors(device: torch.device) -> dict[str, Tensor]:
    """Return the states of the generators that a step draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random(tensors: dict[str, Tensor], device: torch.device) -> None:
    """Put back what ``random_tensors`` returned."""
    torch.set_rng_state(tensors["cpu"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)


def restore_model(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load weights; say which file it was that does not fit."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        instead = "Resume with the options the run was started with."
        got = f"{path} ({' '.join(str(error).split())})"
        raise CheckpointError(must("checkpoint", "fit the model", got, instead)) from error


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose name begins with ``prefix.``, without it."""
    n = len(prefix) + 1
    return {name[n:]: x for name, x in tensors.items() if name.startswith(f"{prefix}.")}


def together(**parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join tensors under their prefixes; the reverse of ``part``."""
    return {f"{prefix}.{name}": x for prefix, own in parts.items() for name, x in own.items()}
