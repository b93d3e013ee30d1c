"""Models in folders: ``config.json`` and ``model.safetensors``, written whole or not at all.

Nothing pickled is ever read. Only these two names are opened, inside the folder that was given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from stabletx.models import _model_checks
from stabletx.models.config import TransformerConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_PICKLED = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_ABOUT = ("model_type", "architectures", "stabletx_version")


class StoredModel(nn.Module):
    """Give a model its configuration, and a way into a folder and out of it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        _model_checks.check_kind("config", config, TransformerConfig)
        self.config = config

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model to a folder, which is made if need be.

        Both files are written beside the old ones before either takes its place, so that a full
        disk leaves the old model whole.

        Raises:
            OSError: if the folder cannot be written.
        """
        from safetensors.torch import save_file

        from stabletx import __version__

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        tensors = {name: x.detach().contiguous() for name, x in own_state(self).items()}
        about = ("stabletx", [type(self).__name__], __version__)
        config = {**dict(zip(_ABOUT, about, strict=True)), **self.config.to_dict()}
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        replace_files(
            {
                path / WEIGHTS: lambda new: save_file(tensors, new, metadata={"format": "pt"}),
                path / CONFIG: lambda new: new.write_text(text, encoding="utf-8"),
            }
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a model from a folder that :meth:`save_pretrained` wrote, on the CPU, in eval mode.

        Raises:
            FileNotFoundError: if the folder or one of its two files is not there.
            ValueError: naming the file, if one is damaged, describes another kind of model or
                does not fit the other; or if there are pickled weights alone.
        """
        path = Path(folder)
        config = _read_config(path, cls.__name__)
        tensors = _read_weights(path)
        with torch.device("meta"):
            model = cls(config)
        check_fit(path / WEIGHTS, tensors, own_state(model))
        model.load_state_dict(tensors, assign=True, strict=False)  # a shared tensor has one name
        return model.eval()


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """Give every tensor of a model once: one that two parts share, under its first name."""
    names: dict[int, str] = {}
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    for name, x in state.items():
        names.setdefault(id(x), name)
    return {name: x for name, x in state.items() if names[id(x)] == name}


def replace_files(files: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write files beside their paths, bring all to the disk, then put each in its path's place."""
    beside = {path: path.with_name(f".{path.name}.{os.getpid()}.new") for path in files}
    try:
        for path, write in files.items():
            new = beside[path]
            new.touch()
            mode = new.stat().st_mode  # what the umask says; a writer may make a file of its own
            write(new)
            new.chmod(mode)
            _to_disk(new)
        for path, new in beside.items():
            os.replace(new, path)
    finally:
        for new in beside.values():
            new.unlink(missing_ok=True)
    if os.name == "posix":
        for folder in {path.parent for path in files}:
            _to_disk(folder)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_config(folder: Path, architecture: str) -> TransformerConfig:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(_model_checks.no_such_file(folder, CONFIG, ""))
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}, not an object")
        about = {name: values.pop(name, None) for name in _ABOUT}
        if about["model_type"] != "stabletx":
            what = f"its model_type is {about['model_type']!r}, not 'stabletx'"
            raise ValueError(f"{what}, so stabletx.interop.checkpoints.load may read it")
        if about["architectures"] != [architecture]:
            raise ValueError(f"it describes {about['architectures']}, not [{architecture!r}]")
        return TransformerConfig.from_dict(values)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(_model_checks.bad_file(path, error, "Save the model again.")) from error


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLED)
        if pickled:
            raise ValueError(_model_checks.pickled_weights(folder, pickled[0]))
        raise FileNotFoundError(_model_checks.no_such_file(folder, WEIGHTS, ""))
    try:
        # Copied out of the file's mapping: aligned memory, so that a reload gives the same bits.
        return {name: x.clone() for name, x in load_file(path).items()}
    except SafetensorError as error:
        again = "Save or copy the model again."
        raise ValueError(_model_checks.bad_file(path, error, again)) from error


def check_fit(path: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Name every tensor that is missing, not expected or of another shape."""
    faults = [f"missing {name}" for name in wanted if name not in found]
    faults += [f"unexpected {name}" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        a, b = tuple(found[name].shape), tuple(wanted[name].shape)
        if a != b:
            faults.append(f"{name} of shape {a} instead of {b}")
        elif not found[name].is_floating_point():
            faults.append(f"{name} of dtype {found[name].dtype}")
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        what = "; ".join(sorted(faults)[:5]) + more
        again = f"Does {CONFIG} beside it describe these weights?"
        raise ValueError(_model_checks.bad_file(path, what, again))
