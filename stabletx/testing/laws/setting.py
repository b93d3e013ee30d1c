"""One example to ask about, and how the examples of a law are drawn."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from stabletx.testing.cases import AttentionCase, Shape

Item = TypeVar("Item")
Refused = Collection[tuple[int, int]]
_MOST_WORK = 1 << 21
_DEFAULT = Shape()

# (t, s): one key, one query, more of either, and both sides of the tiles that kernels cut.
SHORT = ((5, 5), (1, 1), (2, 3), (1, 6), (7, 3), (3, 1), (8, 8), (1, 9), (9, 17))
LONG = (
    *((65, 65), (1, 129), (127, 128), (192, 192), (64, 64), (63, 129), (129, 65), (31, 33)),
    *((16, 16), (256, 256), (3, 513), (300, 7), (128, 130), (2, 1025), (96, 320), (64, 192)),
)
# (b, h, g)
HEADS = ((2, 2, 2), (1, 4, 2), (2, 3, 1), (1, 1, 1), (3, 4, 4), (1, 8, 2), (2, 6, 3))
# (d, e)
DIMS = ((16, 16), (8, 5), (7, 7), (64, 64), (1, 1), (4, 12), (33, 40), (80, 80), (128, 128))
SMALL_DIMS = ((16, 16), (4, 4), (8, 5), (3, 3))
# The last row of most masks is there to be joined: padding and causal order meet in practice.
MASKS = (
    *("none", "causal", "padding_right", "padding_left", "window", "random", "per_head"),
    *("segments", "causal_top_left", "padding_holes", "empty_rows", "dead_example", "dead_head"),
    *("padding_left&causal", "padding_right&causal", "segments&causal"),
)
FAMILIES = (
    *("gaussian", "equal", "tied", "one_hot", "outlier", "dominant", "sink_key", "resonant"),
    *("logit_offset", "key_direction", "subnormal", "exact"),
)
LAYOUTS = ("permuted", "sliced", "strided", "expanded")
SCALES = (None, 1.0, 0.05, None, 0.3)


@dataclass(frozen=True)
class Setting:
    """The few values that an example is built from.

    Attributes:
        shape: b, h, g, t, s, d, e.
        family: what the numbers look like.
        mask: a kind of mask, or several joined with ``&``.
        layout: how the tensors lie in memory.
        scale: None leaves it to the attention.
        amplitude: factor on the queries.
        bias: a kind of bias.
        softcap: or None.
        sinks: one sink a head.
        dtype: of the tensors.
        device: where they lie.
        seed: of the draw.
    """

    shape: Shape = _DEFAULT
    family: str = "gaussian"
    mask: str = "none"
    layout: str = "contiguous"
    scale: float | None = None
    amplitude: float = 1.0
    bias: str = "none"
    softcap: float | None = None
    sinks: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0

    def __repr__(self) -> str:
        """Show the sizes, and what is not the default."""
        fields = dataclasses.fields(self)
        shown = [(f.name, getattr(self, f.name)) for f in fields]
        changed = [(n, x) for (n, x), f in zip(shown, fields, strict=True) if x != f.default]
        return f"Setting({', '.join(f'{name}={x!r}' for name, x in changed)})"

    def case(self) -> AttentionCase:
        """Build the tensors."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "device"]
        case = AttentionCase.build(**{name: getattr(self, name) for name in names})
        return on_device(case, self.device)

    def but(self, **changes: object) -> Setting:
        """Return a setting that differs in the named fields, or in the named sizes."""
        sizes = {name: n for name, n in changes.items() if name in Shape._fields}
        rest = {name: x for name, x in changes.items() if name not in Shape._fields}
        shape = self.shape._replace(**sizes)  # type: ignore[arg-type]
        return dataclasses.replace(self, shape=shape, **rest)  # type: ignore[arg-type]

    def source(self) -> torch.Generator:
        """Return a source of randomness of this example's own."""
        return torch.Generator().manual_seed(self.seed * 1009 + 17)

    def smaller(self, choices: Choices) -> Iterator[Setting]:
        """Yield simpler examples of the same kind, the simplest first."""
        z = self.shape
        plain = {"layout": "contiguous", "family": "gaussian", "scale": None, "amplitude": 1.0}
        for name, value in plain.items():
            allowed = name != "family" or value in choices.families
            if getattr(self, name) != value and allowed:
                yield self.but(**{name: value})
        for mask in ("none", *self.mask.split("&")):
            if mask != self.mask and (mask != "none" or "none" in choices.masks):
                yield self.but(mask=mask)
        if z.b > 1:
            yield self.but(b=1)
        for h, g in ((1, 1), (2, 1), (2, 2), (z.h // 2, max(1, z.g // 2))):
            if h < z.h and g <= z.g and h % g == 0 and (h > g) == (z.h > z.g):
                yield self.but(h=h, g=g)
        for names in (("t", "s"), ("t",), ("s",), ("d", "e"), ("d",), ("e",)):
            now = {name: getattr(z, name) for name in names}
            for n in _steps(max(now.values())):
                change = {name: min(n, size) for name, size in now.items()}
                if change != now:
                    yield self.but(**change)


def _steps(n: int) -> list[int]:
    """Return sizes to try instead of ``n``, the smallest first, each once."""
    tries = {1, 2, 3, 4, 8, n // 4, n // 2, 3 * n // 4, n - 4, n - 1}
    return sorted(x for x in tries if 0 < x < n)


@dataclass(frozen=True)
class Choices:
    """What the settings of a law are drawn from; each list is gone through in full."""

    lengths: Sequence[tuple[int, int]] = SHORT + LONG
    heads: Sequence[tuple[int, int, int]] = HEADS
    dims: Sequence[tuple[int, int]] = DIMS
    families: Sequence[str] = ("gaussian",)
    masks: Sequence[str] = ("none",)
    layouts: Sequence[str] = ("contiguous",)
    scales: Sequence[float | None] = (None,)
    amplitudes: Sequence[float] = (1.0,)
    biases: Sequence[str] = ("none",)
    softcaps: Sequence[float | None] = (None,)
    sinks: Sequence[bool] = (False,)

    def settings(
        self, n: int, seed: int, salt: str, features: frozenset[str], refused: Refused = ()
    ) -> Iterator[Setting]:
        """Draw ``n`` settings that the features allow, each list in an order of the seed's.

        ``refused`` holds the widths (d, e) that the attention turns down.
        """

        def column(name: str, items: Sequence[Item]) -> Iterator[Item]:
            return _cycle(items, f"{seed}/{salt}/{name}")

        usable = [x for x in self.lengths if "cross" in features or x[0] == x[1]]
        lengths = _turns([column(f"ts{i}", group) for i, group in enumerate(_by_size(usable))])
        heads = column("bhg", [x for x in self.heads if "grouped" in features or x[1] == x[2]])
        widths = [x for x in self.dims if "value-dim" in features or x[0] == x[1]]
        dims = column("de", [x for x in widths if x not in refused] or [(16, 16)])
        masks = column("mask", self.masks if "mask" in features else ["none"])
        scales = column("scale", self.scales if "scale" in features else [None])
        families = column("family", self._families(features))
        rest = {
            name: column(name, items)
            for name, items in (
                ("layout", self.layouts),
                ("amplitude", self.amplitudes),
                ("bias", self.biases),
                ("softcap", self.softcaps),
                ("sinks", self.sinks),
            )
        }
        for i in range(n):
            shape = _affordable(next(heads), next(lengths), next(dims))
            values = {name: next(stream) for name, stream in rest.items()}
            yield Setting(
                shape=shape,
                family=next(families),
                mask=next(masks),
                scale=next(scales),
                seed=seed * 100_003 + i,
                **values,  # type: ignore[arg-type]
            )

    def _families(self, features: frozenset[str]) -> list[str]:
        """Leave out the families that bring a scale of their own, where none can be given."""
        own = ("exact", "logit_offset")
        return [x for x in self.families if "scale" in features or x not in own] or ["gaussian"]


def _affordable(
    heads: tuple[int, int, int], lengths: tuple[int, int], dims: tuple[int, int]
) -> Shape:
    """Join sizes, with fewer and thinner heads where the lengths are long."""
    (b, h, g), (t, s), (d, e) = heads, lengths, dims
    if b * h * t * s * max(d, e) > _MOST_WORK:
        b, h, g = (1, 2, 1) if h != g else (1, 2, 2)
    if b * h * t * s * max(d, e) > _MOST_WORK:
        d, e = (16, 16) if d == e else (16, 8)
    return Shape(b, h, g, t, s, d, e)


def _cycle(column: Sequence[Item], key: str) -> Iterator[Item]:
    """Go through a list again and again, each time in another order."""
    assert column, "a law must leave something to draw from"
    source = random.Random(key)
    while True:
        yield from source.sample(list(column), len(column))


def _by_size(lengths: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Part lengths into short, middling and long ones, so that few examples hold some of each."""
    groups: list[list[tuple[int, int]]] = [[], [], []]
    for pair in lengths:
        groups[(max(pair) >= 16) + (max(pair) >= 128)].append(pair)
    return [group for group in groups if group]


def _turns(streams: Sequence[Iterator[Item]]) -> Iterator[Item]:
    """Take from each stream in turn."""
    while True:
        for stream in streams:
            yield next(stream)


def on_device(case: AttentionCase, device: str) -> AttentionCase:
    """Return the case with its tensors on a device."""
    if device == "cpu":
        return case
    names = ("q", "k", "v", "mask", "bias", "sinks", "grad_out")
    moved = {name: x.to(device) for name in names if (x := getattr(case, name)) is not None}
    return dataclasses.replace(case, **moved)
