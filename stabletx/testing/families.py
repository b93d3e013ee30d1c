"""Generators of adversarial tensors: each family is a way in which real kernels go wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from stabletx.testing.cases import Shape


class Draft(NamedTuple):
    """Float64 tensors before they are cast and laid out."""

    q: Tensor  # (b, h, t, d)
    k: Tensor  # (b, g, s, d)
    v: Tensor  # (b, g, s, e)
    grad_out: Tensor  # (b, h, t, e)
    scale: float | None = None
    exact: bool = False


Maker = Callable[["Shape", torch.Generator, torch.dtype], Draft]


class Family(NamedTuple):
    """A generator with what is known about it."""

    make: Maker
    about: str
    exact: bool = False
    extreme: bool = False


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _choice(generator: torch.Generator, values: list[float]) -> float:
    return values[int(torch.randint(len(values), (), generator=generator))]


def _gaussian(z: Shape, r: torch.Generator, dtype: torch.dtype) -> Draft:
    return Draft(
        q=_normal(r, z.b, z.h, z.t, z.d),
        k=_normal(r, z.b, z.g, z.s, z.d),
        v=_normal(r, z.b, z.g, z.s, z.e),
        grad_out=_normal(r, z.b, z.h, z.t, z.e),
    )


def _outlier(z: Shape, r: torch.Generator, dtype: torch.dtype) -> Draft:
    base = _gaussian(z, r, dtype)

    def hit(x: Tensor) -> Tensor:
        struck = torch.rand(x.shape, generator=r) < 0.001
        if x.numel():
            struck.view(-1)[int(torch.randint(x.numel(), (), generator=r))] = True
        return x + struck * 10.0 * _normal(r, *x.shape)

    return base._replace(q=hit(base.q), k=hit(base.k), v=hit(base.v))


def _resonant(z: Shape, r: torch.Generator, dtype: torch.dtype) -> Draft:
    """Let queries and keys share one wave along the head dimension, in phase or antiphase."""
    base = _gaussian(z, r, dtype)
    wave = torch.cos(torch.arange(z.d).double() * 0.7)
    strength = _choice(r, [2.0, 5.0, 12.0])
    sign = torch.randint(0, 2, (z.b, z.g, z.s, 1), generator=r).double() * 2 - 1
    return base._replace(q=base.q + strength * wave, k=base.k + strength * sign * wave)


def _tied(z: Shape, r: torch.Generator, dtype: torch.dtype) -> Draft:
    """Repeat a few keys, so that every maximum is tied; give values one sign."""
    base = _gaussian(z, r, dtype)
    which = torch.arange(z.s) % 3
    pool = _normal(r, z.b, z.g, 3, z.d)
    return base._replace(q=2 * base.q, k=pool[:, :, which], v=-base.v.abs() - 0.5)


def _dominant(z: Shape, r: torch.Generator, dtype: torch.dtype) -> Draft:
    """Let one key win by far."""
    base = _gaussian(z, r, dtype)
    k = base.k.clone()
    if z.s:
        j = int(torch.randint(z.s, (), generator=r))
        k[:, :, j] = _choice(r, [10.0, 40.0]) * (1 + k[:, :, j].abs())
    return base._replace(q=base.q.abs(), k=k)


def _sink_key(z: Shape, r: torch.Generator, dtype: torch.dtype) -> Draft:
    """Let the first key draw nearly all weight and carry nearly no value."""
    base = _gaussian(z, r, dtype)
    k, v = base.k.clone(), base.v.clone()
    if z.s:
        k[:, :, 0] = 4.0
        v[:, :, 0] *= 1e-3
    return base._replace(q=base.q + 1.0, k=k, v=v)


def _subnormal(z: Shape, r: torch.Generator, dtype: torch.dtype) -> Draft:
    base = _gaussian(z, r, dtype)
    tiny = torch.finfo(dtype).tiny
    return base._replace(q=base.q * tiny, k=base.k * tiny, v=base.v * tiny)


def _dtype_max(z: Shape, r: torch.Generator, dtype: torch.dtype) -> Draft:
    """Fill with plus or minus the largest float."""
    base = _gaussian(z, r, dtype)
    largest = torch.finfo(dtype).max
    return base._replace(
        q=base.q.sign() * largest, k=base.k.sign() * largest, v=base.v.sign() * largest
    )


def _huge_values(z: Shape, r: torch.Generator, dtype: torch.dtype) -> Draft:
    """Put values of a quarter of the largest float, all of one sign, under random weights."""
    base = _gaussian(z, r, dtype)
    return base._replace(v=torch.full_like(base.v, torch.finfo(dtype).max / 4))


def _huge_keys(z: Shape, r: torch.Generator, dtype: torch.dtype) -> Draft:
    """Make keys whose products with ordinary queries leave the range of the dtype."""
    base = _gaussian(z, r, dtype)
    return base._replace(k=base.k.clamp(-4, 4) * (torch.finfo(dtype).max / 4))


def _logit_offset(z: Shape, r: torch.Generator, dtype: torch.dtype) -> Draft:
    """Make every score a large common offset plus a small exact number: the offset cancels."""
    base = _gaussian(z, r, dtype)
    offset = _choice(r, [2.0**8, 2.0**12, 2.0**15])
    q = torch.randint(-2, 3, base.q.shape, generator=r).double()
    k = torch.randint(-2, 3, base.k.shape, generator=r).double()
    if z.d:
        q[..., 0] = 1.0
        k[..., 0] = offset + (k[..., 0] if z.d == 1 else 0.0)
    return base._replace(q=q, k=k, scale=0.25)


def _key_direction(z: Shape, r: torch.Generator, dtype: torch.dtype) -> Draft:
    """Put all keys far out along one direction."""
    base = _gaussian(z, r, dtype)
    direction = _normal(r, 1, z.g, 1, z.d)
    norm = direction.norm(dim=-1, keepdim=True).clamp(min=1e-9)
    return base._replace(k=base.k + _choice(r, [10.0, 100.0, 1000.0]) * direction / norm)


def _equal(z: Shape, r: torch.Generator, dtype: torch.dtype) -> Draft:
    """Make every key, query and value of a head the same."""
    base = _gaussian(z, r, dtype)
    return base._replace(
        q=base.q[:, :, :1].expand_as(base.q),
        k=base.k[:, :, :1].expand_as(base.k),
        v=base.v[:, :, :1].expand_as(base.v),
    )


def _one_hot(z: Shape, r: torch.Generator, dtype: torch.dtype) -> Draft:
    """Give queries and keys one large entry: nearly one-hot weights, with ties."""
    base = _gaussian(z, r, dtype)
    height = _choice(r, [4.0, 10.0, 30.0])
    eye = torch.eye(max(1, z.d), dtype=torch.float64)[:, : z.d]
    of_q = torch.randint(max(1, z.d), (z.b, z.h, z.t), generator=r)
    of_k = (torch.arange(z.s) % max(1, z.d)).expand(z.b, z.g, z.s)
    return base._replace(q=height * eye[of_q], k=height * eye[of_k])


def _exact(z: Shape, r: torch.Generator, dtype: torch.dtype) -> Draft:
    """Make weights of exactly 1, or 1/2 where two keys tie, whatever the mask; 0/1 values.

    Keys come in pairs of equal small integers, another order in each channel. A query looks at
    one channel with sign + or -, and the scale puts the next pair out of reach of any dtype.
    """
    ranks = torch.stack(
        [torch.randperm((z.s + 1) // 2, generator=r) for _ in range(max(1, z.d))], dim=-1
    )
    codes = (ranks - ranks.shape[0] // 2)[torch.arange(z.s) // 2, : z.d].double()
    channel = torch.randint(max(1, z.d), (z.b, z.h, z.t), generator=r)
    sign = torch.randint(0, 2, (z.b, z.h, z.t, 1), generator=r).double() * 2 - 1
    eye = torch.eye(max(1, z.d), dtype=torch.float64)[:, : z.d]
    shift = torch.randint(0, 2, (z.b, z.g, 1, 1), generator=r).double() * 2 - 1
    return Draft(
        q=sign * eye[channel],
        k=(codes * shift).expand(z.b, z.g, z.s, z.d),
        v=torch.randint(0, 2, (z.b, z.g, z.s, z.e), generator=r).double(),
        grad_out=torch.randint(0, 2, (z.b, z.h, z.t, z.e), generator=r).double(),
        scale=2.0 ** math.ceil(math.log2(750)),
        exact=True,
    )


FAMILIES: dict[str, Family] = {
    "exact": Family(_exact, "every partial sum is exact: zero tolerance is right", exact=True),
    "gaussian": Family(_gaussian, "N(0, 1)"),
    "equal": Family(_equal, "all queries, keys and values equal"),
    "tied": Family(_tied, "tied maxima, values of one sign"),
    "one_hot": Family(_one_hot, "one large entry in each query and key"),
    "outlier": Family(_outlier, "N(0, 1) + N(0, 100) x Bernoulli(0.001)"),
    "dominant": Family(_dominant, "one key wins by far"),
    "sink_key": Family(_sink_key, "the first key draws the weight and carries no value"),
    "resonant": Family(_resonant, "queries and keys share a wave along the head dimension"),
    "logit_offset": Family(_logit_offset, "a common, exactly representable offset on all scores"),
    "key_direction": Family(_key_direction, "keys far out along one direction"),
    "subnormal": Family(_subnormal, "magnitudes around the smallest normal float"),
    "huge_values": Family(_huge_values, "values a quarter of the largest float", extreme=True),
    "huge_keys": Family(_huge_keys, "scores beyond the range of the dtype", extreme=True),
    "dtype_max": Family(_dtype_max, "plus or minus the largest float", extreme=True),
}
