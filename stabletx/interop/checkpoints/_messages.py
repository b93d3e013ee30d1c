"""Checks of checkpoints, with the messages they give."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from stabletx._checks import must

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_rows(name: str, x: Tensor, n_rows: int | None, row: torch.Size) -> None:
    """Refuse a single number, and a part that is not as long or as wide as its place."""
    shape = f"a tensor of shape {tuple(x.shape)}"
    instead = "Does config.json beside it describe these weights?"
    if x.ndim == 0:
        raise ValueError(must(name, "have rows", shape, instead))
    if n_rows is not None and x.shape[0] != n_rows:
        raise ValueError(must(name, f"have {n_rows} rows, as config.json says", shape, instead))
    if x.shape[1:] != row:
        rule = f"have rows of shape {tuple(row)}, as those it is joined to"
        raise ValueError(must(name, rule, shape, instead))


def refuse_untied(name: str, main: str) -> NoReturn:
    """Refuse two tensors that the configuration calls one."""
    instead = "Set tie_word_embeddings to false in config.json if they are meant to be two."
    raise ValueError(must(name, f"equal {main}, as config.json ties them", "other values", instead))


def unsuitable(path: object, error: Exception) -> str:
    """Say that a configuration does not describe what can be loaded, and what is wrong in it."""
    return f"{path} must describe a model that can be loaded, got: {error}"


def needed(config: Mapping[str, Any], key: str) -> Any:
    """Give a setting; refuse its absence."""
    if key not in config:
        instead = "Is it the config.json of this model?"
        raise ValueError(must("config.json", f"have the key {key!r}", "none", instead))
    return config[key]


def refuse_setting(key: str, value: object, rule: str) -> NoReturn:
    """Refuse a setting that our models cannot express."""
    instead = "No other setting of it is supported."
    raise ValueError(must(f"config.json's {key}", rule, repr(value), instead))


def check_object(key: str, value: object) -> None:
    """Refuse a setting that is neither an object of settings nor null."""
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(must(f"config.json's {key}", "be an object", repr(value)))


def check_setting(config: Mapping[str, Any], key: str, allowed: Collection[object]) -> None:
    """Refuse a setting, where there is one, that our models cannot express."""
    if key in config and config[key] not in allowed:
        listed = " or ".join(map(repr, allowed))
        refuse_setting(key, config[key], f"be {listed}")


def check_n_layers(config: Mapping[str, Any], n_tensors: int) -> None:
    """Refuse more layers than there are tensors, before the names of all are written."""
    layers = {"num_hidden_groups"} if "num_hidden_groups" in config else {"num_hidden_layers"}
    layers |= {"n_layer", "n_layers", "num_layers", "num_decoder_layers"}
    for key in layers | {"encoder_layers", "decoder_layers"}:
        value = config.get(key)
        if isinstance(value, int) and value > max(1, n_tensors):
            rule = f"be at most the number of tensors in the weights, {n_tensors}"
            raise ValueError(must(f"config.json's {key}", rule, value))


def check_family(family: object, supported: Collection[str]) -> None:
    """Refuse a family that cannot be loaded."""
    if family == "stabletx":
        instead = "Read it with from_pretrained of its class."
        raise ValueError(must("model_type", "be another library's", repr(family), instead))
    if not isinstance(family, str) or family not in supported:
        listed = ", ".join(repr(name) for name in sorted(supported))
        instead = "Pass family= where config.json names none." if family is None else ""
        raise ValueError(must("model_type", f"be one of {listed}", repr(family), instead))


def refuse_architecture(family: str, architecture: object, supported: Collection[str]) -> NoReturn:
    """Refuse a head that our models do not have, or what names none."""
    rule = f"be one of {', '.join(supported)} for {family}"
    instead = "Pass model=stabletx.Encoder to leave its head out, with ignore= for its names."
    raise ValueError(must("architectures", rule, repr(architecture), instead))


def refuse_model(family: str, model: object, supported: Collection[type]) -> NoReturn:
    """Refuse a class that a family's weights do not fill."""
    listed = ", ".join(kind.__name__ for kind in supported)
    got = model.__name__ if isinstance(model, type) else "an instance"
    raise ValueError(must("model", f"be one of {listed} for {family}", got))


def check_names(argument: str, names: object) -> None:
    """Refuse one string, whose letters would be taken for names."""
    if isinstance(names, str) or not isinstance(names, Collection):
        raise TypeError(must(argument, "be a list of names", repr(names)))


def check_labels(labels: object, model: object, kind: type) -> None:
    """Refuse names of classes that have no order, and those for a model that has no classes."""
    if not isinstance(labels, Sequence) or isinstance(labels, str):
        raise TypeError(must("labels", "be a list or tuple of different texts", repr(labels)))
    if not all(isinstance(x, str) for x in labels):
        raise TypeError(must("labels", "be a list or tuple of different texts", repr(labels)))
    if len(set(labels)) != len(labels) or not labels:
        raise ValueError(must("labels", "be a list or tuple of different texts", repr(labels)))
    if model not in (None, kind):
        rule = f"be None beside model={getattr(model, '__name__', model)}"
        raise ValueError(must("labels", rule, "names of classes"))


def check_dtype(dtype: object) -> None:
    """Refuse a dtype that no model of ours computes in."""
    if dtype is not None and dtype not in DTYPES:
        listed = ", ".join(map(str, DTYPES))
        raise TypeError(must("dtype", f"be None or one of {listed}", repr(dtype)))


def check_dtypes(path: object, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Refuse tensors that are not weights, and a mixture of dtypes unless one is asked for."""
    for name, x in tensors.items():
        if x.dtype not in DTYPES:
            instead = "Quantised weights are not supported."
            rule = "hold float32, float64, float16 or bfloat16"
            raise TypeError(must(name, rule, f"{x.dtype} in {path}", instead))
    found = sorted({str(x.dtype) for x in tensors.values()})
    if dtype is None and len(found) > 1:
        instead = "Pass dtype=torch.float32, or another, to bring all to one."
        raise TypeError(must("the weights", "have one dtype", ", ".join(found), instead))


def refuse_missing(path: object, names: Collection[str], *, only_heads: bool) -> NoReturn:
    """Refuse weights that lack tensors of the model."""
    instead = "Does config.json beside it describe these weights?"
    if only_heads:
        instead += " Pass model=stabletx.Encoder for the encoder without its head."
    raise ValueError(
        f"{path} must hold all tensors of the model, got none for {_some(names)}. {instead}"
    )


def refuse_unexpected(path: object, names: Collection[str]) -> NoReturn:
    """Refuse weights with tensors that nothing is known of."""
    instead = "Nothing is left out in silence: pass their names as ignore=."
    raise ValueError(f"{path} must hold no unknown tensors, got {_some(names)}. {instead}")


def _some(names: Collection[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(sorted(names)[:5]) + more


def unsafe_pickle(path: object, why: object) -> str:
    """Say that a pickle would do more than hold tensors."""
    line = str(why).strip().splitlines()[0] if str(why).strip() else type(why).__name__
    instead = "Nothing in it was run. Convert it to safetensors where it is trusted."
    return must(str(path), "be a whole pickle of tensors alone", line, instead)


def no_hub(source: str) -> str:
    """Say what is needed to read from the hub."""
    instead = "Pass an existing folder, or install huggingface_hub to read a hub id."
    return must("source", "be a folder", repr(source), instead)


def check_inside(path: object, name: str) -> None:
    """Refuse a shard that is not a plain file beside the index."""
    if "/" in name or "\\" in name or name in ("", ".", ".."):
        raise ValueError(must(str(path), "name files beside it", repr(name)))


def cannot_save(families: Collection[str], why: str) -> str:
    """Say that no family of Hugging Face expresses a model."""
    return must(
        "model",
        f"be what one of {', '.join(families)} can express",
        why,
        "Write it with save_pretrained instead.",
    )
