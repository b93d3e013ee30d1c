"""Twenty-two situations in which attentions fail, in four dtypes: one table for every method.

``python -m tests.hard_cases`` prints how many of the 88 each implementation gets wrong. A situation
is wrong where the output or a gradient is not finite although the exact one is, leaves the derived
bound, or is off by more than 1.02 ulp at the condition scale in a 16-bit dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stabletx.testing.reference import reference_attention, reference_gradients
from stabletx.testing.tolerances import attention_error_bound, condition_scales, condition_ulps

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LARGEST_ERROR = 1.02  # cULP: one rounding of the result and one of a partial sum


class Situation(NamedTuple):
    """Inputs of one attention call with its upstream gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None  # bool (b, h, t, s), each full or 1
    bias: Tensor | None = None
    scale: float | None = None
    grad_out: Tensor | None = None


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _qkv(dtype: torch.dtype, n: int = 24, d: int = 16, factor: float = 1.0) -> list[Tensor]:
    q, k, v = (_normal(1, 2, n, d, seed=seed) for seed in (1, 2, 3))
    return [(q * factor).to(dtype), (k * factor).to(dtype), v.to(dtype)]


def _causal(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()[None, None]


def _left_padded(n: int) -> Tensor:
    keep = (torch.arange(n) >= 4)[None, None, None]
    return keep & _causal(n)


def _one_dead_row(n: int) -> Tensor:
    mask = torch.ones(1, 1, n, n, dtype=torch.bool)
    mask[:, :, 3] = False
    return mask


def _garbage(dtype: torch.dtype, value: float, what: str, mask: Tensor, first: int) -> Situation:
    q, k, v = _qkv(dtype)
    for x, name in ((k, "k"), (v, "v")):
        if name in what:
            x[:, :, first:] = value
    return Situation(q, k, v, mask)


def _last_hidden(n: int = 24) -> Tensor:
    return (torch.arange(n) < 18)[None, None, None].expand(1, 1, n, n)


def _dead_row_bool(dtype: torch.dtype) -> Situation:
    return Situation(*_qkv(dtype), mask=_one_dead_row(24))


def _dead_row_nan_upstream(dtype: torch.dtype) -> Situation:
    q, k, v = _qkv(dtype)
    grad_out = _normal(1, 2, 24, 16, seed=4).to(dtype)
    grad_out[:, :, 3] = math.nan
    return Situation(q, k, v, _one_dead_row(24), grad_out=grad_out)


def _dead_row_infinite_bias(dtype: torch.dtype) -> Situation:
    bias = torch.zeros(1, 1, 24, 24, dtype=dtype).masked_fill(~_one_dead_row(24), -math.inf)
    return Situation(*_qkv(dtype), bias=bias)


def _dead_rows_left_padding(dtype: torch.dtype) -> Situation:
    return Situation(*_qkv(dtype), mask=_left_padded(24))


def _dead_example(dtype: torch.dtype) -> Situation:
    return Situation(*_qkv(dtype), mask=torch.zeros(1, 2, 24, 24, dtype=torch.bool))


def _large_logits(size: float) -> Callable[[torch.dtype], Situation]:
    return lambda dtype: Situation(*_qkv(dtype, factor=math.sqrt(size)))


def _common_offset(dtype: torch.dtype) -> Situation:
    small = torch.randint(-2, 3, (2, 1, 2, 24, 7), generator=torch.Generator().manual_seed(0))
    ones = torch.ones(1, 2, 24, 1, dtype=torch.float64)
    # An offset that the dtype holds exactly, so that the answer does not depend on it.
    offset = 2.0 ** (20 if dtype in (torch.float64, torch.float32) else 6)
    q, k = torch.cat([ones, small[0]], -1), torch.cat([offset * ones, small[1] / 4], -1)
    return Situation(q.to(dtype), k.to(dtype), _normal(1, 2, 24, 8, seed=3).to(dtype), scale=1.0)


def _constant_bias(dtype: torch.dtype) -> Situation:
    bias = torch.full((1, 1, 24, 24), 2.0**14, dtype=dtype)
    return Situation(*_qkv(dtype), bias=bias)


def _largest_queries_and_keys(dtype: torch.dtype) -> Situation:
    sign = torch.sign(_normal(2, 1, 2, 24, 16, seed=5))
    largest = torch.finfo(dtype).max
    q, k = ((sign[i] * largest).to(dtype) for i in range(2))
    # Exact ties between such scores are decided by rounding, so that every key is made its own.
    k = k * torch.exp2(-torch.arange(24.0, dtype=torch.float64))[None, None, :, None].to(dtype)
    return Situation(q, k, _qkv(dtype)[2] / 64, grad_out=torch.zeros(1, 2, 24, 16, dtype=dtype))


def _values(factor: float) -> Callable[[torch.dtype], Situation]:
    def build(dtype: torch.dtype) -> Situation:
        q, k, v = _qkv(dtype)
        v = torch.full_like(v, torch.finfo(dtype).max * factor)
        grad_out = torch.full((1, 2, 24, 16), 2.0**-8, dtype=dtype)
        return Situation(torch.zeros_like(q), k, v, grad_out=grad_out)

    return build


def _hidden(value: float | str, what: str) -> Callable[[torch.dtype], Situation]:
    def build(dtype: torch.dtype) -> Situation:
        number = torch.finfo(dtype).max if value == "largest" else float(value)
        return _garbage(dtype, number, what, _last_hidden(), 18)

    return build


def _nan_in_the_last_value(dtype: torch.dtype) -> Situation:
    return _garbage(dtype, math.nan, "v", _causal(24), 23)


def _nan_query_with_few_keys(dtype: torch.dtype) -> Situation:
    q, k, v = _qkv(dtype, n=5)
    q[:, :, 2] = math.nan
    return Situation(q, k, v)


def _infinite_key(dtype: torch.dtype) -> Situation:
    q, k, v = _qkv(dtype)
    k[:, :, 20, 3] = math.inf
    return Situation(q, k, v, _causal(24))


def _long_rows(dtype: torch.dtype) -> Situation:
    q, k, v = _qkv(dtype, n=1024, d=8)
    return Situation(q[:, :, :4], k, v.abs())


def _tied_maxima(dtype: torch.dtype) -> Situation:
    q, k, v = _qkv(dtype, n=64)
    k[:, :, ::2] = k[:, :, :1]
    return Situation(q, k, -v.abs() - 0.5)


def _no_keys(dtype: torch.dtype) -> Situation:
    q, k, v = _qkv(dtype)
    return Situation(q, k[:, :, :0], v[:, :, :0])


SITUATIONS: dict[str, Callable[[torch.dtype], Situation]] = {
    "a row without keys": _dead_row_bool,
    "the same, NaN from above": _dead_row_nan_upstream,
    "the same, by -inf": _dead_row_infinite_bias,
    "left padding and causal": _dead_rows_left_padding,
    "an example without keys": _dead_example,
    "logits of 1e2": _large_logits(1e2),
    "logits of 1e3": _large_logits(1e3),
    "logits of 1e4": _large_logits(1e4),
    "a common logit offset": _common_offset,
    "a constant bias": _constant_bias,
    "largest queries and keys": _largest_queries_and_keys,
    "values at max/4": _values(0.25),
    "values at max": _values(1.0),
    "hidden NaN": _hidden(math.nan, "kv"),
    "hidden infinity": _hidden(math.inf, "kv"),
    "hidden largest": _hidden("largest", "kv"),
    "NaN in the last value, causal": _nan_in_the_last_value,
    "NaN query, five keys": _nan_query_with_few_keys,
    "infinite key, causal": _infinite_key,
    "long rows": _long_rows,
    "tied maxima": _tied_maxima,
    "no keys at all": _no_keys,
}

Implementation = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float], Tensor]


def verdict(implementation: Implementation, name: str, dtype: torch.dtype) -> str:
    """Say what an implementation gets wrong in a situation; an empty text where nothing."""
    case = SITUATIONS[name](dtype)
    grad_out = case.grad_out
    if grad_out is None:
        grad_out = _normal(*case.q.shape[:3], case.v.shape[3], seed=4).to(dtype)
    scale = case.q.shape[-1] ** -0.5 if case.scale is None else case.scale
    leaves = [x.detach().clone().requires_grad_() for x in (case.q, case.k, case.v)]
    try:
        out = implementation(*leaves, case.mask, case.bias, scale)
        found = [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError) as error:
        return type(error).__name__
    options = {"mask": case.mask, "bias": case.bias, "scale": scale}
    blind = reference_attention(case.q, case.k, case.v, **options).lse == -math.inf
    seen = grad_out.masked_fill(blind[..., None], 0.0)  # nothing flows from a row without keys
    expected = [
        reference_attention(case.q, case.k, case.v, **options).out,
        *reference_gradients(case.q, case.k, case.v, seen, **options)[:3],
    ]
    bounds = attention_error_bound(case.q, case.k, case.v, grad_out=seen, **options)[:4]
    scales = condition_scales(case.q, case.k, case.v, grad_out=seen, **options)[:4]
    for part, *rest in zip(("out", "dq", "dk", "dv"), found, expected, bounds, scales, strict=True):
        wrong = _wrong(*rest)
        if wrong:
            return f"{part} {wrong}"
    return ""


def _wrong(actual: Tensor, expected: Tensor, bound: Tensor, scale: Tensor) -> str:
    judged = expected.isfinite() & (expected.abs() + bound <= torch.finfo(actual.dtype).max)
    if not actual[judged].isfinite().all():
        return "not finite"
    if actual[expected.isnan()].isfinite().any():
        return "NaN lost"
    error = (actual.double() - expected).abs()
    if (error > bound)[judged].any():
        return "out of bound"
    if actual.dtype in (torch.bfloat16, torch.float16):
        ulps = condition_ulps(actual, expected, scale)
        finite = judged & ulps.isfinite() & (scale > torch.finfo(actual.dtype).tiny)
        if (ulps[finite] > LARGEST_ERROR).any():
            return "more than 1.02 cULP"
    return ""


def _added(mask: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or bias is None:
        return mask if bias is None else bias
    return bias.to(dtype).masked_fill(~mask, -math.inf)


def torch_default(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float
) -> Tensor:
    """Call torch's function as it is."""
    return F.scaled_dot_product_attention(q, k, v, _added(mask, bias, q.dtype), scale=scale)


def torch_math(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float
) -> Tensor:
    """Call torch's function with its plain backend."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch_default(q, k, v, mask, bias, scale)


def eager_with_additive_mask(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float
) -> Tensor:
    """Attend as the eager function of Hugging Face transformers does: finfo.min is added."""
    scores = q @ k.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores + torch.where(mask, 0.0, torch.finfo(q.dtype).min).to(q.dtype)
    if bias is not None:
        scores = scores + bias
    return (
        scores.softmax(-1, dtype=torch.float32 if q.dtype != torch.float64 else None).to(q.dtype)
        @ v
    )


def ours(method: str) -> Implementation:
    """Call ours by one method."""
    from tests.ways import attention

    def run(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float
    ) -> Tensor:
        return attention(q, k, v, mask=mask, bias=bias, scale=scale, method=method)

    return run


IMPLEMENTATIONS: dict[str, Implementation] = {
    "stabletx auto": ours("auto"),
    "stabletx kernel": ours("kernel"),
    "stabletx tiled": ours("tiled"),
    "stabletx exact": ours("exact"),
    "torch default": torch_default,
    "torch math": torch_math,
    "eager, additive mask": eager_with_additive_mask,
}


def main() -> None:
    """Print the table."""
    print(f"torch {torch.__version__}; {len(SITUATIONS)} situations x {len(DTYPES)} dtypes\n")
    for title, implementation in IMPLEMENTATIONS.items():
        wrong = [
            (name, str(dtype).removeprefix("torch."), text)
            for name in SITUATIONS
            for dtype in DTYPES
            if (text := verdict(implementation, name, dtype))
        ]
        print(f"{title}: {len(wrong)} of {len(SITUATIONS) * len(DTYPES)} wrong")
        for name, dtype, text in wrong:
            print(f"    {name}, {dtype}: {text}")


if __name__ == "__main__":
    main()
