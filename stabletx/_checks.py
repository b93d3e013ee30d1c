"""Argument checks. Every message that a user can meet is built here.

A message names the argument, the rule, the value that broke it and the way out. Checks read
shapes, dtypes and devices, never tensor values: reading a value makes a GPU wait.
"""

import math
from collections.abc import Collection

import torch
from torch import Tensor


def must(argument: str, rule: str, value: object, instead: str = "") -> str:
    """Build the one form that every message has."""
    tail = f" {instead}" if instead else ""
    return f"{argument} must {rule}, got {argument}={value}.{tail}"


def check_tensor(argument: str, value: object) -> None:
    """Refuse anything but a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(
            must(argument, "be a torch.Tensor", type(value).__name__, "Use torch.as_tensor.")
        )


def check_float(argument: str, value: Tensor) -> None:
    """Refuse a tensor that is not floating point."""
    check_tensor(argument, value)
    if not value.is_floating_point():
        raise TypeError(must(argument, "have a floating-point dtype", value.dtype))


def check_bool(argument: str, value: Tensor, instead: str = "") -> None:
    """Refuse a tensor that is not boolean."""
    check_tensor(argument, value)
    if value.dtype != torch.bool:
        instead = instead or f"Where a non-zero entry means True, pass {argument}.bool()."
        raise TypeError(must(argument, "be boolean (True = may attend)", value.dtype, instead))


def check_axes(argument: str, value: Tensor, axes: str, instead: str = "") -> None:
    """Refuse a tensor whose number of axes is not that of ``axes``, such as ``"b h t d"``."""
    check_tensor(argument, value)
    if value.ndim != len(axes.split()):
        rule = f"have {len(axes.split())} axes ({', '.join(axes.split())})"
        raise ValueError(must(argument, rule, f"a tensor of shape {tuple(value.shape)}", instead))


def check_positive(argument: str, value: int) -> None:
    """Refuse anything but an int above zero."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(must(argument, "be an int", repr(value)))
    if value <= 0:
        raise ValueError(must(argument, "be positive", value))


def check_divides(part: str, n_part: int, whole: str, n_whole: int) -> None:
    """Refuse a part that does not divide the whole."""
    if n_part <= 0 or n_whole % n_part:
        raise ValueError(f"{part} must divide {whole}, got {part}={n_part} and {whole}={n_whole}.")


def check_probability(argument: str, value: float) -> None:
    """Refuse a number outside [0, 1), NaN included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(must(argument, "be a number", repr(value)))
    if not 0.0 <= value < 1.0:
        raise ValueError(must(argument, "be in [0, 1)", value))


def check_finite_number(argument: str, value: float) -> None:
    """Refuse a number that is NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(must(argument, "be a number", repr(value)))
    if not math.isfinite(value):
        raise ValueError(must(argument, "be finite", value))


def check_one_of(argument: str, value: object, choices: Collection[str]) -> None:
    """Refuse a value that is not among the choices."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(must(argument, f"be one of {listed}", repr(value)))
