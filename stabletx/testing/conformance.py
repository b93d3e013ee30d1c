"""Hold any attention to the laws, and report what holds, what does not, and what was not asked."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from stabletx.testing._deadline import Overdue, call_within
from stabletx.testing._features import PLAIN, Features, declared, probed
from stabletx.testing.adapters import adapt
from stabletx.testing.cases import Shape
from stabletx.testing.laws import LAWS, Ask, Law, NotAsked, Raised, Setting, Violation
from stabletx.testing.laws.ask import Attention, first_line
from stabletx.testing.report import ConformanceReport, Verdict, name_of, replay_code
from stabletx.testing.rounding import Profile

Effort = Literal["quick", "default", "thorough"]
# Examples of a law with share 1, and seconds spent on making one counterexample smaller.
_EXAMPLES = {"quick": 6, "default": 16, "thorough": 160}
_SHRINK_SECONDS = {"quick": 0.1, "default": 0.4, "thorough": 5.0}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Magnitudes beyond this are a group of their own.
ORDINARY = 2.0**60


def check_attention(
    fn: Attention,
    *,
    adapter: str | Callable[[Attention], Attention] | None = None,
    supports: Collection[str] = (),
    lacks: Collection[str] = (),
    dtypes: Sequence[torch.dtype] | None = None,
    device: str = "cpu",
    profile: Profile | Effort | None = None,
    effort: Effort = "default",
    max_examples: int | None = None,
    extremes: bool = False,
    seed: int = 0,
    budget_seconds: float | None = None,
    time_limit_seconds: float = 10.0,
    laws: Collection[str] | None = None,
    stop_early: bool = False,
) -> ConformanceReport:
    """Ask an attention about every law, in every dtype that it accepts.

    Args:
        fn: called as ``fn(q, k, v, *, mask=None, scale=None)`` with q (b, h, t, d), k (b, g, s, d),
            v (b, g, s, e) and a bool mask (b or 1, h or 1, t, s), True = may attend.
        adapter: gives ``fn`` this signature: a function, or "sdpa", "mha", "huggingface" or
            "arrays" for one in :mod:`stabletx.testing.adapters`.
        supports: what it offers beside that: "bias", "softcap", "sinks" (keywords of these
            names), "lse" (``return_lse=True`` gives a pair), "cache", "training" (keywords
            dropout_p and training), "higher" (second derivatives).
        lacks: what it does not offer: "mask", "scale", "gradient", "grouped" (fewer key heads),
            "cross" (t != s), "value-dim" (e != d). A parameter that is not in the signature and
            a NotImplementedError say the same.
        dtypes: None asks in those of float64, float32, bfloat16 and float16 that it accepts.
        device: where the tensors lie.
        profile: what the kernel states about its precision; None = it computes in float32 at
            least and rounds once. A string is taken as the effort.
        effort: "quick" takes seconds, "default" half a minute, "thorough" as long as it takes.
        max_examples: examples of each law and dtype; None takes what the effort says.
        extremes: count magnitudes beyond 2^60, which are reported in any case.
        seed: of the examples; another seed asks about others.
        budget_seconds: stop after this time; what is left is reported as not asked.
        time_limit_seconds: for each example; what takes longer breaks the law.
        laws: names of the laws to ask about; None = all.
        stop_early: stop at the first law that is broken.

    Returns:
        A report; ``report.passed`` is the verdict.

    Raises:
        ValueError: an unknown feature or law.

    Numerics: every tolerance is the derived bound of ``attention_error_bound``.

    >>> import torch.nn.functional as F
    >>> report = check_attention(
    ...     lambda q, k, v, *, mask=None: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
    ...     laws=["form", "key-permutation"], dtypes=[torch.float32], effort="quick",
    ... )
    >>> report.passed
    True
    """
    fn = fn if adapter is None else adapt(fn, adapter)
    stated_profile = None if isinstance(profile, str) else profile
    effort = profile if isinstance(profile, str) else effort
    if effort not in _EXAMPLES:
        listed = ", ".join(_EXAMPLES)
        raise ValueError(f"effort must be one of {listed}, got effort={effort!r}.")
    chosen = _chosen(laws)
    n = max_examples or _EXAMPLES[effort]
    plan = _Plan(n, seed, time_limit_seconds, _SHRINK_SECONDS[effort], extremes, stop_early)
    run = _Run(fn, stated_profile, plan, budget_seconds)
    stated = declared(fn, supports, lacks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verdicts = run.all(chosen, stated, dtypes, device)
    return ConformanceReport(
        name=name_of(fn),
        verdicts=tuple(verdicts),
        seed=seed,
        effort=effort,
        extremes=extremes,
        device=device,
        seconds=run.elapsed(),
        notes=tuple(run.notes),
    )


def replay(law: str, fn: Attention, setting: Setting, profile: Profile | None = None) -> str:
    """Ask one law about one example again.

    Args:
        law: its name.
        fn: the attention.
        setting: as printed in a report.
        profile: as given to :func:`check_attention`.

    Returns:
        What is broken, in one sentence, or "" where the law holds.

    >>> import torch.nn.functional as F
    >>> replay("agreement", lambda q, k, v: 0 * v, Setting())[:4]
    'out['
    """
    (found,) = _chosen([law])
    features = declared(fn, set(found.needs) - set(PLAIN), ())
    ask = Ask(fn, profile, frozenset(features.names))
    try:
        found.check(ask, setting)
    except (Violation, NotAsked) as broken:
        return str(broken)
    return ""


def law_tests(fn: Attention, **options: Any) -> Callable[..., None]:
    """Make one pytest test a law.

    Args:
        fn: the attention, as in :func:`check_attention`.
        **options: of :func:`check_attention`; ``effort`` may be left to ``--stabletx-effort``.

    Returns:
        A test function, parametrized by the laws: ``test_laws = law_tests(my_attention)``.
        A law that cannot be asked is skipped with its reason.
    """
    import pytest

    extremes = bool(options.get("extremes", False))
    names = [law.name for law in LAWS if extremes or not law.extreme]
    memory: dict[str, Any] = {}

    @pytest.mark.parametrize("law", names)
    def test_laws(law: str, request: Any) -> None:
        given = dict(options)
        given.setdefault("effort", request.config.getoption("--stabletx-effort", "default"))
        if "report" not in memory:
            memory["report"] = check_attention(fn, **given)
            request.config.stash.setdefault(_reports_key(), []).append(memory["report"])
        hold_law(memory["report"], law)

    return test_laws  # type: ignore[no-any-return]


def _reports_key() -> Any:
    from stabletx.testing.plugin import REPORTS

    return REPORTS


def hold_law(report: ConformanceReport, law: str) -> None:
    """Fail, skip or pass a pytest test by what a report says about a law."""
    import pytest

    verdicts = [x for x in report.verdicts if x.law == law]
    broken = [x for x in verdicts if x.status == "broken"]
    if broken:
        shown = "\n\n".join(f"{x.dtype}: {x.message}\n{x.code}" for x in broken[:1])
        pytest.fail(f"{broken[0].sentence}\n\n{shown}", pytrace=False)
    if not any(x.status == "held" for x in verdicts):
        reasons = sorted({x.message for x in verdicts}) or ["not among the laws asked"]
        pytest.skip(f"not asked: {reasons[0]}")


def _chosen(laws: Collection[str] | None) -> tuple[Law, ...]:
    if laws is None:
        return LAWS
    known = {law.name for law in LAWS}
    for name in laws:
        if name not in known:
            listed = ", ".join(sorted(known))
            raise ValueError(f"laws must name laws of {listed}, got laws={name!r}.")
    return tuple(law for law in LAWS if law.name in laws)


@dataclass(frozen=True)
class _Plan:
    """How much to ask."""

    examples: int
    seed: int
    limit: float
    shrink_seconds: float
    extremes: bool
    stop_early: bool

    def count(self, law: Law) -> int:
        return max(1, math.ceil(self.examples * law.share))


class _Run:
    """One run over laws and dtypes."""

    def __init__(
        self, fn: Attention, profile: Profile | None, plan: _Plan, budget: float | None
    ) -> None:
        self.fn = fn
        self.profile = profile
        self.plan = plan
        self.start = time.monotonic()
        self.budget = budget
        self.hangs = 0
        self.shrunk: set[str] = set()
        self.notes: list[str] = []
        self.stopped = ""

    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def all(
        self,
        laws: Sequence[Law],
        stated: Features,
        dtypes: Sequence[torch.dtype] | None,
        device: str,
    ) -> Iterator[Verdict]:
        """Go through the dtypes, and in each through the laws."""
        found = {dtype: self._probe(stated, dtype, device) for dtype in (dtypes or DTYPES)}
        nothing = all(features.refusal for _, features in found.values())
        verdicts = []
        for dtype, (ask, features) in found.items():
            if features.refusal:
                counts = nothing or dtypes is not None
                verdicts += self._refused(laws, dtype, features.refusal, counts)
                continue
            self._note(dtype, features)
            for law in laws:
                verdicts.append(self._law(law, ask, features, dtype, device))
                if self.plan.stop_early and verdicts[-1].counts_against:
                    return iter(verdicts)
        return iter(verdicts)

    def _probe(self, stated: Features, dtype: torch.dtype, device: str) -> tuple[Ask, Features]:
        ask = Ask(self.fn, self.profile)

        def guarded(question: Callable[[], object]) -> None:
            if self.hangs >= 2:
                raise Raised("It hung twice.")
            try:
                call_within(self.plan.limit, lambda: (question(), None)[1])
            except Overdue:
                self.hangs += 1
                raise Raised(f"It gives no answer within {self.plan.limit:g} s.") from None

        features = probed(ask, stated, dtype, device, guarded)
        ask.features = frozenset(features.names)
        return ask, features

    def _note(self, dtype: torch.dtype, features: Features) -> None:
        if features.refused_widths:
            shown = ", ".join(str(x) for x in sorted(features.refused_widths))
            self.notes.append(f"{dtype}: refuses the widths (d, e) {shown}")

    def _refused(
        self, laws: Sequence[Law], dtype: torch.dtype, why: str, counts: bool
    ) -> list[Verdict]:
        """Report a dtype that is not accepted: broken only where it had to be."""
        first = laws[:1] if counts else ()
        return [
            Verdict.of(law, dtype, "broken" if law in first else "not asked", why) for law in laws
        ]

    def _law(
        self, law: Law, ask: Ask, features: Features, dtype: torch.dtype, device: str
    ) -> Verdict:
        counted = self.plan.extremes or torch.finfo(dtype).max < ORDINARY or not law.extreme
        reason = self._reason(law, features, dtype)
        if law.name == "gradient-exists" and features.no_gradient:
            return Verdict.of(law, dtype, "broken", features.no_gradient)
        if reason:
            return Verdict.of(law, dtype, "not asked", reason, counted=counted)
        ask.worst, start, asked, why = 0.0, time.monotonic(), 0, ""
        settings = law.choices.settings(
            self.plan.count(law), self.plan.seed, law.name, ask.features,
            frozenset(features.refused_widths),
        )  # fmt: skip
        for drawn in settings:
            if self._late():
                break
            setting = drawn.but(dtype=dtype, device=device)
            broken = self._ask(law, ask, setting)
            if isinstance(broken, NotAsked):
                why = str(broken)
            elif broken is None:
                asked += 1
            else:
                setting, broken = self._shrink(law, ask, setting, broken)
                code = replay_code(law.name, self.fn, setting)
                return Verdict.of(
                    law, dtype, "broken", str(broken), counted=counted, examples=asked + 1,
                    setting=repr(setting), code=code, seconds=time.monotonic() - start,
                )  # fmt: skip
        if not asked:
            why = why or "out of time"
            return Verdict.of(law, dtype, "not asked", why, counted=counted)
        return Verdict.of(
            law, dtype, "held", "", counted=counted, examples=asked, occupancy=ask.worst,
            seconds=time.monotonic() - start,
        )  # fmt: skip

    def _late(self) -> bool:
        return self.budget is not None and self.elapsed() > self.budget

    def _reason(self, law: Law, features: Features, dtype: torch.dtype) -> str:
        """Return why a law cannot be asked, or ""."""
        if law.dtypes and dtype not in law.dtypes:
            listed = ", ".join(str(x).removeprefix("torch.") for x in law.dtypes)
            return f"asked in {listed}"
        for name in law.needs:
            if name not in features.names:
                return features.missing.get(name, f"without {name}")
        if self.hangs >= 2:
            return "it hung twice"
        return "out of time" if self._late() else ""

    def _ask(self, law: Law, ask: Ask, setting: Setting) -> Violation | NotAsked | None:
        """Ask one example; whatever happens is an answer."""
        try:
            call_within(self.plan.limit, lambda: law.check(ask, setting))
        except (Violation, NotAsked) as answer:
            return answer
        except Overdue:
            self.hangs += 1
            return _Hung(f"It gives no answer within {self.plan.limit:g} s.")
        except Exception as error:
            shown = f"{type(error).__name__}: {first_line(error)}"
            return Violation(f"Its answer cannot be compared: {shown}")
        return None

    def _shrink(
        self, law: Law, ask: Ask, setting: Setting, broken: Violation
    ) -> tuple[Setting, Violation]:
        """Look for a simpler example that breaks the law in the same manner."""
        if isinstance(broken, _Hung) or law.name in self.shrunk:
            return setting, broken
        self.shrunk.add(law.name)
        end = time.monotonic() + self.plan.shrink_seconds
        smaller = True
        while smaller and time.monotonic() < end:
            smaller = False
            for candidate in setting.smaller(law.choices):
                if time.monotonic() > end:
                    break
                again = self._ask(law, ask, candidate)
                if isinstance(again, Violation) and type(again) is type(broken):
                    setting, broken, smaller = candidate, again, True
                    break
        return setting, broken


class _Hung(Violation):
    """No answer in time."""


__all__ = [
    "LAWS",
    "ConformanceReport",
    "Setting",
    "Shape",
    "check_attention",
    "hold_law",
    "law_tests",
    "replay",
]
