"""A checkpoint's folder: settings and tensors, read whole or not at all.

Nothing in a file is run: a pickle is read with ``weights_only=True``.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stabletx._checks import must
from stabletx.interop.checkpoints import _messages
from stabletx.models import _model_checks
from stabletx.models._storage import CONFIG, WEIGHTS

_PICKLE = "pytorch_model.bin"
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_AGAIN = "Copy or download it again."


def find_folder(source: str | Path, revision: str | None) -> Path:
    """Give the folder of a checkpoint; a hub id is downloaded, or found in the hub's own cache.

    Raises:
        FileNotFoundError: if it is neither a folder nor a hub id.
        ModuleNotFoundError: for a hub id without huggingface_hub.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source):
        raise FileNotFoundError(must("source", "be a folder or a hub id", repr(str(source))))
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_messages.no_hub(source)) from error
    wanted = [CONFIG, "model*.safetensors", f"{WEIGHTS}.index.json"]
    found = Path(snapshot_download(source, revision=revision, allow_patterns=wanted))
    if not list(found.glob("*.safetensors")):
        wanted = [CONFIG, "pytorch_model*.bin", f"{_PICKLE}.index.json"]
        found = Path(snapshot_download(source, revision=revision, allow_patterns=wanted))
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json``.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it does not hold an object.
    """
    path = folder / CONFIG
    if not path.is_file():
        instead = "A checkpoint is a folder with config.json and its weights."
        raise FileNotFoundError(_model_checks.no_such_file(folder, CONFIG, instead))
    return _read_object(path)


def read_tensors(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Read every tensor, from one file or the shards that an index lists; say from which file.

    Raises:
        FileNotFoundError: if there are no weights, or a shard is missing.
        ValueError: naming the file, if one is damaged, or is a pickle of more than tensors.
    """
    for name, read in ((WEIGHTS, _read_safetensors), (_PICKLE, _read_pickle)):
        path = folder / name
        if path.is_file():
            return path, read(path)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return index, _read_shards(index, read)
    wanted = f"{WEIGHTS}, {_PICKLE}, or shards with an index"
    instead = "A checkpoint is a folder with config.json and its weights."
    raise FileNotFoundError(_model_checks.no_such_file(folder, wanted, instead))


def _read_shards(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    where = _read_object(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(x, str) for x in where.values()):
        raise ValueError(_model_checks.bad_file(index, "it has no weight_map of names", _AGAIN))
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        _messages.check_inside(index, name)
        path = index.parent / name
        if not path.is_file():
            raise FileNotFoundError(_model_checks.no_such_file(index.parent, name, _AGAIN))
        tensors |= {key: x for key, x in read(path).items() if where.get(key, name) == name}
    if lacking := sorted(set(where) - set(tensors)):
        raise ValueError(_model_checks.bad_file(index, f"no shard holds {lacking[0]}", _AGAIN))
    return tensors


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(_model_checks.bad_file(path, error, _AGAIN)) from error
    if not isinstance(values, dict):
        what = f"it holds a {type(values).__name__}, not an object"
        raise ValueError(_model_checks.bad_file(path, what, _AGAIN))
    return values


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(_model_checks.bad_file(path, error, _AGAIN)) from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message goes before the reason, and advises to run the file.
        reason = error.__context__ or error
        raise ValueError(_messages.unsafe_pickle(path, reason)) from error
    except Exception as error:  # bytes that are no pickle stop its machine in any way
        said = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(_model_checks.bad_file(path, said, _AGAIN)) from error
    if not isinstance(held, dict) or not all(map(_is_named_tensor, held.items())):
        what = "a " + type(held).__name__ + " that holds more than dense tensors by name"
        raise ValueError(_messages.unsafe_pickle(path, what))
    return dict(held)


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    name, x = item
    whole = isinstance(x, Tensor) and x.layout == torch.strided and not x.is_meta
    return whole and isinstance(name, str)
