"""What real kernels get wrong, as changes of the call: another mask, another scale, another head.

Each generator yields ``(name, sentence, call)``; the reference of the changed call is what a
kernel with that mistake computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from stabletx.testing.reference import (
    Gradients,
    Reference,
    reference_attention,
    reference_gradients,
)


class Call(NamedTuple):
    """One attention call."""

    q: Tensor  # (b, h, t, d)
    k: Tensor  # (b, g, s, d)
    v: Tensor  # (b, g, s, e)
    mask: Tensor | None = None
    bias: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    grad_out: Tensor | None = None

    @property
    def pairs(self) -> Tensor:  # (b, h, t, s)
        """Return the mask in full."""
        shape = (*self.q.shape[:3], self.k.shape[2])
        allowed = torch.ones(shape, dtype=torch.bool)
        if self.mask is not None:
            allowed = self.mask.expand(shape).clone()
        if self.bias is not None:
            allowed &= ~self.bias.isneginf().expand(shape)
        return allowed

    def result(self, of: str) -> Tensor | None:
        """Compute the output, or a gradient by its name, in float64."""
        if of == "out":
            return reference_attention(
                self.q, self.k, self.v, mask=self.mask, bias=self.bias, scale=self.scale,
                softcap=self.softcap, sinks=self.sinks,
            ).out  # fmt: skip
        return getattr(self.gradients(), of)  # type: ignore[no-any-return]

    def gradients(self) -> Gradients:
        """Compute the gradients in float64."""
        if self.grad_out is None:
            raise ValueError("grad_out must be given where a gradient is explained, got None.")
        return reference_gradients(
            self.q, self.k, self.v, self.grad_out, mask=self.mask, bias=self.bias,
            scale=self.scale, softcap=self.softcap, sinks=self.sinks,
        )  # fmt: skip


Changes = Iterator[tuple[str, str, Call]]


def changed_calls(call: Call) -> Changes:
    """Yield every known mistake that this call can show, the likeliest first."""
    yield from _masks(call)
    yield from _scales(call)
    yield from _heads(call)
    yield from _keys(call)
    yield from _extras(call)
    yield from _casts(call)


def _masks(call: Call) -> Changes:
    t, s = call.q.shape[2], call.k.shape[2]
    i, j = torch.arange(t)[:, None], torch.arange(s)[None, :]
    top_left, bottom_right = (j <= i)[None, None], (j <= i + s - t)[None, None]
    full = call.pairs
    keep = full.any(2, keepdim=True)
    for name, inside, other, sentence in (
        ("causal_top_left", bottom_right, top_left, "the causal mask is aligned top-left (query 0 "
         "with key 0) where bottom-right (last query with last key) is asked for"),
        ("causal_bottom_right", top_left, bottom_right, "the causal mask is aligned bottom-right "
         "(last query with last key) where top-left (query 0 with key 0) is asked for"),
    ):  # fmt: skip
        if t != s and not bool((full & ~inside).any()):
            yield name, sentence, call._replace(mask=other)
            yield name, sentence, call._replace(mask=keep & other)
    if call.mask is not None:
        yield from _changed_masks(call, call.mask.expand_as(full), keep)
    for name, triangle, where in (
        ("causal_added", top_left, "top-left"),
        ("causal_added_bottom_right", bottom_right, "bottom-right"),
    ):
        sentence = f"a causal mask ({where}) is applied on top of what is asked for"
        yield name, sentence, call._replace(mask=full & triangle)


def _changed_masks(call: Call, mask: Tensor, keep: Tensor) -> Changes:
    yield "mask_ignored", "the mask is ignored", call._replace(mask=None)
    inverted = "the mask is inverted: it blocks what may attend (True means the opposite there)"
    yield "mask_inverted", inverted, call._replace(mask=~mask)
    later = torch.cat([mask[..., :1], mask[..., :-1]], -1)
    earlier = torch.cat([mask[..., 1:], mask[..., -1:]], -1)
    yield "mask_shifted", "the mask is shifted by one towards later keys", call._replace(mask=later)
    yield (
        "mask_shifted",
        "the mask is shifted by one towards earlier keys",
        call._replace(mask=earlier),
    )
    yield (
        "padding_only",
        "only the key padding is applied, the rest of the mask is ignored",
        (call._replace(mask=keep.expand_as(mask))),
    )
    if mask.shape[2] == mask.shape[3]:
        yield "mask_transposed", "the mask is transposed", call._replace(mask=mask.mT)
    for axis, what in ((0, "example"), (1, "head")):
        if mask.shape[axis] > 1:
            first = mask.narrow(axis, 0, 1).expand_as(mask)
            yield (
                f"mask_of_first_{what}",
                f"the mask of the first {what} is used for all",
                (call._replace(mask=first)),
            )
    yield (
        "mask_added_as_number",
        "the boolean mask is added to the scores as 0 and 1",
        (call._replace(mask=None, bias=_plus(call.bias, mask.double()))),
    )
    for value in (-1e4, -1e9, torch.finfo(call.q.dtype).min):
        blocked = torch.where(mask, 0.0, value).double()
        yield (
            "finite_mask",
            f"blocked scores get {value:.3g} added instead of being left out",
            (call._replace(mask=None, bias=_plus(call.bias, blocked))),
        )


def _scales(call: Call) -> Changes:
    d, e, h = call.q.shape[3], call.v.shape[3], call.q.shape[1]
    if not d:
        return
    own = call.scale if call.scale is not None else d**-0.5
    tried = [("no_scale", 1.0, "the scores are not scaled")]
    if call.scale is not None:
        tried.append(("scale_ignored", d**-0.5, "scale= is ignored, d ** -0.5 is used"))
    tried += [
        ("scale_by_width", 1.0 / d, "the scores are divided by d, not by its root"),
        ("scale_twice", own * own, "the scale is applied twice"),
        ("scale_root", abs(own) ** 0.5, "only the root of the scale is applied"),
        ("scale_of_model", (h * d) ** -0.5, "the scale is that of d_model (all heads), not of d"),
        ("scale_of_values", max(e, 1) ** -0.5, "the scale is taken from the width of the values"),
    ]
    for size in (8, 16, 32, 64, 128):
        padded = -(-d // size) * size
        if padded != d:
            sentence = f"the scale is that of a head padded from {d} to {padded}"
            tried.append(("scale_of_padded", padded**-0.5, sentence))
    for name, scale, sentence in tried:
        if scale != own:
            yield name, sentence, call._replace(scale=scale)


def _heads(call: Call) -> Changes:
    h, g, b = call.q.shape[1], call.k.shape[1], call.q.shape[0]
    if g > 1:
        for name, index, sentence in (
            ("heads_modulo", torch.arange(h) % g, "query head i reads key head i % g, where "
             "i * g // h is asked for"),
            ("heads_first", torch.zeros(h).long(), "every query head reads the first key head"),
            ("heads_reversed", (torch.arange(h) * g // h).flip(0), "the key heads are reversed"),
        ):  # fmt: skip
            if bool((index != torch.arange(h) * g // h).any()):
                yield name, sentence, call._replace(k=call.k[:, index], v=call.v[:, index])
    if b > 1:
        yield (
            "first_example",
            "keys and values of the first example are used for all",
            (call._replace(k=call.k[:1].expand_as(call.k), v=call.v[:1].expand_as(call.v))),
        )
        yield (
            "batch_rolled",
            "each example reads the keys and values of its neighbour",
            (call._replace(k=call.k.roll(1, 0), v=call.v.roll(1, 0))),
        )


def _keys(call: Call) -> Changes:
    s, full = call.k.shape[2], call.pairs
    j = torch.arange(s)
    for name, seen, sentence in (
        ("last_key_dropped", j < s - 1, "the last key is dropped"),
        ("first_key_dropped", j > 0, "the first key is dropped"),
    ):
        yield name, sentence, call._replace(mask=full & seen)
    for block in (16, 32, 64, 128):
        rest = s % block
        if s > block and rest:
            sentence = f"the last {rest} keys, past a multiple of {block}, are dropped"
            yield "tail_dropped", sentence, call._replace(mask=full & (j < s - rest))
    for step in (1, -1):
        side = "later" if step < 0 else "earlier"
        yield (
            "keys_shifted",
            f"keys stand one position {side} than their values",
            (call._replace(k=call.k.roll(step, 2))),
        )
    if call.k.shape == call.v.shape:
        yield (
            "keys_and_values_swapped",
            "keys and values are swapped",
            (call._replace(k=call.v, v=call.k)),
        )


def _extras(call: Call) -> Changes:
    bias = call.bias
    if bias is not None:
        d = call.q.shape[3]
        own = call.scale if call.scale is not None else max(d, 1) ** -0.5
        yield "bias_forgotten", "the bias is forgotten", call._replace(bias=None)
        blocks = torch.where(bias.isneginf(), bias, 0.0)
        yield "bias_forgotten", "of the bias only its -inf is applied", call._replace(bias=blocks)
        negative = torch.where(bias.isneginf(), bias, -bias)
        yield "bias_negated", "the bias is subtracted", call._replace(bias=negative)
        yield (
            "bias_scaled",
            "the bias is added before the scaling",
            call._replace(bias=bias.double() * own),
        )
        if bias.shape[2] == bias.shape[3]:
            yield "bias_transposed", "the bias is transposed", call._replace(bias=bias.mT)
        for axis, what in ((0, "example"), (1, "head")):
            if bias.shape[axis] > 1:
                first = bias.narrow(axis, 0, 1)
                yield (
                    f"bias_of_first_{what}",
                    f"the bias of the first {what} is used for all",
                    (call._replace(bias=first)),
                )
    if call.softcap is not None:
        yield "softcap_forgotten", "the soft-cap is forgotten", call._replace(softcap=None)
    if call.sinks is not None:
        yield "sinks_forgotten", "the sinks are forgotten", call._replace(sinks=None)
        for name, sinks, sentence in (
            ("sinks_zero", torch.zeros_like(call.sinks), "the sinks are taken to be 0"),
            ("sinks_negated", -call.sinks, "the sinks have the wrong sign"),
            ("sinks_of_first_head", call.sinks[:1].expand_as(call.sinks), "the sink of the first "
             "head is used for all"),
        ):  # fmt: skip
            yield name, sentence, call._replace(sinks=sinks)


def _casts(call: Call) -> Changes:
    own = torch.finfo(call.q.dtype).eps
    for dtype in (torch.float16, torch.bfloat16):
        if torch.finfo(dtype).eps <= own:
            continue
        kind = str(dtype).removeprefix("torch.")

        def cast(x: Tensor, dtype: torch.dtype = dtype) -> Tensor:
            return x.to(dtype).to(x.dtype)

        also = " (TF32 rounds alike)" if dtype == torch.float16 else ""
        q, k, v = cast(call.q), cast(call.k), cast(call.v)
        yield (
            "queries_and_keys_cast",
            f"queries and keys are cast to {kind}{also}",
            (call._replace(q=q, k=k)),
        )
        yield "values_cast", f"the values are cast to {kind}{also}", call._replace(v=v)
        yield "inputs_cast", f"the inputs are cast to {kind}{also}", call._replace(q=q, k=k, v=v)


def _plus(bias: Tensor | None, more: Tensor) -> Tensor:
    return more if bias is None else bias.double() + more


def changed_results(call: Call, of: str, exact: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    """Yield mistakes that are no change of the call, with what they give in float64."""
    yield "zeros", "the result is 0 everywhere", torch.zeros_like(exact)
    if exact.shape[2] > 1:
        for step, side in ((1, "previous"), (-1, "next")):
            sentence = f"each row holds the result of the {side} one"
            yield "row_shifted", sentence, exact.roll(step, 2)
    if exact.shape[1] > 1:
        yield "heads_permuted", "the heads come out in reverse order", exact.flip(1)
        for step in (1, -1):
            yield "heads_permuted", f"the heads come out rotated by {step}", exact.roll(step, 1)
        mixed = exact.transpose(1, 2).reshape(exact.shape)
        sentence = "heads and positions are mixed up by a reshape without a transpose"
        yield "heads_reshaped", sentence, mixed
    if exact.shape[0] > 1:
        yield "batch_permuted", "the examples come out rotated", exact.roll(1, 0)
    if of == "out":
        yield from _wrong_softmax(call)
    elif of in ("dq", "dk", "dv"):
        yield from _wrong_backward(call, of)


def _wrong_softmax(call: Call) -> Iterator[tuple[str, str, Tensor]]:
    parts = reference_attention(
        call.q, call.k, call.v, mask=call.mask, bias=call.bias, scale=call.scale,
        softcap=call.softcap, sinks=call.sinks,
    )  # fmt: skip
    v = _repeated(call.v.double(), call.q.shape[1])
    top = parts.max_score.nan_to_num(neginf=0.0)
    sums = (parts.lse - top).exp().nan_to_num(posinf=0.0)
    yield from _kept_lower(call, parts, v)
    sentence = "the weights are not divided by their sum"
    yield "not_normalised", sentence, (parts.weights * sums.unsqueeze(-1)).nan_to_num() @ v
    even = call.pairs.double()
    even = even / even.sum(-1, keepdim=True).clamp(min=1.0)
    sentence = "every allowed key has the same weight: the scores have no effect"
    yield "uniform_weights", sentence, even @ v
    scores = parts.weights.log() + parts.lse.nan_to_num(neginf=0.0).unsqueeze(-1)
    columns = scores.softmax(2).nan_to_num()
    yield "softmax_over_queries", "the softmax runs over the queries, not the keys", columns @ v


def _kept_lower(call: Call, parts: Reference, v: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    """Round what a kernel stores between its steps."""
    scores = parts.weights.log() + parts.lse.nan_to_num(neginf=0.0).unsqueeze(-1)
    v = v.nan_to_num()
    for dtype in (torch.float16, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        told = f"; if that is meant, state it in a Profile(...={dtype})"
        kept = scores.to(dtype).double().softmax(-1).nan_to_num()
        yield "scores_stored", f"the scores are kept in {kind}{told}", kept @ v
        weights = parts.weights.to(dtype).double()
        yield "weights_stored", f"the weights are kept in {kind}{told}", weights @ v
        both = kept.to(dtype).double()
        sentence = f"scores and weights are kept in {kind}{told}"
        yield "scores_and_weights_stored", sentence, both @ v


def _wrong_backward(call: Call, of: str) -> Iterator[tuple[str, str, Tensor]]:
    h, g = call.q.shape[1], call.k.shape[1]
    if of in ("dk", "dv") and h > g:
        wide = call._replace(k=_repeated(call.k, h), v=_repeated(call.v, h)).result(of)
        assert wide is not None
        parts = in_groups(wide, g)
        for which, index in (("first", 0), ("last", -1)):
            sentence = f"of the query heads that share a key head only the {which} one counts"
            yield "group_not_summed", sentence, parts[:, :, index]
        yield "group_averaged", "query heads that share a key head are averaged", parts.mean(2)
    if of in ("dq", "dk") and call.grad_out is not None and call.softcap is None:
        weights = reference_attention(
            call.q, call.k, call.v, mask=call.mask, bias=call.bias, scale=call.scale,
            sinks=call.sinks,
        ).weights  # fmt: skip
        k, v = (_repeated(x.double(), h).nan_to_num() for x in (call.k, call.v))
        scale = call.scale if call.scale is not None else max(call.q.shape[3], 1) ** -0.5
        scores = weights * (call.grad_out.double() @ v.mT) * scale
        got = scores @ k
        if of == "dk":
            got = in_groups(scores.mT @ call.q.double(), g).sum(2)
        sentence = "sum(grad_out * out) is not subtracted in the backward pass of the softmax"
        yield "delta_missing", sentence, got


def in_groups(x: Tensor, g: int) -> Tensor:
    """Split the axis of query heads by the key head that they read."""
    grouped: Tensor = rearrange(x, "b (g r) ... -> b g r ...", g=g)
    return grouped


def _repeated(x: Tensor, h: int) -> Tensor:
    return x[:, torch.arange(h) * x.shape[1] // h]
