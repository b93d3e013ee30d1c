"""Whatever a callable does, the report says it and does not fall over."""

import threading
import time

import pytest
import torch
import torch.nn.functional as F

from stabletx.testing._deadline import Overdue, call_within
from stabletx.testing.conformance import Setting, Shape, check_attention, hold_law, replay
from stabletx.testing.known import known_attention
from stabletx.testing.rounding import Profile
from tests.correct_attentions import in_float32, written_backward
from tests.mutants import HANGS

F32 = [torch.float32]


def quick(fn, **options):
    return check_attention(fn, **{"effort": "quick", "max_examples": 2, **options})


def test_a_correct_attention_passes_and_says_how_near_the_bound_it_came():
    report = quick(in_float32, dtypes=F32)
    assert report.passed
    assert 0 < report.occupancy <= 1
    assert report.verdict("agreement", "float32").examples == 8


def test_what_cannot_be_asked_is_not_passed():
    report = quick(lambda q, k, v: in_float32(q, k, v), dtypes=F32)
    for law in ("empty-rows", "causality", "scale", "lse", "second-derivative"):
        assert report.verdict(law, "float32").status == "not asked"
    assert "no parameter mask" in str(report)
    assert report.passed


def test_features_are_asked_only_where_named():
    assert quick(in_float32, dtypes=F32).verdict("bias-agreement", "float32").status == "not asked"
    broken = quick(in_float32, dtypes=F32, supports=["bias"])
    assert broken.verdict("bias-agreement", "float32").status == "broken"
    with pytest.raises(ValueError, match="got 'speed'"):
        quick(in_float32, supports=["speed"])


def test_a_stated_lack_is_not_asked():
    report = quick(lambda q, k, v: in_float32(q, k, v).detach(), lacks=["gradient"], dtypes=F32)
    assert report.passed
    assert report.verdict("gradient-agreement", "float32").status == "not asked"


def test_a_silent_lack_of_a_gradient_is_broken():
    report = quick(lambda q, k, v: in_float32(q, k, v).detach(), dtypes=F32)
    assert not report.passed
    assert "carries no gradient" in report.verdict("gradient-exists", "float32").message
    assert report.verdict("gradient-agreement", "float32").status == "not asked"


def test_a_refused_gradient_is_not_asked():
    def refuses(q, k, v):
        if q.requires_grad:
            raise NotImplementedError("forward only")
        return in_float32(q, k, v)

    verdict = quick(refuses, dtypes=F32).verdict("gradient-exists", "float32")
    assert verdict.status == "not asked"
    assert "forward only" in verdict.message


def test_a_dtype_that_is_not_accepted_is_not_asked_unless_demanded():
    def picky(q, k, v):
        if q.dtype != torch.float32:
            raise TypeError("float32 only")
        return in_float32(q, k, v)

    report = quick(picky)
    assert report.passed
    assert report.verdict("agreement", "float16").status == "not asked"
    assert not quick(picky, dtypes=[torch.float16]).passed


@pytest.mark.parametrize("error", [RuntimeError("boom"), SystemExit(3), MemoryError("all")])
def test_an_attention_that_always_raises_fails_with_its_message(error):
    def raises(q, k, v, mask=None, scale=None):
        raise error

    report = quick(raises)
    assert not report.passed
    assert type(error).__name__ in str(report)


def test_grouped_heads_that_are_refused_are_not_asked():
    def no_groups(q, k, v):
        if q.shape[1] != k.shape[1]:
            raise RuntimeError("heads differ")
        return in_float32(q, k, v)

    report = quick(no_groups, dtypes=F32)
    assert report.passed
    assert "heads differ" in report.verdict("grouped-heads", "float32").message


def test_widths_that_are_refused_are_named():
    def even(q, k, v):
        if q.shape[3] % 2:
            raise RuntimeError("odd")
        return in_float32(q, k, v)

    report = quick(even, dtypes=F32)
    assert report.passed
    assert "(7, 7)" in report.notes[0]


def test_a_hanging_attention_is_cut_off_and_reported():
    start = time.monotonic()
    report = quick(HANGS, dtypes=F32, time_limit_seconds=0.3)
    assert time.monotonic() - start < 30
    assert not report.passed
    assert "no answer within 0.3 s" in str(report)


def test_a_loop_that_catches_everything_is_cut_off():
    def deaf():
        try:
            while True:
                time.sleep(0.01)
        except Exception:
            pass

    with pytest.raises(Overdue):
        call_within(0.1, deaf)


def test_the_limit_holds_outside_the_main_thread():
    seen = []

    def work():
        try:
            call_within(0.1, lambda: time.sleep(5))
        except Overdue:
            seen.append("overdue")
        call_within(5, lambda: seen.append("answered"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(4)
    assert seen == ["overdue", "answered"]


def test_errors_of_the_caller_pass_through_the_limit():
    with pytest.raises(KeyError, match="lost"):
        call_within(1.0, lambda: {}["lost"])


def test_a_stated_profile_widens_the_bound():
    def coarse(q, k, v):
        return in_float32(q, k, v).to(torch.bfloat16).to(q.dtype)

    assert not quick(coarse, dtypes=F32, laws=["agreement"]).passed
    stated = Profile(compute=torch.bfloat16)
    assert quick(coarse, dtypes=F32, laws=["agreement"], profile=stated, max_examples=1).passed


def test_the_effort_may_be_given_as_the_profile():
    assert check_attention(in_float32, profile="quick", laws=["form"], dtypes=F32).effort == "quick"


def test_extremes_are_reported_and_counted_only_where_asked():
    laws = ["extreme-keys", "form"]
    report = quick(in_float32, dtypes=F32, laws=laws)
    assert report.passed
    assert report.verdict("extreme-keys", "float32").status == "broken"
    assert not quick(in_float32, dtypes=F32, laws=laws, extremes=True).passed


def test_the_largest_floats_of_float16_are_ordinary():
    def half_scores(q, k, v):
        return torch.softmax((q @ k.mT) * q.shape[3] ** -0.5, -1) @ v

    laws = ["extreme-keys", "extreme-gradient"]
    assert not quick(half_scores, dtypes=[torch.float16], laws=laws).passed


def test_a_spent_budget_leaves_laws_unasked():
    report = quick(in_float32, dtypes=F32, budget_seconds=0.0)
    assert not report.passed
    assert {verdict.message for verdict in report.verdicts} >= {"out of time"}


def test_unknown_laws_are_refused():
    with pytest.raises(ValueError, match="laws='gravity'"):
        quick(in_float32, laws=["gravity"])


def test_seeds_repeat():
    def wrong(q, k, v):
        return in_float32(q, k, v) * 1.01

    first, again = (quick(wrong, dtypes=F32, laws=["agreement"], seed=5) for _ in range(2))
    assert first.broken[0].message == again.broken[0].message
    assert first.broken[0].setting == again.broken[0].setting


def test_the_counterexample_is_small_and_replays():
    def wrong_from_five(q, k, v, *, mask=None, scale=None):
        out = in_float32(q, k, v, mask=mask, scale=scale)
        return out * 1.5 if k.shape[2] >= 5 else out

    report = check_attention(wrong_from_five, dtypes=F32, laws=["agreement"], effort="thorough")
    found = report.broken[0]
    names = {"Setting": Setting, "Shape": Shape, "torch": torch}
    shape = eval(found.setting, names).shape
    assert shape.s == 5
    assert (shape.b, shape.t) == (1, 1)
    code = found.code.replace("attention = ...", "attention = wrong_from_five")
    said = []
    exec(code, {"wrong_from_five": wrong_from_five, "print": said.append})
    assert said == [found.message]
    assert replay("agreement", in_float32, eval(found.setting, names)) == ""


def test_inputs_that_are_written_to_are_named():
    def writes(q, k, v):
        out = in_float32(q, k, v)
        k.detach().mul_(2)
        return out

    report = quick(writes, dtypes=F32, laws=["no-write"])
    assert "writes to its input k" in report.broken[0].message


def test_sdpa_holds_what_it_holds_and_breaks_what_it_breaks():
    report = check_attention(known_attention("torch:sdpa"), dtypes=F32, effort="quick")
    assert report.verdict("agreement", "float32").status == "held"
    assert report.verdict("empty-rows", "float32").status == "held"
    assert report.verdict("blocked-is-absent", "float32").status == "broken"


FOUND = {
    "R1": ("torch:mha", torch.float32, "empty-rows-gradient", "does not read"),
    "R2": ("torch:sdpa-flash", torch.float32, "row-bias", r"scores up to 1e\+09"),
    "R3": ("torch:sdpa-flash", torch.float32, "value-gradient-sum", "times the bound"),
    "R4": ("torch:sdpa", torch.float32, "honest-nan", "swallowed"),
    "R5": ("torch:sdpa", torch.float32, "blocked-is-absent", "NaN in blocked values"),
    "R6": ("torch:sdpa-flash", torch.float32, "extreme-values", "is inf"),
    "R7": ("torch:sdpa-flash", torch.bfloat16, "extreme-honesty", "silently 0"),
}


@pytest.mark.parametrize("fault", FOUND)
def test_the_known_faults_of_torch_are_found_unaided(fault):
    if not torch.__version__.startswith("2.13"):
        pytest.skip("the faults are those of torch 2.13")
    name, dtype, law, said = FOUND[fault]
    report = check_attention(known_attention(name), dtypes=[dtype], laws=[law])
    with pytest.raises(pytest.fail.Exception, match=said):
        hold_law(report, law)


def test_a_silently_wrong_second_derivative_is_found():
    report = quick(
        written_backward, dtypes=[torch.float64], laws=["second-derivative"], supports=["higher"]
    )
    assert report.broken[0].law == "second-derivative"
    right = quick(
        in_float32, dtypes=[torch.float64], laws=["second-derivative"], supports=["higher"]
    )
    assert right.passed, str(right)


def test_a_quick_run_of_sdpa_is_quick():
    def sdpa(q, k, v, *, mask=None, scale=None):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )

    check_attention(sdpa, dtypes=F32, laws=["form", "gradient-exists"], effort="quick")
    start = time.process_time()
    check_attention(sdpa, effort="quick")
    # Five seconds on an idle machine; a shared one counts what its neighbours cost, too.
    assert time.process_time() - start < 20
