"""Linear maps with a weight that is laid out once as a kernel reads it, for inference on a CPU.

Two ways besides torch's own. oneDNN reads a weight fastest in an order of its own; torch offers
that without autograd and as a private operation. And for one row a transposed weight is read in
the order in which it lies. Which is fastest depends on the processor and the shape, so each kind
of call is timed once in a process, see :func:`_fastest`; every doubt is settled for the plain way.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from stabletx._precision import is_sixteen_bit
from stabletx.functional._sight import values_may_be_read
from stabletx.functional.activations import gelu

# oneDNN streams a weight as fast for four rows as for one, with a better kernel; measured.
FEWEST_ROWS = 4
_ROWS_TIMED, _TURNS = 128, 4
_MANY = 32  # rows; below, reading the weight takes longer than multiplying by it
_CACHE = 2**25  # bytes
# Entries of a weight that are looked at in each call, along each axis.
_PROBES = 4

Way = Literal["plain", "onednn", "transposed"]
_Kind = tuple[torch.dtype, torch.Size, int, bool, int]
_found: dict[_Kind, Way] = {}


class _State(NamedTuple):
    """A weight as it is wanted, once it was, and what it was made from."""

    packed: dict[Way, Tensor]
    # Keeps the memory that was packed, so that no other weight can come to lie at its address.
    source: Tensor
    version: int
    seen: Tensor  # some entries of the source, as a view
    then: Tensor  # the same entries as they were

    def is_of(self, weight: Tensor) -> bool:
        """Tell whether the weight is still what was packed."""
        source = self.source
        return (
            weight.data_ptr() == source.data_ptr()
            and _version(weight) == self.version
            and weight.dtype == source.dtype
            and weight.shape == source.shape
            and weight.stride() == source.stride()
            # Not every write is counted: not through ``.data``, nor to what inference mode made.
            and torch.equal(self.seen, self.then)
        )


@final
class Prepacked:
    """One weight in other orders, made when first used and again whenever it has changed.

    A copy holds nothing and packs anew.
    """

    def __init__(self) -> None:
        self._state: _State | None = None

    def __reduce__(self) -> tuple[type[Prepacked], tuple[()]]:
        return Prepacked, ()

    def forget(self) -> None:
        """Free the packed weight."""
        self._state = None

    def apply(
        self,
        x: Tensor,  # (..., m)
        weight: Tensor,  # (f, m)
        bias: Tensor | None,  # (f,)
        *,
        then_gelu: bool = False,
        always: bool = False,
    ) -> Tensor | None:  # (..., f)
        """Give ``x @ weight.T + bias``, its GELU if asked; None where the plain way is due.

        ``always`` takes oneDNN wherever it can, whether it is faster or not.
        """
        if not can_prepack(x, weight, bias):
            return None
        way = "onednn" if always else self._way(x, weight, bias, then_gelu)
        if way == "plain":
            return None
        out = _multiply(x, way, self._packed(weight, way), bias, then_gelu)
        # In 16 bits oneDNN's GELU doubles its input first. A finite sum proves every entry finite.
        if then_gelu and is_sixteen_bit(out.dtype) and not bool(out.sum().isfinite()):
            return None
        return out

    def _way(self, x: Tensor, weight: Tensor, bias: Tensor | None, then_gelu: bool) -> Way:
        if torch.are_deterministic_algorithms_enabled():
            return "plain"
        n_rows = x.numel() // x.shape[-1]
        kind = _kind(weight, n_rows, then_gelu)
        way = _found.get(kind)
        if way is None:
            ways: tuple[Way, ...] = ("onednn",)
            if n_rows == 1 and weight.dtype == torch.float32:
                ways = ("onednn", "transposed")
            packed = {way: _pack(weight, way) for way in ways}
            x = x.reshape(-1, x.shape[-1])[:_ROWS_TIMED]
            way = _found[kind] = _fastest(x, weight, packed, bias, then_gelu)
        return way

    def _packed(self, weight: Tensor, way: Way) -> Tensor:
        state = self._state
        if state is None or not state.is_of(weight):
            state = self._state = _observe(weight)
        if way not in state.packed:
            state.packed[way] = _pack(weight, way)
        return state.packed[way]


def can_prepack(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tell whether oneDNN takes this call, and nothing is asked of it but numbers."""
    return (
        not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and values_may_be_read(x)
        # Not a weight that a parametrization computes, or that some other library stands in for.
        and type(weight) is nn.Parameter
        and type(x) in (Tensor, nn.Parameter)
        and weight.device.type == "cpu"
        and (weight.dtype == torch.float32 or weight.dtype == torch.bfloat16)
        and x.dtype == weight.dtype
        and (bias is None or bias.dtype == weight.dtype)
        and x.numel() > 0
        and weight.numel() > 0
        and x.shape[-1] == weight.shape[1]
        and not torch.is_autocast_enabled("cpu")
        and _has_onednn(weight.dtype)
    )


def _has_onednn(dtype: torch.dtype) -> bool:
    operations = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch._C._get_mkldnn_enabled()
        and hasattr(operations, "_linear_pointwise")
        and hasattr(operations, "_reorder_linear_weight")
        and (dtype == torch.float32 or operations._is_mkldnn_bf16_supported())
    )


def _observe(weight: Tensor) -> _State:
    with torch.no_grad():
        source = weight.detach()
        steps = [max(1, size // _PROBES) for size in source.shape]
        seen = source[:: steps[0], :: steps[1]]
        return _State({}, source, _version(weight), seen, seen.clone())


def _version(weight: Tensor) -> int:
    return -1 if weight.is_inference() else weight._version


def _pack(weight: Tensor, way: Way) -> Tensor:
    with torch.no_grad():
        weight = weight.detach()
        if way == "transposed":
            return weight.t().contiguous()
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        return packed


def _multiply(x: Tensor, way: Way, packed: Tensor, bias: Tensor | None, then_gelu: bool) -> Tensor:
    n_rows = x.numel() // x.shape[-1]
    if way == "transposed":
        rows = x.reshape(n_rows, -1)
        out = rows @ packed if bias is None else torch.addmm(bias, rows, packed)
        out = out.view(*x.shape[:-1], out.shape[-1])
        return gelu(out) if then_gelu else out
    after: tuple[object, ...] = ("gelu", [], "none") if then_gelu else ("none", [], "")
    multiply = torch.ops.mkldnn._linear_pointwise
    if n_rows >= FEWEST_ROWS:
        many: Tensor = multiply(x, packed, bias, *after)
        return many
    rows = nn.functional.pad(x.reshape(n_rows, -1), (0, 0, 0, FEWEST_ROWS - n_rows))
    few: Tensor = multiply(rows, packed, bias, *after)[:n_rows]
    return few.view(*x.shape[:-1], few.shape[-1])


def _kind(weight: Tensor, n_rows: int, then_gelu: bool) -> _Kind:
    # One token, a few (decoding), or many.
    size = 0 if n_rows == 1 else 1 if n_rows < _MANY else 2
    return weight.dtype, weight.shape, size, then_gelu, torch.get_num_threads()


def _fastest(
    x: Tensor,  # (n, m)
    weight: Tensor,
    packed: dict[Way, Tensor],
    bias: Tensor | None,
    then_gelu: bool,
) -> Way:
    """Time every way turn by turn on some rows; the shortest time of each counts."""

    def plainly() -> Tensor:
        out = nn.functional.linear(x, weight, bias)
        return gelu(out) if then_gelu else out

    ways: dict[Way, Callable[[], Tensor]] = {"plain": plainly}
    for way, laid_out in packed.items():
        ways[way] = partial(_multiply, x, way, laid_out, bias, then_gelu)
    # A step of decoding reads every weight once, so it finds none of them in the cache.
    other = torch.zeros(_CACHE // 4 if len(x) < _MANY else 0)
    for call in ways.values():
        call()
    turns = [{way: _seconds(call, other) for way, call in ways.items()} for _ in range(_TURNS)]
    return min(ways, key=lambda way: min(turn[way] for turn in turns))


def _seconds(call: Callable[[], object], other: Tensor) -> float:
    other.add_(1)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
