"""Find out what an attention can be asked: from its signature, and by trying."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch

from stabletx.testing.laws.ask import Ask, Attention
from stabletx.testing.laws.law import NotAsked, Raised, Violation
from stabletx.testing.laws.setting import DIMS, SMALL_DIMS, Setting

PLAIN = ("mask", "scale", "gradient", "grouped", "cross", "value-dim")
EXTRA = ("bias", "softcap", "sinks", "lse", "cache", "training", "higher")


@dataclass
class Features:
    """What can be asked in one dtype, and why the rest cannot.

    Attributes:
        names: what can be asked.
        missing: what cannot, with the reason.
        refused_widths: (d, e) that the attention turns down.
        refusal: why the dtype as a whole is not accepted, or "".
        no_gradient: says that the output is cut off from the inputs without a word, or "".
    """

    names: set[str]
    missing: dict[str, str] = field(default_factory=dict)
    refused_widths: set[tuple[int, int]] = field(default_factory=set)
    refusal: str = ""
    no_gradient: str = ""

    def drop(self, name: str, why: str) -> None:
        """Note that something cannot be asked."""
        self.names.discard(name)
        self.missing[name] = why


def declared(fn: Attention, supports: Collection[str], lacks: Collection[str]) -> Features:
    """Read what is stated: by the caller, by an adapter, and by the signature."""
    wanted = {*PLAIN, *supports, *getattr(fn, "supports", ())}
    unknown = sorted((wanted | set(lacks)) - {*PLAIN, *EXTRA})
    if unknown:
        known = ", ".join((*PLAIN, *EXTRA))
        raise ValueError(f"supports and lacks must name one of {known}, got {unknown[0]!r}.")
    features = Features(wanted)
    for name in EXTRA:
        if name not in wanted:
            features.missing[name] = f"not named in supports: {name}"
    for name in (*lacks, *getattr(fn, "lacks", ())):
        features.drop(name, f"named in lacks: {name}")
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return features
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in ("mask", "scale"):
            if name not in parameters:
                features.drop(name, f"no parameter {name}")
    return features


def probed(
    ask: Ask, stated: Features, dtype: torch.dtype, device: str, run: Callable[..., None]
) -> Features:
    """Try a small example of each kind in a dtype; a refusal is no failure."""
    features = Features(set(stated.names), dict(stated.missing))
    plain = Setting(dtype=dtype, device=device).but(h=2, g=2, t=4, s=4, d=16, e=16)
    ask.features = frozenset(features.names)
    features.refusal = _refusal(run, lambda: ask.out(plain.case()))
    if features.refusal:
        return features
    tries = {"grouped": {"h": 4, "g": 2}, "cross": {"t": 3, "s": 5}, "value-dim": {"e": 8}}
    for name, change in tries.items():
        _try(features, name, run, ask, plain.but(**change))
    for width in sorted({*DIMS, *SMALL_DIMS}):
        if width[0] == width[1] or "value-dim" in features.names:
            small = plain.but(d=width[0], e=width[1])
            if _refusal(run, lambda case=small: ask.out(case.case())):  # type: ignore[misc]
                features.refused_widths.add(width)
    if "mask" in features.names:
        _probe_mask(features, run, ask, plain)
    if "gradient" in features.names:
        _probe_gradient(features, run, ask, plain)
    return features


def _try(
    features: Features, name: str, run: Callable[..., None], ask: Ask, setting: Setting
) -> None:
    if name in features.names:
        refusal = _refusal(run, lambda: ask.out(setting.case()))
        if refusal:
            features.drop(name, refusal)


def _refusal(run: Callable[..., None], ask: Callable[[], object]) -> str:
    """Return why an example is refused, or ""; any other violation is left to the laws."""
    try:
        run(ask)
    except (Raised, NotAsked) as refused:
        return str(refused)
    except Violation:
        return ""
    return ""


def _probe_mask(features: Features, run: Callable[..., None], ask: Ask, plain: Setting) -> None:
    try:
        run(lambda: ask.out(plain.but(mask="causal").case()))
    except NotAsked as refused:
        features.drop("mask", str(refused))
    except Violation:
        return


def _probe_gradient(features: Features, run: Callable[..., None], ask: Ask, plain: Setting) -> None:
    try:
        run(lambda: ask.answer(plain.case()))
    except NotAsked as refused:
        features.drop("gradient", str(refused))
    except Raised:
        return
    except Violation as broken:
        if "no gradient" in str(broken):
            features.drop("gradient", "its output carries no gradient")
            features.no_gradient = str(broken)
