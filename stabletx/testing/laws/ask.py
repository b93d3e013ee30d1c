"""Asking an attention: call it, take its gradients, and measure its answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from stabletx.testing.cases import AttentionCase
from stabletx.testing.laws.law import NotAsked, Raised, Violation
from stabletx.testing.rounding import Profile
from stabletx.testing.tolerances import Bound, attention_error_bound

Attention = Callable[..., object]
NAMES = ("out", "dq", "dk", "dv")


class Answer(NamedTuple):
    """What an attention returned, detached, with its gradients."""

    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


class Ask:
    """Calls one attention, and keeps what is to be known about its answers.

    Attributes:
        fn: the attention under test.
        profile: what it states about its precision.
        features: what it can be asked for, such as ``"mask"`` or ``"gradient"``.
        worst: largest error so far as a fraction of the bound.
        calls: how often it was called.
        wrote: an input that a call wrote to, or "".
    """

    def __init__(
        self, fn: Attention, profile: Profile | None = None, features: frozenset[str] = frozenset()
    ) -> None:
        self.fn = fn
        self.profile = profile
        self.features = features
        self.worst = 0.0
        self.calls = 0
        self.wrote = ""

    def raw(self, case: AttentionCase, **extra: object) -> object:
        """Call the attention with what the case has, and see whether it writes to its inputs."""
        options = {name: x for name, x in case.options.items() if x is not None}
        inputs = {"q": case.q, "k": case.k, "v": case.v, "mask": case.mask, "bias": case.bias}
        # Inference tensors do not count their versions, but ours are never any.
        versions = {name: x._version for name, x in inputs.items() if x is not None}
        self.calls += 1
        try:
            answer = self.fn(case.q, case.k, case.v, **options, **extra)
        except NotImplementedError as error:
            raise NotAsked(f"it refuses: {first_line(error)}") from error
        except (Exception, SystemExit) as error:
            raise Raised(f"It raises {type(error).__name__}: {first_line(error)}") from error
        for name, version in versions.items():
            x = inputs[name]
            if x is not None and x._version != version:
                self.wrote = name
        return answer

    def out(self, case: AttentionCase, **extra: object) -> Tensor:
        """Return the output without a gradient."""
        with torch.no_grad():
            return self.tensor(self.raw(case, **extra), case).detach()

    def answer(self, case: AttentionCase, **extra: object) -> Answer:
        """Return the output and the gradients of q, k and v for ``case.grad_out``."""
        inputs = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
        with torch.enable_grad():
            q, k, v = inputs
            out = self.tensor(self.raw(replace(case, q=q, k=k, v=v), **extra), case)
            grads = self.take(out, inputs, case.grad_out)
        return Answer(out.detach(), *grads)

    def take(self, out: Tensor, inputs: Sequence[Tensor], grad_out: Tensor) -> list[Tensor]:
        """Take gradients, with zeros where none arrives."""
        if not out.requires_grad:
            raise Violation("The output carries no gradient although q, k and v require one.")
        try:
            grads = torch.autograd.grad(out, inputs, grad_out, allow_unused=True)
        except NotImplementedError as error:
            raise NotAsked(f"it refuses a gradient: {first_line(error)}") from error
        except Exception as error:
            raise Raised(
                f"Its gradient raises {type(error).__name__}: {first_line(error)}"
            ) from error
        pairs = zip(grads, inputs, strict=True)
        return [torch.zeros_like(x) if grad is None else grad.detach() for grad, x in pairs]

    def tensor(self, answer: object, case: AttentionCase) -> Tensor:
        """Hold an answer to its kind, shape, dtype and device."""
        if not isinstance(answer, Tensor):
            raise Violation(f"It returns a {type(answer).__name__}, not a tensor.")
        shape = (*case.q.shape[:3], case.v.shape[3])
        if tuple(answer.shape) != shape:
            raise Violation(f"It returns the shape {tuple(answer.shape)}, not {shape}.")
        if answer.dtype != case.q.dtype:
            raise Violation(f"It returns {answer.dtype} for inputs of {case.q.dtype}.")
        if answer.device != case.q.device:
            raise Violation(f"It returns a tensor on {answer.device}, not on {case.q.device}.")
        return answer

    def bound(self, case: AttentionCase, gradient: bool = False) -> Bound:
        """Return the derived bound of a case under the profile of this attention."""
        grad_out = case.grad_out if gradient else None
        return attention_error_bound(
            case.q, case.k, case.v, **case.options, grad_out=grad_out, profile=self.profile
        )

    def within(self, what: str, actual: Tensor, expected: Tensor, bound: Tensor) -> None:
        """Break the law where an element is further off than the bound; NaN always is.

        Args:
            what: name of the quantity, for the message.
            actual: what the attention gave.
            expected: what it is compared with, any float dtype.
            bound: largest difference allowed, elementwise; where infinite, nothing is asked.
        """
        if actual.numel() == 0:
            return
        got, want = actual.detach().cpu().double(), expected.detach().cpu().double()
        error = (got - want).abs()
        error = torch.where(got == want, 0.0, error.nan_to_num(nan=torch.inf, posinf=torch.inf))
        limit = bound.expand_as(error)
        ratio = torch.where(error == 0, 0.0, error / limit)
        ratio = torch.where(limit == torch.inf, 0.0, ratio).nan_to_num(
            nan=torch.inf, posinf=torch.inf
        )
        worst = float(ratio.max())
        if worst <= 1.0:
            self.worst = max(self.worst, worst)
            return
        place = _first_worst(ratio)
        times = f", off by {float(error[place]):.3g}" if error[place] < torch.inf else ""
        times += f", {worst:.3g} times the bound" if worst < torch.inf else ""
        raise Violation(
            f"{what}[{', '.join(map(str, place))}] is {got[place]:.9g}, not {want[place]:.9g}"
            f"{times}."
        )

    def same_bits(self, what: str, actual: Tensor, expected: Tensor) -> None:
        """Break the law where a bit differs; NaN equals NaN and -0 equals 0."""
        differs = (actual != expected) & ~(actual.isnan() & expected.isnan())
        if not bool(differs.any()):
            return
        place = tuple(int(i) for i in differs.nonzero()[0])
        raise Violation(
            f"{what}[{', '.join(map(str, place))}] moves from {expected[place].item():.9g} "
            f"to {actual[place].item():.9g}."
        )


def _first_worst(ratio: Tensor) -> tuple[int, ...]:
    flat = int(ratio.reshape(-1).argmax())
    place = []
    for size in reversed(ratio.shape):
        place.append(flat % size)
        flat //= size
    return tuple(reversed(place))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, cut to a readable length."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""
