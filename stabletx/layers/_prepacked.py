"""Linear maps with a weight that is laid out once as a kernel reads it, for inference on a CPU.

Two ways besides torch's own. oneDNN reads a weight fastest in an order of its own; torch offers
that without autograd and as a private operation. And for one row a transposed weight is read in
the order in which it lies. Which is fastest depends on the processor and the shape, so each kind
of call is timed once in a process, see :func:`_fastest`; every doubt is settled for the plain way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from stabletx._precision import is_sixteen_bit
from stabletx.functional._sight import values_may_be_read
from stabletx.functional.activations import gelu

# oneDNN streams a weight as fast for four rows as for one, with a better kernel; measured.
FEWEST_ROWS = 4
_ROWS_TIMED, _TURNS = 128, 5
_MANY = 32  # rows; below, reading the weight takes longer than multiplying by it
_CACHE = 2**25  # bytes
_COPIED = 2**23  # bytes of copies of a weight, in its timing
# Entries of a weight that are looked at in each call, along each axis.
_PROBES = 4

Way = Literal["plain", "onednn", "transposed"]
_Kind = tuple[torch.dtype, torch.Size, int, bool, int]
_found: dict[_Kind, Way] = {}


class Ready(NamedTuple):
    """A linear map with all choices made, for many calls while its weight stays as it is."""

    way: Way
    weight: Tensor  # as the way reads it
    bias: Tensor | None
    then_gelu: bool

    def __call__(self, x: Tensor) -> Tensor:  # (n, m) -> (n, f)
        """Give ``x @ weight.T + bias``, or its GELU."""
        return _multiply(x, *self)

    def plus(self, x: Tensor, stream: Tensor) -> Tensor:  # (n, m), (n, f) -> (n, f)
        """Give ``stream + x @ weight.T + bias``."""
        if self.way == "onednn" and len(x) >= FEWEST_ROWS:
            multiply = torch.ops.mkldnn._linear_pointwise.binary
            out: Tensor = multiply(x, stream, self.weight, self.bias, "add")
            return out
        return self(x).add_(stream)


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
        ready = self.ready(x, weight, bias, then_gelu=then_gelu, always=always)
        if ready.way == "plain":
            return None
        out = _multiply(x, *ready)
        # In 16 bits oneDNN's GELU doubles its input first. A finite sum proves every entry finite.
        if then_gelu and is_sixteen_bit(out.dtype) and not bool(out.sum().isfinite()):
            return None
        return out

    def ready(
        self,
        x: Tensor,  # (..., m)
        weight: Tensor,  # (f, m)
        bias: Tensor | None,  # (f,)
        *,
        then_gelu: bool = False,
        always: bool = False,
    ) -> Ready:
        """Choose how rows like those of ``x`` are multiplied; see :meth:`apply`."""
        if torch.is_grad_enabled() or not onednn_takes(x, weight, bias):
            return Ready("plain", weight, bias, then_gelu)
        way = "onednn" if always else self._way(x, weight, bias, then_gelu)
        laid_out = weight if way == "plain" else self._packed(weight, way)
        return Ready(way, laid_out, bias, then_gelu)

    def _way(self, x: Tensor, weight: Tensor, bias: Tensor | None, then_gelu: bool) -> Way:
        if torch.are_deterministic_algorithms_enabled():
            return "plain"
        n_rows = x.numel() // x.shape[-1]
        kind = _kind(weight, n_rows, then_gelu)
        way = _found.get(kind)
        if way is None:
            ways: tuple[Way, ...] = ("plain", "onednn")
            if n_rows == 1 and weight.dtype == torch.float32:
                ways = ("plain", "onednn", "transposed")
            x = x.reshape(-1, x.shape[-1])[:_ROWS_TIMED]
            way = _found[kind] = _fastest(x, weight, ways, bias, then_gelu)
        return way

    def _packed(self, weight: Tensor, way: Way) -> Tensor:
        state = self._state
        if state is None or not state.is_of(weight):
            state = self._state = _observe(weight)
        if way not in state.packed:
            state.packed[way] = _pack(weight, way)
        return state.packed[way]


def onednn_takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tell whether oneDNN takes this call, and nothing is asked of it but numbers."""
    return (
        is_but_numbers(x)
        # Not a weight that a parametrization computes, or that some other library stands in for.
        and type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and (weight.dtype == torch.float32 or weight.dtype == torch.bfloat16)
        and x.dtype == weight.dtype
        and weight.layout == torch.strided
        # Of a bias oneDNN reads as many neighbours as there are outputs, whatever lies there.
        and (bias is None or _is_vector_of(bias, weight))
        and x.numel() > 0
        and weight.numel() > 0
        and x.shape[-1] == weight.shape[1]
        and not torch.is_autocast_enabled("cpu")
        and _has_onednn(weight.dtype)
    )


def is_but_numbers(x: Tensor) -> bool:
    """Tell whether ``x`` lies on a CPU and no subclass, transform or tracer goes with it."""
    return values_may_be_read(x) and type(x) in (Tensor, nn.Parameter) and not _is_followed()


def _is_vector_of(bias: Tensor, weight: Tensor) -> bool:
    return (
        type(bias) is nn.Parameter
        and bias.shape == weight.shape[:1]
        and bias.is_contiguous()
        and bias.dtype == weight.dtype
        and bias.device == weight.device
    )


def _is_followed() -> bool:
    """Tell whether tangents, a tracer or a mode such as a count of operations follow the data."""
    return (
        torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
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
        if way == "plain":
            return weight.clone()  # for its timing; elsewhere the weight itself is read
        if way == "transposed":
            return weight.t().contiguous()
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        return packed


def _multiply(x: Tensor, way: Way, packed: Tensor, bias: Tensor | None, then_gelu: bool) -> Tensor:
    if way == "plain":
        out = nn.functional.linear(x, packed, bias)
        return gelu(out) if then_gelu else out
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
    few: Tensor = multiply(_filled_up(x.reshape(n_rows, -1)), packed, bias, *after)[:n_rows]
    return few.view(*x.shape[:-1], few.shape[-1])


def _filled_up(x: Tensor) -> Tensor:  # (n, m) -> (at least FEWEST_ROWS, m)
    n_more = FEWEST_ROWS - x.shape[0]
    return nn.functional.pad(x, (0, 0, 0, n_more)) if n_more > 0 else x


def _kind(weight: Tensor, n_rows: int, then_gelu: bool) -> _Kind:
    # One token, a few (decoding), or many.
    size = 0 if n_rows == 1 else 1 if n_rows < _MANY else 2
    return weight.dtype, weight.shape, size, then_gelu, torch.get_num_threads()


def _fastest(
    x: Tensor,  # (n, m)
    weight: Tensor,
    ways: tuple[Way, ...],
    bias: Tensor | None,
    then_gelu: bool,
) -> Way:
    """Time some ways turn by turn on some rows; the shortest time of each counts.

    Decoding reads one weight after another, each once a step: it finds none of them in the cache,
    but the code that reads them. So few rows are multiplied by several copies in a row.
    """
    is_few = len(x) < _MANY
    # A step of decoding fills its rows up once, not at each product.
    rows: dict[Way, Tensor] = {"plain": x, "transposed": x, "onednn": _filled_up(x)}
    # A weight larger than the cache does not stay there from one call to the next.
    n_copies = max(2, min(8, _COPIED // weight.nbytes))
    n_copies = n_copies if is_few and weight.nbytes <= _CACHE else 1
    calls = {
        way: [
            partial(_multiply, rows[way], way, _pack(weight, way), bias, then_gelu)
            for _ in range(n_copies)
        ]
        for way in ways
    }
    other = torch.zeros(_CACHE // 4 if is_few else 0, device="cpu")
    turns = [{way: _seconds(calls[way], other) for way in ways} for _ in range(_TURNS)]
    return min(ways, key=lambda way: min(turn[way] for turn in turns[1:]))


def _seconds(calls: Sequence[Callable[[], Tensor]], other: Tensor) -> float:
    other.sum()
    first, *others = calls
    first()
    start = time.perf_counter()
    for call in others or calls:
        call()
    return time.perf_counter() - start
