"""Linear maps through oneDNN with a weight that is laid out once, for inference on a CPU.

oneDNN reads a weight fastest in an order of its own. Torch offers that without autograd and as a
private operation, so the plain way is always there, and every doubt is settled in its favour. On
some processors it is slower: each kind of call is timed once in a process, see :func:`_is_faster`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from stabletx._precision import is_sixteen_bit
from stabletx.functional._sight import values_may_be_read
from stabletx.functional.activations import gelu

# oneDNN streams a weight as fast for four rows as for one, with a better kernel; measured.
FEWEST_ROWS = 4
_ROWS_TIMED = 128
# Entries of a weight that are looked at in each call, along each axis.
_PROBES = 16

_Kind = tuple[torch.dtype, torch.Size, int, bool, int]
_faster: dict[_Kind, bool] = {}


class _State(NamedTuple):
    """A packed weight, and what it was packed from."""

    packed: Tensor
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
            and weight._version == self.version
            and weight.dtype == source.dtype
            and weight.shape == source.shape
            and weight.stride() == source.stride()
            # A write through ``.data`` leaves the version as it was.
            and torch.equal(self.seen, self.then)
        )


@final
class Prepacked:
    """One weight in oneDNN's order, packed when first used and again whenever it has changed.

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

        ``always`` leaves out the question which is faster, but not whether oneDNN can.
        """
        if not can_prepack(x, weight, bias):
            return None
        if not always and not self._pays(x, weight, bias, then_gelu):
            return None
        out = _multiply(x, self._packed(weight), bias, then_gelu)
        # In 16 bits oneDNN's GELU doubles its input first. A finite sum proves every entry finite.
        if then_gelu and is_sixteen_bit(out.dtype) and not bool(out.sum().isfinite()):
            return None
        return out

    def _pays(self, x: Tensor, weight: Tensor, bias: Tensor | None, then_gelu: bool) -> bool:
        if torch.are_deterministic_algorithms_enabled():
            return False
        kind = _kind(weight, x.numel() // x.shape[-1], then_gelu)
        known = _faster.get(kind)
        if known is None:
            x = x.reshape(-1, x.shape[-1])
            known = _is_faster(x, weight, self._packed(weight), bias, then_gelu)
            _faster[kind] = known
            if not known:
                self.forget()
        return known

    def _packed(self, weight: Tensor) -> Tensor:
        state = self._state
        if state is None or not state.is_of(weight):
            state = self._state = _pack(weight)
        return state.packed


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
        and not weight.is_inference()
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
        torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
        and hasattr(operations, "_linear_pointwise")
        and hasattr(operations, "_reorder_linear_weight")
        and (dtype == torch.float32 or operations._is_mkldnn_bf16_supported())
    )


def _pack(weight: Tensor) -> _State:
    with torch.no_grad():
        source = weight.detach()
        packed = torch.ops.mkldnn._reorder_linear_weight(source.contiguous())
        steps = [max(1, size // _PROBES) for size in source.shape]
        seen = source[:: steps[0], :: steps[1]]
        return _State(packed, source, weight._version, seen, seen.clone())


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None, then_gelu: bool) -> Tensor:
    n_rows = x.numel() // x.shape[-1]
    after = ("gelu", [], "none") if then_gelu else ("none", [], "")
    multiply = torch.ops.mkldnn._linear_pointwise
    if n_rows >= FEWEST_ROWS:
        out: Tensor = multiply(x, packed, bias, *after)
        return out
    rows = nn.functional.pad(x.reshape(n_rows, -1), (0, 0, 0, FEWEST_ROWS - n_rows))
    few: Tensor = multiply(rows, packed, bias, *after)[:n_rows]
    return few.view(*x.shape[:-1], few.shape[-1])


def _kind(weight: Tensor, n_rows: int, then_gelu: bool) -> _Kind:
    # One token, a few (decoding), or many.
    size = 0 if n_rows == 1 else 1 if n_rows < 32 else 2
    return weight.dtype, weight.shape, size, then_gelu, torch.get_num_threads()


def _is_faster(
    x: Tensor,  # (n, m)
    weight: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    then_gelu: bool,
) -> bool:
    """Time both ways turn by turn on some rows; the shortest of each counts."""
    x = x[:_ROWS_TIMED]

    def plainly() -> Tensor:
        out = nn.functional.linear(x, weight, bias)
        return gelu(out) if then_gelu else out

    def prepacked() -> Tensor:
        return _multiply(x, packed, bias, then_gelu)

    plainly()
    prepacked()
    times = [(_seconds(prepacked), _seconds(plainly)) for _ in range(3)]
    return min(ours for ours, _ in times) < min(plain for _, plain in times)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
