"""Rotary positions: phases taken in float64, kept in float32, applied before rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from stabletx import _checks


def rotary_tables(
    positions: Tensor,  # any shape, such as (n,) or (b, n)
    head_dim: int,
    *,
    base: float = 10000.0,
) -> tuple[Tensor, Tensor]:  # each (*positions.shape, head_dim / 2), float32
    """Compute the cosine and the sine of every position's rotation angles.

    Pair ``i`` of ``head_dim / 2`` turns by ``position * base ** (-2 * i / head_dim)``.

    Args:
        positions: tokens from the start, integers, or float32 or float64 where they are stretched.
        head_dim: how many features of a head are rotated, even.
        base: the wavelength of the slowest pair is below ``2 * pi * base`` tokens.

    Returns:
        ``(cos, sin)``, float32, on the device of ``positions``.

    Raises:
        TypeError: if ``positions`` are boolean, complex or 16-bit floats.
        ValueError: if ``head_dim`` is not positive and even, or ``base`` not in [1, 1e30].

    Numerics: angles in float64, so a table is right to half a unit in the last place of float32 at
    every position below 2**27; angles in float32 are off by 1e-3 at position 131,071. Keep the
    tables in float32: rounded to 16 bits, or computed from frequencies that a cast of the model has
    rounded, they are wrong in the second digit.
    Source: Su et al. (2021), arXiv 2104.09864, section 3.2.

    >>> cos, sin = rotary_tables(torch.arange(3), 2)
    >>> sin[:, 0]
    tensor([0.0000, 0.8415, 0.9093])
    """
    _checks.check_tensor("positions", positions)
    if positions.dtype not in (torch.float32, torch.float64):
        _checks.check_integers("positions", positions)
    _checks.check_positive("head_dim", head_dim)
    _checks.check_divides("2", 2, "head_dim", head_dim)
    _checks.check_between("base", base, 1.0, 1e30)
    pair = torch.arange(head_dim // 2, dtype=torch.float64, device=positions.device)
    angles = positions.double()[..., None] * base ** (-2.0 / head_dim * pair)
    return torch.cos(angles).float(), torch.sin(angles).float()


def rotate(
    x: Tensor,  # (..., n, d)
    cos: Tensor,  # (..., n, p), p pairs, 2 * p <= d; broadcastable to the rows of x
    sin: Tensor,  # the shape of cos
    *,
    interleaved: bool = False,
) -> Tensor:  # the shape of x
    """Turn pairs of features by the angles of their position.

    Args:
        x: queries or keys. Features from ``2 * p`` on are returned as they are.
        cos: cosines from :func:`rotary_tables`; for ``x`` (b, h, n, d) and positions (b, n), pass
            ``cos[:, None]``.
        sin: sines, likewise.
        interleaved: False pairs feature ``i`` with ``i + p`` (Hugging Face, GPT-NeoX); True pairs
            ``2 * i`` with ``2 * i + 1`` (the paper).

    Returns:
        The rotated features in the dtype of ``x``.

    Raises:
        TypeError: if ``x`` is not floating point, or a table not float32 or float64.
        ValueError: if a table does not fit ``x``, or the two tables differ in shape.

    Numerics: computed in float32 (float64 where ``x`` or a table is), rounded once. A value that is
    not finite spoils its own pair and nothing else.
    Source: Su et al. (2021), arXiv 2104.09864, section 3.4.2.

    >>> cos, sin = rotary_tables(torch.tensor([0, 1]), 2)
    >>> rotate(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), cos, sin)
    tensor([[1.0000, 0.0000],
            [0.5403, 0.8415]])
    """
    _checks.check_float("x", x)
    _checks.check_rotary_table("cos", cos, x)
    _checks.check_rotary_table("sin", sin, x)
    _checks.check_same("shape", "sin", tuple(sin.shape), "cos", tuple(cos.shape))
    p = cos.shape[-1]
    turned, kept = x[..., : 2 * p], x[..., 2 * p :]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
    else:
        a, b = turned[..., :p], turned[..., p:]
    # Tables of at least float32 lift 16-bit features to their own dtype.
    a, b = a * cos - b * sin, b * cos + a * sin
    parts = [torch.stack([a, b], -1).flatten(-2)] if interleaved else [a, b]
    if kept.shape[-1]:
        parts.append(kept.to(a.dtype))
    return torch.cat(parts, -1).to(x.dtype)
