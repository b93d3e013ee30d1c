"""Hypothesis strategies that draw attention problems, small and readable when they shrink."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st

from stabletx.testing._layouts import LAYOUTS
from stabletx.testing._masks import MASKS
from stabletx.testing.cases import BIASES, GARBAGE, AttentionCase, Shape
from stabletx.testing.families import FAMILIES

# Lengths around the block sizes of real kernels; 192 and 320 leave 64 over a block of 128.
EDGE_LENGTHS = (16, 17, 63, 64, 65, 127, 128, 129, 192, 257, 320)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def attention_cases(
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    families: Sequence[str] | None = None,
    max_len: int = 129,
    masks: Sequence[str] = MASKS,
    layouts: Sequence[str] = LAYOUTS,
    grouped: bool = True,
    extremes: bool = False,
    bias: bool = False,
    softcap: bool = False,
    sinks: bool = False,
    poison: bool = True,
    empty: bool = False,
    equal_widths: bool = False,
    equal_lengths: bool = False,
) -> st.SearchStrategy[AttentionCase]:
    """Draw attention problems: shapes, family, seed, mask kind, layout, never single elements.

    Args:
        dtypes: of the tensors.
        families: names in :data:`FAMILIES`; None = all, the extreme ones only with ``extremes``.
        max_len: longest sequence of queries or keys.
        masks: kinds; two of them may be joined.
        layouts: how q, k and v may lie in memory.
        grouped: allow fewer key/value heads than query heads.
        extremes: allow magnitudes up to the dtype's largest value.
        bias: allow a float bias.
        softcap: allow a soft-cap.
        sinks: allow one sink a head.
        poison: allow garbage at keys that no query may attend.
        empty: allow no query or no key at all.
        equal_widths: keep the values as wide as the keys.
        equal_lengths: keep as many keys as queries.

    Returns:
        A strategy of :class:`AttentionCase`. A failing case shrinks to few, short, plain tensors
        and prints as the code that builds it again.

    >>> attention_cases(max_len=4).filter(lambda case: case.shape.t > 1) is not None
    True
    """
    names = [name for name in FAMILIES if extremes or not FAMILIES[name].extreme]
    names = list(families) if families is not None else names
    lengths = _lengths(max_len, empty=empty)

    @st.composite
    def cases(draw: st.DrawFn) -> AttentionCase:
        t = draw(lengths, label="queries")
        alike = equal_lengths or draw(st.booleans(), label="as many keys as queries")
        s = t if alike else draw(lengths, label="keys")
        # Long rows come with few heads: an example must stay cheap enough to shrink.
        many = (1, 2) if t * s > 2048 else (1, 2, 3)
        g = draw(st.sampled_from(many), label="key heads")
        h = g * (draw(st.sampled_from(many), label="queries a key head") if grouped else 1)
        d = draw(st.sampled_from((1, 2, 4, 8, 16, 33, 64)), label="width")
        e = d if equal_widths else draw(st.sampled_from((d, d, 1, 8)), label="value width")
        shape = Shape(draw(st.sampled_from(many), label="batch"), h, g, t, s, d, e)
        kind = draw(st.sampled_from(list(masks)), label="mask")
        if kind != "none" and draw(st.booleans(), label="second mask"):
            kind = f"{kind}&{draw(st.sampled_from(list(masks)), label='and')}".removesuffix("&none")
        return AttentionCase.build(
            family=draw(st.sampled_from(names), label="family"),
            seed=draw(st.integers(0, 2**16), label="seed"),
            shape=shape,
            dtype=draw(st.sampled_from(list(dtypes)), label="dtype"),
            mask=kind,
            garbage=draw(st.sampled_from(GARBAGE if poison else GARBAGE[:1]), label="garbage"),
            layout=draw(st.sampled_from(list(layouts)), label="layout"),
            bias=draw(st.sampled_from(BIASES), label="bias") if bias else "none",
            softcap=draw(st.sampled_from((None, 5.0, 30.0)), label="softcap") if softcap else None,
            sinks=draw(st.booleans(), label="sinks") if sinks else False,
            scale=draw(st.sampled_from((None, None, 1.0, 0.05)), label="scale"),
            amplitude=draw(st.sampled_from((1.0, 0.125, 8.0)), label="amplitude"),
        )

    return cases()


def _lengths(max_len: int, *, empty: bool) -> st.SearchStrategy[int]:
    """Draw small lengths as often as those at the edges of a kernel's blocks, short ones first."""
    small = range(0 if empty else 1, min(9, max_len) + 1)
    return st.sampled_from([*small, *(n for n in EDGE_LENGTHS if n <= max_len)])
