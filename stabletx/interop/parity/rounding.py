"""How far rounding alone can move a model: random rounding, in float64.

The model runs in float64 while every weight, and what every layer reads and writes, is moved by up
to one unit in the last place of a narrower dtype, at random. What comes out of a few such runs is
the size of that dtype's errors at each stage of this very model on these very inputs. What rounding
can explain is twice that, and for the partial sums, whose order is the runtime's own, the root of
the number of terms times the size for the dtype that sums are kept in. An error beyond it has
another cause.

Source: Parker (1997), Monte Carlo arithmetic; Higham & Mary (2019), SIAM J. Sci. Comput. 41(5), for
the root of the number of terms.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stabletx._precision import compute_dtype
from stabletx.interop.parity.stages import Staged, of_real_tokens
from stabletx.models import SequenceClassifier

_DRAWS = 4


def distances(stages: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Give for each stage how far the worst token is from where it should be, as a 2-norm.

    NaN where something is not finite.
    """
    pairs = zip(stages, exact, strict=True)
    return [float((a - b).norm(dim=-1).max()) if len(a) else 0.0 for a, b in pairs]


def rounding_bounds(
    model: SequenceClassifier,  # in float64
    ids: Tensor,  # (b, n)
    keep: Tensor,  # (b, n) bool
    exact: Sequence[Tensor],
    dtype: torch.dtype,
) -> list[float]:
    """Give for each stage the largest distance from ``exact`` that rounding can explain."""
    stored = _sizes(model, ids, keep, exact, dtype)
    sums = compute_dtype(dtype)
    summed = stored if sums == dtype else _sizes(model, ids, keep, exact, sums)
    widths = [m.in_features for m in model.modules() if isinstance(m, nn.Linear)]
    n_terms = max(*widths, ids.shape[1])
    return [2 * a + math.sqrt(n_terms) * b for a, b in zip(stored, summed, strict=True)]


def _sizes(
    model: SequenceClassifier,
    ids: Tensor,
    keep: Tensor,
    exact: Sequence[Tensor],
    dtype: torch.dtype,
) -> list[float]:
    """Give for each stage the largest distance that random rounding to ``dtype`` makes."""
    generator = torch.Generator().manual_seed(0)
    sizes = [0.0] * len(exact)
    for _ in range(_DRAWS):
        shaken = copy.deepcopy(model)
        _shake(shaken, torch.finfo(dtype).eps, generator)
        stages = of_real_tokens(Staged(shaken)(ids, keep), keep)
        sizes = [max(a, b) for a, b in zip(sizes, distances(stages, exact), strict=True)]
    return sizes


def _shake(model: nn.Module, eps: float, generator: torch.Generator) -> None:
    """Move the weights, and let every layer move what it reads and writes."""

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x * (1 + eps * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1))

    for parameter in model.parameters():
        parameter.copy_(moved(parameter))
    for module in model.modules():
        module.register_forward_pre_hook(lambda _, args: tuple(moved(x) for x in args))
        module.register_forward_hook(lambda _, args, out: moved(out))
