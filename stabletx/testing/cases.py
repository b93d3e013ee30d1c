"""One attention problem as a value that builds, prints and replays itself."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

from stabletx.testing._attention_bound import Bound, error_bound
from stabletx.testing._layouts import arranged
from stabletx.testing._masks import build_mask
from stabletx.testing._problem import prepare
from stabletx.testing._units import Units
from stabletx.testing.families import FAMILIES, Draft
from stabletx.testing.reference import (
    Gradients,
    Reference,
    exact_gradients,
    exact_output,
    reference_attention,
    reference_gradients,
    score_gradients,
    softmax_rows,
)
from stabletx.testing.rounding import Mode, Profile

Garbage = Literal["none", "nan", "inf", "max", "big"]
GARBAGE: tuple[Garbage, ...] = ("none", "nan", "inf", "max", "big")


class Shape(NamedTuple):
    """Sizes of a case: batch, query heads, key heads, queries, keys, width of q and k, of v."""

    b: int = 1
    h: int = 1
    g: int = 1
    t: int = 4
    s: int = 4
    d: int = 4
    e: int = 4


class Options(TypedDict):
    """The keyword arguments of a case."""

    mask: Tensor | None
    bias: Tensor | None
    scale: float | None
    softcap: float | None
    sinks: Tensor | None


class Judgement(NamedTuple):
    """What is right for a case, and how far from it rounding may lead."""

    out: Tensor
    gradients: Gradients
    bound: Bound


@dataclass(frozen=True)
class AttentionCase:
    """Inputs of one attention call, upstream gradient included, with where they come from.

    Attributes:
        q: (b, h, t, d).
        k: (b, g, s, d).
        v: (b, g, s, e).
        mask: bool (b|1, h|1, t, s), True = may attend, or None.
        bias: (b|1, h|1, t|1, s|1) or None.
        scale: factor on the products, None = ``d ** -0.5``.
        softcap: or None.
        sinks: (h,) or None.
        grad_out: (b, h, t, e).
        poison: bool (b, g, s), keys that no query may attend and that hold garbage, or None.
        family: name of the generator.
        seed: its seed.
        source: the call of :meth:`build` that makes this very case.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    bias: Tensor | None
    scale: float | None
    softcap: float | None
    sinks: Tensor | None
    grad_out: Tensor
    poison: Tensor | None
    family: str
    seed: int
    source: str = field(default="", compare=False)
    layout: str = "contiguous"

    @classmethod
    def build(
        cls,
        *,
        family: str = "gaussian",
        seed: int = 0,
        shape: tuple[int, ...] = (),
        dtype: torch.dtype = torch.float32,
        mask: str = "none",
        garbage: Garbage = "none",
        layout: str = "contiguous",
        bias: str = "none",
        softcap: float | None = None,
        sinks: bool = False,
        scale: float | None = None,
        amplitude: float = 1.0,
    ) -> AttentionCase:
        """Build the case that these few values describe, the same on every machine.

        Args:
            family: a name in :data:`stabletx.testing.FAMILIES`.
            seed: of every random number in it.
            shape: ``(b, h, g, t, s, d, e)``; what is left out takes :class:`Shape`'s default.
            dtype: of the tensors.
            mask: a kind, or several joined with ``&``.
            garbage: what lies at keys that no query may attend.
            layout: how q, k and v lie in memory.
            bias: "none", "gaussian", "alibi", "blocking" or "offset".
            softcap: None leaves it out.
            sinks: give each head a sink.
            scale: None = ``d ** -0.5``; a family that needs its own scale keeps it.
            amplitude: factor on q, where the family allows one.

        Returns:
            The case; its ``repr`` is this call.

        Raises:
            ValueError: an unknown name.

        >>> AttentionCase.build(family="exact", seed=1, shape=(1, 1, 1, 2, 3))
        AttentionCase.build(family='exact', seed=1, shape=(1, 1, 1, 2, 3, 4, 4))
        """
        sizes = Shape(*shape)
        arguments = {
            "family": family, "seed": seed, "shape": tuple(sizes), "dtype": dtype, "mask": mask,
            "garbage": garbage, "layout": layout, "bias": bias, "softcap": softcap,
            "sinks": sinks, "scale": scale, "amplitude": amplitude,
        }  # fmt: skip
        draft = _draft(sizes, family, seed, dtype, amplitude)
        generator = torch.Generator().manual_seed(seed + 1)
        allowed = build_mask(mask, sizes, generator)
        added = build_bias(bias, sizes, generator, exact=draft.exact)
        q, k, v = (_cast(x, dtype) for x in (draft.q, draft.k, draft.v))
        if layout == "expanded":
            k, v = _shared(k), _shared(v)
        poison = None
        if garbage != "none":
            poison = _unseen(sizes, allowed, added, shared=layout == "expanded")
            k, v = (_poisoned(x, poison, garbage) for x in (k, v))
        return cls(
            q=arranged(q, layout),
            k=arranged(k, layout),
            v=arranged(v, layout),
            mask=allowed,
            bias=None if added is None else added.to(dtype),
            scale=scale if draft.scale is None else draft.scale,
            softcap=None if draft.exact else softcap,
            sinks=_sinks(sizes.h, generator).to(dtype) if sinks and not draft.exact else None,
            grad_out=draft.grad_out.to(dtype),
            poison=poison if poison is not None and bool(poison.any()) else None,
            family=family,
            seed=seed,
            source=_call(arguments),
            layout=layout,
        )

    @property
    def shape(self) -> Shape:
        """Return the sizes."""
        b, h, t, d = self.q.shape
        return Shape(b, h, self.k.shape[1], t, self.k.shape[2], d, self.v.shape[3])

    @property
    def options(self) -> Options:
        """Return the keyword arguments of the call."""
        return {
            "mask": self.mask,
            "bias": self.bias,
            "scale": self.scale,
            "softcap": self.softcap,
            "sinks": self.sinks,
        }

    @property
    def exact(self) -> bool:
        """Tell whether every partial sum is exact, so that the right tolerance is zero."""
        return FAMILIES[self.family].exact

    @property
    def extreme(self) -> bool:
        """Tell whether products of the inputs go beyond 2^60."""
        return FAMILIES[self.family].extreme

    def to(self, dtype: torch.dtype) -> AttentionCase:
        """Return the case in another dtype, laid out alike."""

        def moved(x: Tensor) -> Tensor:
            return arranged(_cast(x, dtype), self.layout)

        return replace(
            self,
            q=moved(self.q),
            k=moved(self.k),
            v=moved(self.v),
            bias=None if self.bias is None else self.bias.to(dtype),
            sinks=None if self.sinks is None else self.sinks.to(dtype),
            grad_out=self.grad_out.to(dtype),
            source=f"{self.source}.to({dtype})",
        )

    def reference(self) -> Reference:
        """Return the exact answer."""
        return reference_attention(self.q, self.k, self.v, **self.options)

    def gradients(self) -> Gradients:
        """Return the exact gradients of ``(out * grad_out).sum()``."""
        return reference_gradients(self.q, self.k, self.v, self.grad_out, **self.options)

    def bound(self, profile: Profile | None = None, mode: Mode = "deterministic") -> Bound:
        """Return the bounds of output and gradients: 0 where the case leaves nothing to round."""
        return self.judged(profile, mode).bound

    def judged(self, profile: Profile | None = None, mode: Mode = "deterministic") -> Judgement:
        """Return the exact output, the exact gradients and the bounds, from one look at the case.

        Cheaper than to ask for one after the other, and the same.
        """
        stated = profile or Profile()
        problem = prepare(self.q, self.k, self.v, self.grad_out, **self.options)
        rows = softmax_rows(problem)
        back = score_gradients(problem, rows)
        out, gradients = exact_output(problem, rows), exact_gradients(problem, rows, back)
        bound = error_bound(problem, rows, back, Units.of(self.q.dtype, stated, mode))
        if self.exact and stated.accumulate is None and not stated.recompute_from_lse:
            pairs = zip(bound, (out, *gradients), strict=True)
            bound = Bound._make(_unless_exact(limit, x, self.q.dtype) for limit, x in pairs)
        return Judgement(out, gradients, bound)

    def __repr__(self) -> str:
        """Return code that makes this case again."""
        return self.source or f"AttentionCase(family={self.family!r}, seed={self.seed})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Print the same in a failing Hypothesis test and in a notebook."""
        printer.text(repr(self))


def build_bias(
    kind: str, sizes: Shape, generator: torch.Generator, *, exact: bool = False
) -> Tensor | None:
    """Build a bias (b|1, h|1, t|1, s|1) in float64; the exact family takes none but blocks."""
    b, h, _, t, s, _, _ = sizes
    if kind == "none":
        return None
    distance = (torch.arange(s)[None, :] - torch.arange(t)[:, None] - (s - t)).double().abs()
    if kind == "gaussian":
        bias = torch.randn(1, h, t, s, generator=generator, dtype=torch.float64)
    elif kind == "alibi":
        slopes = 2.0 ** -torch.arange(1, h + 1, dtype=torch.float64)
        bias = -slopes[None, :, None, None] * distance
    elif kind == "blocking":
        bias = torch.randn(b, 1, 1, s, generator=generator, dtype=torch.float64)
        bias[torch.rand(bias.shape, generator=generator) < 0.3] = -torch.inf
    elif kind == "offset":
        bias = torch.randn(1, 1, t, s, generator=generator, dtype=torch.float64) + 1000.0
    else:
        raise ValueError(f"bias must be one of {', '.join(BIASES)}, got bias={kind!r}.")
    return torch.where(bias.isneginf(), bias, 0.0) if exact else bias


BIASES = ("none", "gaussian", "alibi", "blocking", "offset")


def _draft(sizes: Shape, family: str, seed: int, dtype: torch.dtype, amplitude: float) -> Draft:
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got family={family!r}.")
    maker = FAMILIES[family]
    draft = maker.make(sizes, torch.Generator().manual_seed(seed), dtype)
    if maker.exact:
        return draft
    largest = torch.finfo(torch.float64).max
    return draft._replace(q=(draft.q * amplitude).clamp(-largest, largest))


def _unless_exact(bound: Tensor | None, exact: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Ask for equality where the exact result is a number of the dtype."""
    if bound is None or exact is None:
        return bound
    return torch.where(exact.to(dtype).double() == exact, 0.0, bound)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast without leaving the range of the dtype."""
    largest = torch.finfo(dtype).max
    return torch.where(x.isfinite(), x.clamp(-largest, largest), x).to(dtype)


def _shared(x: Tensor) -> Tensor:
    """Let every example (or, in a batch of one, every head) hold the same values."""
    axis = 0 if x.shape[0] > 1 else 1
    return x.narrow(axis, 0, min(1, x.shape[axis])).expand_as(x)


def _unseen(
    sizes: Shape, allowed: Tensor | None, bias: Tensor | None, *, shared: bool
) -> Tensor:  # (b, g, s)
    """Find the keys that no query of the group may attend."""
    b, h, g, t, s, _, _ = sizes
    pairs = torch.ones(b, h, t, s, dtype=torch.bool)
    if allowed is not None:
        pairs = pairs & allowed
    if bias is not None:
        pairs = pairs & ~bias.isneginf()
    seen = pairs.any(2).reshape(b, g, h // g, s).any(2)
    if shared:
        seen = seen.any(0 if b > 1 else 1, keepdim=True).expand_as(seen)
    return ~seen


def _poisoned(x: Tensor, poison: Tensor, garbage: Garbage) -> Tensor:
    largest = torch.finfo(x.dtype).max
    value = {"nan": torch.nan, "inf": torch.inf, "max": largest, "big": min(1e30, largest)}[garbage]
    return x.masked_fill(poison.unsqueeze(-1), value)


def _sinks(h: int, generator: torch.Generator) -> Tensor:
    return torch.randn(h, generator=generator, dtype=torch.float64)


def _call(arguments: dict[str, object]) -> str:
    defaults: dict[str, object] = {
        "dtype": torch.float32, "mask": "none", "garbage": "none", "layout": "contiguous",
        "bias": "none", "softcap": None, "sinks": False, "scale": None, "amplitude": 1.0,
    }  # fmt: skip
    shown = [f"{k}={v!r}" for k, v in arguments.items() if k not in defaults or v != defaults[k]]
    return f"AttentionCase.build({', '.join(shown)})"
