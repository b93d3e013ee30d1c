"""Checks of configurations, inputs and model folders, with the messages they give."""

from __future__ import annotations

import torch
from torch import Tensor

from stabletx._checks import check_finite_number, check_positive, must


def check_flag(argument: str, value: object) -> None:
    """Refuse anything but True and False."""
    if not isinstance(value, bool):
        raise TypeError(must(argument, "be True or False", repr(value)))


def check_above_zero(argument: str, value: float) -> None:
    """Refuse a number that is not positive and finite."""
    check_finite_number(argument, value)
    if value <= 0:
        raise ValueError(must(argument, "be positive", value))


def check_token_id(argument: str, value: object, vocab_size: int) -> None:
    """Refuse a token id that is neither None nor in the vocabulary."""
    if value is None and argument != "pad_id":
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(must(argument, "be an int", repr(value)))
    if not 0 <= value < vocab_size:
        raise ValueError(must(argument, f"be in [0, vocab_size={vocab_size})", value))


def checked_labels(labels: object, n_classes: int | None) -> tuple[str, ...]:
    """Give labels as a tuple; refuse what are not different texts, or not ``n_classes`` of them."""
    if not isinstance(labels, list | tuple) or not all(isinstance(x, str) for x in labels):
        raise TypeError(must("labels", "be a tuple of texts", repr(labels)))
    if len(set(labels)) != len(labels):
        raise ValueError(must("labels", "differ from each other", labels))
    if labels and n_classes is not None and n_classes != len(labels):
        raise ValueError(must("n_classes", f"be the number of labels, {len(labels)}", n_classes))
    return tuple(labels)


def check_keys(argument: str, given: set[str], known: set[str], needed: set[str]) -> None:
    """Refuse unknown keys, and the absence of needed ones."""
    for what, keys in (("have no unknown keys", given - known), ("have all keys", needed - given)):
        if keys:
            listed = ", ".join(sorted(map(str, keys)))
            kind = "unknown" if keys & given else "missing"
            raise ValueError(f"{argument} must {what}, got {kind}: {listed}.")


def check_seq_len(n_tokens: int, max_seq_len: int) -> None:
    """Refuse more tokens than there are learned positions."""
    if n_tokens > max_seq_len:
        raise ValueError(
            must(
                "input_ids",
                f"have at most max_seq_len={max_seq_len} tokens, as positions are learned",
                f"{n_tokens} tokens",
                "Truncate them, or choose position='rotary'.",
            )
        )


def check_has_window(window: int | None, every: int | None, base: float | None) -> None:
    """Refuse settings of windowed layers where no layer has a window."""
    for name, value in (("global_every", every), ("window_rotary_base", base)):
        if window is None and value is not None:
            raise ValueError(must(name, "be None without a window", value, "Pass window=..."))


def checked_n_classes(n_classes: int | None) -> int:
    """Give the number of classes; refuse its absence."""
    if n_classes is None:
        instead = "Pass labels=(...) or n_classes=... to TransformerConfig."
        raise ValueError(must("config.n_classes", "be given for a classifier", None, instead))
    return n_classes


def check_kind(argument: str, value: object, kind: type) -> None:
    """Refuse a value of another class."""
    if not isinstance(value, kind):
        raise TypeError(must(argument, f"be a {kind.__name__}", type(value).__name__))


def no_such_file(folder: object, name: str, instead: str) -> str:
    """Say that a folder lacks a file."""
    return must("folder", f"hold {name}", folder, instead or "Save a model there first.")


def bad_file(path: object, why: object, instead: str) -> str:
    """Say that a file cannot be used, why, and the way out."""
    return f"{path} must be a whole and fitting file, got: {why}. {instead}"


def pickled_weights(folder: object, name: str) -> str:
    """Say that pickled weights are not read."""
    return must(
        "folder",
        "hold model.safetensors",
        f"{folder} with {name}",
        "A pickle can run any code when read, so none is. Convert it to safetensors where it is "
        "trusted.",
    )


def check_sampling(
    max_new_tokens: int, temperature: float, top_p: float, generator: object
) -> None:
    """Refuse settings that cannot pick a token."""
    check_positive("max_new_tokens", max_new_tokens)
    check_finite_number("temperature", temperature)
    if temperature < 0:
        instead = "0 takes the best token each time."
        raise ValueError(must("temperature", "be at least 0", temperature, instead))
    check_finite_number("top_p", top_p)
    if not 0 < top_p <= 1:
        raise ValueError(must("top_p", "be in (0, 1]", top_p, "1 keeps every token."))
    if generator is not None:
        check_kind("generator", generator, torch.Generator)


def check_has_bos(bos_id: int | None) -> int:
    """Give the id that begins what is written; refuse its absence."""
    if bos_id is None:
        instead = "Pass bos_id=... to TransformerConfig."
        raise ValueError(must("config.bos_id", "be given for an encoder-decoder", None, instead))
    return bos_id


def given(argument: str, value: Tensor | None) -> Tensor:
    """Give a tensor; refuse its absence."""
    if value is None:
        instead = "To write a target, call generate."
        raise ValueError(must(argument, "be given, or decoder_input_ids", None, instead))
    return value
