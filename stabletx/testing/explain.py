"""Say whether a difference is rounding, and if not, which known mistake it looks like."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stabletx.testing._attention_bound import attention_error_bound
from stabletx.testing._mistakes import Call, changed_calls, changed_results, in_groups
from stabletx.testing._symptoms import factor_between, recovered_dropout, scale_between, symptom
from stabletx.testing.assertions import compare, occupancies
from stabletx.testing.rounding import Profile

Of = Literal["out", "dq", "dk", "dv", "dbias", "dsinks"]

# A known mistake counts as likely where it leaves at most this share of the squared error.
_LIKELY = 0.01
# And it is looked at closely where it leaves at most this share.
_CLOSER = 0.25
# Lower precision explains an error that fills at least this share of what it allows.
_FILLED = 0.01


class Cause(NamedTuple):
    """A cause that was tried and found to fit."""

    name: str
    sentence: str
    certain: bool = True  # explains every place within its own bound


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain_difference` found.

    Attributes:
        within: the difference is what the dtype and these inputs explain.
        worst: the largest error over its bound; at most 1 where ``within``.
        first_place: index of the first place beyond its bound, or None.
        cause: one sentence.
        name: the cause in a word, such as ``causal_top_left``; ``rounding`` where ``within``,
            ``unknown`` where nothing that is known fits.
        certain: the cause explains every place within its own bound.
        detail: how many places, where, by how much.
    """

    within: bool
    worst: float
    first_place: tuple[int, ...] | None
    cause: str
    name: str
    certain: bool
    detail: str

    def __str__(self) -> str:
        """Return the verdict in a few lines."""
        verdict = "Within" if self.within else "Beyond"
        lead = "Cause" if self.certain else "Likely cause"
        lead = "No known cause fits" if self.name == "unknown" else lead
        return (
            f"{verdict} what this dtype and these inputs explain.\n{lead}: {self.cause}."
            f"\n{self.detail}"
        )

    def __repr__(self) -> str:
        """Return the same text, for a prompt."""
        return str(self)

    def _repr_html_(self) -> str:
        """Return the same text for a notebook."""
        colour = "#2a7d3f" if self.within else "#b3261e"
        first, *rest = str(self).split("\n")
        body = "<br>".join(html.escape(line) for line in rest)
        return f'<div><b style="color:{colour}">{html.escape(first)}</b><br>{body}</div>'


def explain_difference(
    actual: Tensor,
    expected: Tensor,
    q: Tensor,  # (b, h, t, d)
    k: Tensor,  # (b, g, s, d)
    v: Tensor,  # (b, g, s, e)
    *,
    mask: Tensor | None = None,  # bool, (b, h, t, s), each axis full or 1
    bias: Tensor | None = None,  # (b, h, t, s), each axis full or 1
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (h,)
    grad_out: Tensor | None = None,  # (b, h, t, e)
    of: Of = "out",
    profile: Profile | None = None,
) -> Explanation:
    """Explain how ``actual`` differs from ``expected``.

    Args:
        actual: what the attention under test computed.
        expected: what it is compared with, exact or itself rounded.
        q: the queries of the call; all that follows is as the call should be.
        k: keys.
        v: values.
        mask: True = may attend.
        bias: added to the scores.
        scale: None takes ``d ** -0.5``.
        softcap: None leaves the scores alone.
        sinks: one score a head.
        grad_out: upstream gradient, needed where a gradient is explained.
        of: what ``actual`` is: "out" or a gradient, "dq", "dk", "dv", "dbias", "dsinks".
        profile: what the kernel states about itself; what it states is allowed.

    Returns:
        The verdict, the first place and the likely cause, found by trying the known mistakes.

    Raises:
        ValueError: a gradient without ``grad_out``, shapes of q, k and v that do not fit.

    Numerics: float64 throughout; tens of reference computations where there is a difference.

    >>> x = torch.ones(1, 1, 2, 4)
    >>> explain_difference(x, x, x, x, x).name
    'rounding'
    """
    tensors = (None if x is None else x.detach().cpu() for x in (mask, bias, sinks, grad_out))
    own_mask, own_bias, own_sinks, own_grad = tensors
    call = Call(
        q.detach().cpu(), k.detach().cpu(), v.detach().cpu(), own_mask, own_bias,
        scale, softcap, own_sinks, own_grad,
    )  # fmt: skip
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    if actual.shape != expected.shape:
        return _of_wrong_shape(actual, expected)
    exact, bound = _exact(call, of, profile)
    slack = bound
    if expected.dtype != torch.float64 or q.dtype == torch.float64:
        slack = bound + _exact(_in_dtype_of(call, expected), of, profile)[1]
    found = compare(slack, actual, expected, of)
    if found.within:
        return _of_rounding(found.occupancy, found.worst, actual.dtype)
    detail = found.message.rsplit("\n", 1)[0]
    wrong_side = ""
    if compare(bound, actual, exact).within:
        # The judge is the culprit: explain it instead.
        actual, wrong_side = expected, "it is the expected value that is off: "
    cause = _cause(call, of, actual, exact, bound)
    return Explanation(
        within=False,
        worst=found.occupancy,
        first_place=found.first,
        cause=wrong_side + cause.sentence,
        name=cause.name,
        certain=cause.certain,
        detail=detail,
    )


def _of_rounding(
    occupancy: float, worst: tuple[int, ...] | None, dtype: torch.dtype
) -> Explanation:
    kind = str(dtype).removeprefix("torch.")
    place = "" if worst is None else f", at {list(worst)}"
    return Explanation(
        within=True,
        worst=occupancy,
        first_place=None,
        cause=f"expected rounding: no error is larger than {kind} and these inputs allow",
        name="rounding",
        certain=True,
        detail=f"The largest error is {occupancy:.3g} of its bound{place}.",
    )


def _of_wrong_shape(actual: Tensor, expected: Tensor) -> Explanation:
    swapped = actual.ndim == 4 and actual.transpose(1, 2).shape == expected.shape
    hint = "; heads and positions are transposed" if swapped else ""
    shapes = f"actual is {tuple(actual.shape)} and expected {tuple(expected.shape)}"
    sentence = f"the shapes differ: {shapes}{hint}"
    return Explanation(False, float("inf"), None, sentence, "shape", True, "Nothing was compared.")


def _exact(call: Call, of: Of, profile: Profile | None) -> tuple[Tensor, Tensor]:
    exact = call.result(of)
    bounds = attention_error_bound(
        call.q, call.k, call.v, mask=call.mask, bias=call.bias, scale=call.scale,
        softcap=call.softcap, sinks=call.sinks, profile=profile,
        grad_out=None if of == "out" else call.grad_out,
    )  # fmt: skip
    bound: Tensor | None = getattr(bounds, of)
    if exact is None or bound is None:
        raise ValueError(f"of must name a result that the call has, got of={of!r}.")
    return exact, bound


def _in_dtype_of(call: Call, expected: Tensor) -> Call:
    """Return the call whose results would be rounded as ``expected`` is."""
    return call if expected.dtype == call.q.dtype else call._replace(q=call.q.to(expected.dtype))


def _cause(call: Call, of: Of, actual: Tensor, exact: Tensor, bound: Tensor) -> Cause:
    """Try symptoms, then exact matches, then kept precision, then what comes close."""
    seen = symptom(call, of, actual, exact, bound)
    if seen is not None:
        return Cause(*seen)
    before = _squares(actual, exact)
    best, least = None, _LIKELY * before
    for name, sentence, candidate, changed in _candidates(call, of, exact):
        left = _squares(actual, candidate)
        # A bound costs more than a reference: only what comes closer is worth one.
        if left > _CLOSER * before or left == float("inf"):
            continue
        if _fits(actual, candidate, bound, changed, of):
            return Cause(name, sentence)
        if left < least:
            best, least = Cause(name, sentence, certain=False), left
    for guess in (
        factor_between(actual, exact, bound),
        scale_between(call, of, actual, bound),
        recovered_dropout(call, of, actual),
    ):
        if guess is not None:
            return Cause(*guess)
    unknown = Cause("unknown", _hint(actual, exact), certain=False)
    return best or _precision(call, of, actual, exact) or unknown


def _candidates(
    call: Call, of: Of, exact: Tensor
) -> Iterator[tuple[str, str, Tensor, Call | None]]:
    for name, sentence, changed in changed_calls(call):
        result = changed.result(of)
        if result is not None and result.shape != exact.shape:
            result = _back_to_groups(result, exact)
        if result is not None and not torch.equal(result.nan_to_num(), exact.nan_to_num()):
            yield name, sentence, result, changed
    for name, sentence, result in changed_results(call, of, exact):
        yield name, sentence, result, None


def _back_to_groups(result: Tensor, exact: Tensor) -> Tensor | None:
    """Sum the gradients of keys that a mistake gave one head for each query head."""
    if result.ndim != 4 or result.shape[1] % max(1, exact.shape[1]):
        return None
    folded = in_groups(result, exact.shape[1]).sum(2)
    return folded if folded.shape == exact.shape else None


def _fits(actual: Tensor, candidate: Tensor, bound: Tensor, changed: Call | None, of: Of) -> bool:
    """Tell whether a mistake explains every finite place within its own bound."""
    limit = bound
    if changed is not None:
        own = attention_error_bound(
            changed.q, changed.k, changed.v, mask=changed.mask, bias=changed.bias,
            scale=changed.scale, softcap=changed.softcap, sinks=changed.sinks,
            grad_out=changed.grad_out if of != "out" else None,
        )  # fmt: skip
        own_limit: Tensor | None = getattr(own, of)
        if own_limit is not None and own_limit.shape == bound.shape:
            limit = own_limit
    elif candidate.shape[2:3] == bound.shape[2:3]:
        limit = bound + bound.amax() if bound.numel() else bound
    both = actual.isfinite() & candidate.isfinite()
    if not bool(both.any()):
        return False
    ratio = occupancies(limit, actual, candidate)
    return bool((ratio[both] <= 1).all())


def _precision(call: Call, of: Of, actual: Tensor, exact: Tensor) -> Cause | None:
    """Find the narrowest statement of lower precision that explains everything."""
    if of != "out":
        profile = Profile(recompute_from_lse=True, delta_from_output=True)
        if compare(_exact(call, of, profile)[1], actual, exact).within:
            sentence = "the backward pass rebuilds the weights from one rounded logsumexp"
            return Cause("weights_from_lse", sentence)
    own = torch.finfo(call.q.dtype).eps if call.q.dtype == torch.float64 else 2.0**-23
    kinds = [x for x in (torch.float32, torch.float16, torch.bfloat16) if torch.finfo(x).eps > own]
    stated: tuple[tuple[str, Callable[[torch.dtype], Profile], str], ...] = (
        ("weights_stored", lambda x: Profile(weights=x), "the weights are kept in {}"),
        ("scores_stored", lambda x: Profile(scores=x), "the scores are kept in {}"),
        (
            "scores_and_weights_stored",
            lambda x: Profile(scores=x, weights=x),
            "scores and weights are kept in {}",
        ),
        ("computed_lower", lambda x: Profile(compute=x), "everything is computed in {}"),
    )
    for name, make, sentence in stated:
        for dtype in kinds:
            profile = make(dtype)
            if _FILLED < compare(_exact(call, of, profile)[1], actual, exact).occupancy <= 1:
                said = sentence.format(str(dtype).removeprefix("torch."))
                return Cause(name, f"{said}; if that is meant, pass profile={_shown(profile)}")
    return None


def _shown(profile: Profile) -> str:
    fields = {name: getattr(profile, name) for name in ("compute", "scores", "weights")}
    given = ", ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
    return f"Profile({given})"


def _squares(actual: Tensor, candidate: Tensor) -> float:
    """Sum the squared gaps; what is not finite must not be so on one side alone."""
    finite = actual.isfinite()
    if bool((finite != candidate.isfinite()).any()):
        return float("inf")
    return float(torch.where(finite, actual.double() - candidate, 0.0).square().sum())


def _hint(actual: Tensor, exact: Tensor) -> str:
    finite = actual.isfinite() & exact.isfinite()
    gap = (actual.double() - exact)[finite]
    relative = float(gap.norm() / exact[finite].norm().clamp(min=1e-300)) if gap.numel() else 0.0
    return (
        f"none of the known mistakes matches (relative error {relative:.2g}); check that dropout "
        "is off and that both sides saw the same inputs"
    )
