"""Small helpers by which families write down names and settings."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from stabletx.interop.checkpoints import _messages
from stabletx.interop.checkpoints._conversion import Change, Piece
from stabletx.models.config import TransformerConfig

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_GATED = {"gelu": "geglu", "gelu_tanh": "geglu_tanh", "silu": "swiglu"}


def activation(key: str, value: object, *, is_gated: bool = False) -> str:
    """Translate the name of an activation."""
    known = {a: _GATED[b] for a, b in _ACTIVATIONS.items() if b in _GATED}
    known = known if is_gated else _ACTIVATIONS
    if not isinstance(value, str) or value not in known:
        _messages.refuse_setting(key, value, f"be one of {', '.join(known)}")
    return known[value]


def settings(config: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """Read the sizes of ours that a family only names otherwise."""
    return {ours: size(theirs, _messages.needed(config, theirs)) for ours, theirs in keys.items()}


def size(key: str, value: object, *, least: int = 1) -> int:
    """Give a setting that counts something; refuse what is no such number."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        _messages.refuse_setting(key, value, f"be an int of at least {least}")
    return value


def class_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read a classifier's labels; where they are no names, their number."""
    labels = config.get("id2label")
    _messages.check_object("id2label", labels)
    if not labels or len(labels) != config.get("num_labels", len(labels)):
        return {"n_classes": config.get("num_labels", 2)}
    numbers = {str(i) for i in range(len(labels))}
    if {str(key) for key in labels} != numbers:
        rule = f"number its classes from 0 to {len(labels) - 1}"
        _messages.refuse_setting("id2label", labels, rule)
    names = tuple(str(labels[key]) for key in sorted(labels, key=int))
    return {"labels": names} if len(set(names)) == len(names) else {"n_classes": len(names)}


def first_set(config: Mapping[str, Any], *keys: str, default: Any = None) -> Any:
    """Give the first of some settings that is there and not null."""
    return next((config[key] for key in keys if config.get(key) is not None), default)


def prefix_of(prefix: str, names: Collection[str]) -> str:
    """Tell whether a file's names have the prefix that a model with a head gives its body."""
    return prefix if any(name.startswith(prefix) for name in names) else ""


def pair(
    ours: str, theirs: str, *, bias: bool = True, change: Change | None = None
) -> Iterator[Piece]:
    """Name a weight and its bias; only a weight changes shape."""
    yield Piece(f"{ours}.weight", (f"{theirs}.weight",), change=change)
    if bias:
        yield Piece(f"{ours}.bias", (f"{theirs}.bias",))


def joined(
    ours: str, theirs: Collection[str], sizes: Collection[int], *, bias: bool
) -> Iterator[Piece]:
    """Name linear maps whose rows we keep in one."""
    for part in ("weight", "bias") if bias else ("weight",):
        names = tuple(f"{name}.{part}" for name in theirs)
        yield Piece(f"{ours}.{part}", names, tuple(sizes))


def head_sizes(config: TransformerConfig) -> tuple[int, int, int]:
    """Give the rows of the query, key and value projections."""
    n_kv_heads = config.n_heads if config.n_kv_heads is None else config.n_kv_heads
    return tuple(n * config.head_dim for n in (config.n_heads, n_kv_heads, n_kv_heads))  # type: ignore[return-value]


def rotary_base(config: Mapping[str, Any], kind: str = "", old: str = "rope_theta") -> float:
    """Read the rotary base, in the new form of the settings or the old; refuse scaled phases."""
    for key in ("rope_parameters", "rope_scaling"):
        _messages.check_object(key, config.get(key))
    found = config.get("rope_parameters") or {}
    found = found.get(kind, found) if kind else found
    _messages.check_object(kind, found)
    scaled = found or config.get("rope_scaling") or {}
    rope_type = scaled.get("rope_type", scaled.get("type", "default"))
    if rope_type != "default":
        _messages.refuse_setting("rope_type", rope_type, "be 'default'")
    _messages.check_setting(scaled, "partial_rotary_factor", (1.0,))
    return float(first_set(found, "rope_theta", default=config.get(old) or 10000.0))
