"""Argument checks. Every message that a user can meet is built here.

A message names the argument, the rule, the value that broke it and the way out. Checks read
shapes, dtypes and devices, never tensor values: reading a value makes a GPU wait.
"""

import math
from collections.abc import Collection, Mapping

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


def check_integers(argument: str, value: Tensor) -> None:
    """Refuse a tensor that does not hold integers; bool does not count as one."""
    check_tensor(argument, value)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(must(argument, "hold integers", value.dtype))


def check_zeros_and_ones(argument: str, value: Tensor) -> None:
    """Refuse a tensor of numbers that lies on the CPU and holds others than 0 and 1."""
    if not bool(((value == 0) | (value == 1)).all()):
        instead = "1 = a real token. Of an additive mask pass attention_mask == 0."
        raise ValueError(must(argument, "hold 0 and 1 or be boolean", "other values", instead))


def check_offset(offset: object) -> None:
    """Refuse an offset that is neither None, an int nor an integer tensor (b,)."""
    if offset is None or (isinstance(offset, int) and not isinstance(offset, bool)):
        return
    if not isinstance(offset, Tensor):
        raise TypeError(must("offset", "be None, an int or an integer tensor (b,)", repr(offset)))
    check_integers("offset", offset)
    check_axes("offset", offset, "b", "Pass one offset per batch row.")


def check_width(argument: str, value: object) -> None:
    """Refuse a window width that is neither None nor an int of at least zero."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(must(argument, "be None or an int", repr(value)))
    if value < 0:
        raise ValueError(must(argument, "be at least 0", value, "None means no limit."))


def check_allowed(argument: str, value: Tensor) -> None:
    """Refuse a mask of pairs that is not boolean with four axes."""
    check_tensor(argument, value)
    if value.is_floating_point():
        instead = "A float mask is a bias: pass it as bias=, where -inf blocks."
        raise TypeError(must(argument, "be boolean (True = may attend)", value.dtype, instead))
    check_bool(argument, value)
    instead = (
        "(b, s) and (t, s) look alike: use Mask.padding(keep) for (b, s), "
        f"{argument}[None, None] for (t, s)."
    )
    check_axes(argument, value, "b h t s", instead)


def check_same_batch(first: str, a: Tensor, second: str, b: Tensor) -> None:
    """Refuse two tensors whose first axes differ."""
    if a.shape[0] != b.shape[0]:
        raise ValueError(
            f"{first} and {second} must have the same batch size, got "
            f"{first}={tuple(a.shape)} and {second}={tuple(b.shape)}."
        )


def check_heads_given(n_heads: int | None, n_rows: int) -> None:
    """Refuse to split the rows of an ``attn_mask`` without a number of heads that divides them."""
    if n_heads is None:
        raise ValueError(
            must("n_heads", "be given with an attn_mask of three axes (b * h, t, s)", None)
        )
    check_positive("n_heads", n_heads)
    check_divides("n_heads", n_heads, "attn_mask.shape[0]", n_rows)


def check_is_mask(
    argument: str,
    value: object,
    kind: type,
    instead: str = "Wrap a boolean tensor of 4 axes in Mask.dense first.",
) -> None:
    """Refuse anything but a mask."""
    if not isinstance(value, kind):
        raise TypeError(must(argument, "be a Mask", type(value).__name__, instead))


def check_not_longer(n_queries: int, n_keys: int) -> None:
    """Refuse to align the last query with the last key where there are more queries."""
    if n_queries > n_keys:
        raise ValueError(
            f"n_queries must be at most n_keys where offset is None, got n_queries={n_queries} "
            f"and n_keys={n_keys}. Pass offset=0 to align the first query with the first key."
        )


def check_mask_width(argument: str, width: int, what: str, n: int) -> None:
    """Refuse a mask whose own length is not the number of queries or keys."""
    if width != n:
        raise ValueError(must(argument, f"cover the {n} {what}", f"a mask over {width}"))


def check_same(what: str, first: str, a: object, second: str, b: object) -> None:
    """Refuse two arguments that differ in ``what``, such as their dtype."""
    if a != b:
        raise (TypeError if what == "dtype" else ValueError)(
            f"{first} must have the {what} of {second}, got {first} with {a} and {second} with {b}."
        )


def check_mask_fits(
    sizes: tuple[int | None, int | None],
    shape: tuple[int, int, int, int],
    devices: Collection[torch.device],
    device: torch.device,
) -> None:
    """Refuse a mask whose own batch size, heads or device are not those of the attention."""
    for what, size, n in (("batch size", sizes[0], shape[0]), ("heads", sizes[1], shape[1])):
        if size is not None and size not in (1, n):
            raise ValueError(must("mask", f"have {what} 1 or {n}", f"a mask with {what} {size}"))
    for other in devices:
        if other != device:
            raise ValueError(must("mask", f"be on {device}", f"a mask on {other}"))


def check_bias(bias: Tensor, shape: tuple[int, int, int, int], q: Tensor) -> None:
    """Refuse a bias that is not a float of four axes, each full or 1."""
    check_tensor("bias", bias)
    if not bias.is_floating_point():
        instead = "A boolean belongs in mask=."
        raise TypeError(must("bias", "have a floating-point dtype", bias.dtype, instead))
    check_axes("bias", bias, "b h t s", "Add axes of size 1.")
    for own, full in zip(bias.shape, shape, strict=True):
        if own not in (1, full):
            rule = f"have each axis full or 1 for the scores' shape {shape}"
            raise ValueError(must("bias", rule, f"a tensor of shape {tuple(bias.shape)}"))
    check_same("device", "bias", bias.device, "q", q.device)


def check_sinks(sinks: Tensor, n_heads: int, q: Tensor) -> None:
    """Refuse sinks that are not one float per query head."""
    check_float("sinks", sinks)
    if tuple(sinks.shape) != (n_heads,):
        shape = tuple(sinks.shape)
        raise ValueError(must("sinks", f"have shape ({n_heads},)", f"a tensor of shape {shape}"))
    check_same("device", "sinks", sinks.device, "q", q.device)


def check_softcap(value: float) -> None:
    """Refuse a soft-cap that is not a positive finite number."""
    check_finite_number("softcap", value)
    if value <= 0:
        raise ValueError(must("softcap", "be positive", value, "Pass None for no soft-cap."))


def check_training_given(dropout_p: float, training: bool | None) -> None:
    """Refuse dropout that does not say whether the model is training."""
    if dropout_p > 0 and training is None:
        raise ValueError(
            must(
                "training",
                "be True or False where dropout_p > 0",
                training,
                "Pass training=self.training.",
            )
        )
    if training is not None and not isinstance(training, bool):
        raise TypeError(must("training", "be None, True or False", repr(training)))


def check_joinable(what: str, a: int | None, b: int | None) -> None:
    """Refuse to join two masks whose batch sizes or heads do not fit each other."""
    if a not in (None, 1, b) and b not in (None, 1):
        raise ValueError(must("other", f"have {what} 1 or {a}", f"a mask with {what} {b}"))


def check_no_dropout(dropout_p: float) -> None:
    """Refuse a second derivative through dropout, whose draw only the first pass knows."""
    if dropout_p > 0:
        raise RuntimeError(
            must(
                "dropout_p",
                "be 0 where a derivative beyond the first is taken",
                dropout_p,
                'Pass method="exact", which keeps its draw.',
            )
        )


def check_method_can(method: str, obstacle: str) -> None:
    """Refuse a method for a problem that it cannot express."""
    if obstacle:
        raise ValueError(
            f"method must be able to express the problem, got method={method!r} with {obstacle}. "
            'Pass method="exact", or "auto" to have one picked.'
        )


def check_huge(argument: str, rule: str, value: object, *, broken: bool) -> None:
    """Refuse what nothing computes where float64 inputs exceed 2**250."""
    if broken:
        rule = f"{rule} where float64 inputs exceed 2**250"
        raise RuntimeError(must(argument, rule, value, "Scale the inputs down."))


def check_lengths(lengths: Tensor, tokens: Tensor) -> None:
    """Refuse lengths that do not divide up the tokens; they live on the CPU and are read."""
    if lengths.device.type != "cpu":
        raise ValueError(
            must("lengths", "be on the CPU", f"a tensor on {lengths.device}", "Use .cpu() once.")
        )
    lengths = lengths.long()  # torch cannot reduce every kind of integer
    if lengths.numel() and int(lengths.min()) < 0:
        raise ValueError(must("lengths", "be at least 0", int(lengths.min())))
    n_tokens = tokens.shape[0] if tokens.ndim else 0
    if tokens.ndim == 0 or int(lengths.sum()) != n_tokens:
        raise ValueError(
            must(
                "lengths",
                f"sum to the number of tokens, {n_tokens}",
                f"lengths with sum {int(lengths.sum())}",
                "Leave padding out of tokens.",
            )
        )


def check_serves_every_sequence(argument: str, value: Tensor) -> None:
    """Refuse, beside a packed batch, a tensor with a batch axis of its own."""
    if value.shape[0] != 1:
        shape = f"a tensor of shape {tuple(value.shape)}"
        instead = "Every sequence of a packed batch takes the same."
        raise ValueError(must(argument, "have a first axis of size 1 beside plan", shape, instead))


def check_all_none(values: Mapping[str, object], beside: str, why: str) -> None:
    """Refuse arguments that another one excludes."""
    for name, value in values.items():
        if value is not None:
            raise ValueError(must(name, f"be None beside {beside}", type(value).__name__, why))


def check_dim(dim: int, x: Tensor) -> None:
    """Refuse an axis that a tensor does not have."""
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(must("dim", "be an int", repr(dim)))
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(must("dim", f"be an axis of x with shape {tuple(x.shape)}", dim))


def check_broadcasts(argument: str, value: Tensor, whole: str, shape: Collection[int]) -> None:
    """Refuse a tensor that does not fit another one, or that would make it larger."""
    full = tuple(shape)[len(shape) - value.ndim :]
    if value.ndim > len(shape) or any(
        own not in (1, n) for own, n in zip(value.shape, full, strict=True)
    ):
        raise ValueError(
            must(
                argument,
                f"broadcast to {whole} with shape {tuple(shape)}",
                f"a tensor of shape {tuple(value.shape)}",
            )
        )


def check_vector(argument: str, value: Tensor | None, size: int, x: Tensor) -> None:
    """Refuse a vector of parameters, where given, that does not have one float per feature."""
    if value is None:
        return
    check_float(argument, value)
    if tuple(value.shape) != (size,):
        shape = f"a tensor of shape {tuple(value.shape)}"
        raise ValueError(must(argument, f"have shape ({size},)", shape))
    check_same("device", argument, value.device, "the input", x.device)


def check_between(argument: str, value: float, low: float, high: float, instead: str = "") -> None:
    """Refuse a number outside [low, high], NaN included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(must(argument, "be a number", repr(value)))
    if not low <= value <= high:
        raise ValueError(must(argument, f"be in [{low:g}, {high:g}]", value, instead))


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Refuse labels that are not one integer per row of the logits."""
    check_integers("labels", labels)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        shape = f"a tensor of shape {tuple(logits.shape)}"
        raise ValueError(must("logits", "have a last axis of at least one class", shape))
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            must(
                "labels",
                f"have shape {tuple(logits.shape[:-1])}, one label per row of logits",
                f"a tensor of shape {tuple(labels.shape)}",
                "Classes are the last axis of logits: where they are axis 1, "
                "pass logits.movedim(1, -1).",
            )
        )
    check_same("device", "labels", labels.device, "logits", logits.device)


def check_rotary_table(argument: str, value: Tensor, x: Tensor) -> None:
    """Refuse a rotary table that is rounded to 16 bits or does not fit the rows of ``x``."""
    check_float(argument, value)
    if value.dtype not in (torch.float32, torch.float64):
        instead = "Take it from rotary_tables, and keep it out of casts."
        raise TypeError(must(argument, "be float32 or float64", value.dtype, instead))
    shape = tuple(value.shape)
    if value.ndim == 0 or x.ndim == 0 or 2 * shape[-1] > x.shape[-1]:
        rule = f"have at most half the width of x with shape {tuple(x.shape)}"
        raise ValueError(must(argument, rule, f"a tensor of shape {shape}"))
    check_broadcasts(f"{argument}[..., 0]", value[..., 0], "the rows of x", x.shape[:-1])
    check_same("device", argument, value.device, "x", x.device)
