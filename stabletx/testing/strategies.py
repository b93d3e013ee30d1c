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
    # Made once: to make a strategy costs more than to draw from it.
    pick, yes_or_no, seeds = st.sampled_from, st.booleans(), st.integers(0, 2**16)
    few, several, widths = pick((1, 2)), pick((1, 2, 3)), pick((1, 2, 4, 8, 16, 33, 64))
    own_widths = pick((None, None, 1, 8))
    family, dtype, layout = pick(names), pick(list(dtypes)), pick(list(layouts))
    mask, garbage = pick(list(masks)), pick(GARBAGE if poison else GARBAGE[:1])
    added, caps, scales = pick(BIASES), pick((None, 5.0, 30.0)), pick((None, None, 1.0, 0.05))
    amplitudes = pick((1.0, 0.125, 8.0))

    @st.composite
    def cases(draw: st.DrawFn) -> AttentionCase:
        t = draw(lengths, label="queries")
        alike = equal_lengths or draw(yes_or_no, label="as many keys as queries")
        s = t if alike else draw(lengths, label="keys")
        # Long rows come with few heads: an example must stay cheap enough to shrink.
        many = few if t * s > 2048 else several
        g = draw(many, label="key heads")
        h = g * (draw(many, label="queries a key head") if grouped else 1)
        d = draw(widths, label="width")
        e = d if equal_widths else draw(own_widths, label="value width") or d
        shape = Shape(draw(many, label="batch"), h, g, t, s, d, e)
        kind = draw(mask, label="mask")
        if kind != "none" and draw(yes_or_no, label="second mask"):
            kind = f"{kind}&{draw(mask, label='and')}".removesuffix("&none")
        return AttentionCase.build(
            family=draw(family, label="family"),
            seed=draw(seeds, label="seed"),
            shape=shape,
            dtype=draw(dtype, label="dtype"),
            mask=kind,
            garbage=draw(garbage, label="garbage"),
            layout=draw(layout, label="layout"),
            bias=draw(added, label="bias") if bias else "none",
            softcap=draw(caps, label="softcap") if softcap else None,
            sinks=draw(yes_or_no, label="sinks") if sinks else False,
            scale=draw(scales, label="scale"),
            amplitude=draw(amplitudes, label="amplitude"),
        )

    return cases()


def _lengths(max_len: int, *, empty: bool) -> st.SearchStrategy[int]:
    """Draw small lengths as often as those at the edges of a kernel's blocks, short ones first."""
    small = range(0 if empty else 1, min(9, max_len) + 1)
    return st.sampled_from([*small, *(n for n in EDGE_LENGTHS if n <= max_len)])
