"""The guards find the rows that a kernel may get wrong, and let every other problem pass."""

import math

import pytest
import torch

from stabletx import Mask
from stabletx.functional import _guards
from stabletx.functional._extended import ROOM
from stabletx.functional._guards import LARGEST_ENTRY, LARGEST_SCORE, hot_rows, within_limits
from stabletx.functional._problem import checked_problem
from tests.ways import METHODS, attention

every_method = pytest.mark.parametrize("method", METHODS)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
D = 4


def problem_of(q, k, v, *, joint=True, dtype=torch.float32, scale=1.0, **options):
    """Give a problem of one head; q, k and v are lists of rows, as columns of one projection."""
    parts = [torch.tensor(x, dtype=torch.float64).to(dtype).expand(2, D) for x in (q, k, v)]
    if joint:
        parts = torch.cat(parts, -1).split(D, -1)
    q, k, v = (x.unflatten(-1, (1, D)).transpose(0, 1)[None] for x in parts)
    options = {"mask": None, "bias": None, "softcap": None, "sinks": None} | options
    return checked_problem(q, k, v, scale=scale, dropout_p=0.0, training=None, **options)


def is_safe(problem):
    """Ask both guards; what the first lets pass, the second must not find hot."""
    hot = hot_rows(problem, problem.sight())
    safe = within_limits(problem)
    assert not (safe and hot.any())
    return safe, hot[0, 0].tolist()


SPREAD = [0.5] * D  # of norm 1, as ONE_HOT
ONE_HOT = [1.0, 0.0, 0.0, 0.0]
each_memory = pytest.mark.parametrize("joint", [True, False], ids=["joint", "apart"])
each_direction = pytest.mark.parametrize("unit", [SPREAD, ONE_HOT], ids=["spread", "one hot"])


@every_dtype
@each_memory
@each_direction
def test_scores_up_to_the_limit_pass_and_those_beyond_are_hot(dtype, joint, unit):
    root = math.sqrt(LARGEST_SCORE)
    at, beyond = ([x * root * more for x in unit] for more in (1.0, 1.01))
    options = {"dtype": dtype, "joint": joint}
    assert is_safe(problem_of(at, at, unit, **options)) == (True, [False, False])
    assert is_safe(problem_of(beyond, beyond, unit, **options)) == (False, [True, True])
    larger, smaller = ([x * 4 for x in beyond], [x / 4 for x in beyond])
    for pair in ((larger, smaller), (smaller, larger)):
        assert is_safe(problem_of(*pair, unit, **options)) == (False, [True, True])
    rows = [[0.0] * D, beyond]  # the first query is small
    assert is_safe(problem_of(rows, beyond, unit, **options)) == (False, [False, True])


@each_memory
def test_a_scale_counts_and_a_soft_cap_does_not_make_it_smaller(joint):
    at = [x * 16.0 for x in SPREAD]
    assert is_safe(problem_of(at, at, SPREAD, joint=joint, scale=-1.0))[0]
    for options in ({"scale": -1.01}, {"scale": 1.01}, {"scale": 1.01, "softcap": 1.0}):
        assert not is_safe(problem_of(at, at, SPREAD, joint=joint, **options))[0]
    assert is_safe(problem_of(at, at, SPREAD, joint=joint, scale=0.5, softcap=1.0))[0]
    larger = [x * 17.0 for x in SPREAD]
    assert is_safe(problem_of(larger, larger, SPREAD, joint=joint, scale=0.5))[0]
    problem = problem_of(larger, larger, SPREAD, joint=joint, scale=0.5, softcap=1.0)
    assert not is_safe(problem)[0]


@each_memory
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_entries_up_to_the_limit_pass_and_those_beyond_are_hot(joint, which, sign):
    parts = [[0.0] * D for _ in range(3)]
    parts[which] = [0.0, sign * LARGEST_ENTRY, 0.0, 0.0]
    assert is_safe(problem_of(*parts, joint=joint, scale=0.0)) == (True, [False, False])
    parts[which] = [0.0, 1.01 * sign * LARGEST_ENTRY, 0.0, 0.0]
    assert is_safe(problem_of(*parts, joint=joint, scale=0.0)) == (False, [True, True])


@each_memory
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_does_not_pass(joint, which, bad):
    parts = [[0.5] * D for _ in range(3)]
    parts[which] = [0.5, bad, 0.5, 0.5]
    assert not within_limits(problem_of(*parts, joint=joint))


@each_memory
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_bias_counts_towards_the_limit_of_its_rows_and_blocking_does_not(joint, sign):
    at = [x * 8.0 for x in SPREAD]  # scores of 64
    bias = torch.zeros(1, 1, 2, 2)
    bias[0, 0, 1] = torch.tensor([sign * (256.0 - 64.0), -math.inf])
    assert is_safe(problem_of(at, at, at, joint=joint, bias=bias)) == (True, [False, False])
    bias[0, 0, 1, 0] *= 1.01
    assert is_safe(problem_of(at, at, at, joint=joint, bias=bias)) == (False, [False, True])
    blocking = torch.zeros(1, 1, 2, 2).masked_fill(torch.eye(2).bool(), -math.inf)
    full = [x * 16.0 for x in SPREAD]
    assert is_safe(problem_of(full, full, full, joint=joint, bias=blocking))[0]
    zero = [0.0] * D
    for size, safe in ((256.0, True), (256.5, False), (math.nan, False), (math.inf, False)):
        bias[0, 0, 1, 0] = sign * size
        assert within_limits(problem_of(zero, zero, zero, joint=joint, bias=bias)) == (
            safe or sign * size == -math.inf
        )


def test_only_rows_that_see_a_large_key_are_hot():
    rows, ones = [[1.0] * D, [1.0] * D], [[1.0] * D, [100.0] * D]
    for mask in (Mask.causal(), Mask.dense(Mask.causal().to_dense(2, 2))):
        assert is_safe(problem_of(rows, ones, rows, mask=mask)) == (False, [False, True])
        large = [[1.0] * D, [1.01 * LARGEST_ENTRY] * D]
        assert is_safe(problem_of(rows, rows, large, mask=mask)) == (False, [False, True])


@pytest.mark.parametrize(("joint", "n_looks"), [(True, 1), (False, 3)])
def test_one_projection_is_looked_at_once(monkeypatch, joint, n_looks):
    seen, whole = [], _guards._largest
    monkeypatch.setattr(_guards, "_largest", lambda x: seen.append(x.shape) or whole(x))
    assert within_limits(problem_of(SPREAD, SPREAD, SPREAD, joint=joint))
    assert len(seen) == n_looks


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, LARGEST_ENTRY), (torch.float64, ROOM)], ids=str
)
@every_method
def test_a_key_at_the_limit_counts_beside_a_row_beyond_it(dtype, limit, method):
    k = v = torch.tensor([limit, 0.0], dtype=dtype)[None, None, :, None]
    q = torch.tensor([1.0 / limit, 2.0 * limit], dtype=dtype)[None, None, :, None]
    found = attention(q, k, v, scale=1.0, method=method)
    alone = attention(q[:, :, :1], k, v, scale=1.0, method=method)
    assert torch.equal(found[:, :, :1], alone)
    assert found[0, 0, 1] == limit


@every_method
def test_values_beyond_the_limit_are_averaged_where_there_is_no_head_dim(method):
    q = torch.zeros(1, 1, 2, 0)
    v = torch.tensor([2.0**100, 2.0**101])[None, None, :, None]
    assert torch.equal(attention(q, q, v, method=method), torch.full((1, 1, 2, 1), 1.5 * 2.0**100))


@pytest.mark.parametrize("place", ["q", "k", "v", "bias"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("mask", [None, Mask.causal(), Mask.causal(-1)])
def test_what_is_not_finite_spoils_the_same_rows_under_a_transform(place, bad, mask):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(1, 2, 4, 3, generator=generator, dtype=torch.float64) for name in "qkv"
    }
    tensors["bias"] = torch.randn(1, 2, 4, 4, generator=generator, dtype=torch.float64)
    tensors["bias"][0, 0, :, 1] = -math.inf

    def run(q, k, v, bias):
        return attention(q, k, v, bias=bias, mask=mask, method="exact")

    clean = run(*tensors.values())
    tensors[place][0, 1, 2, 1] = bad
    out = run(*tensors.values())
    mapped = torch.func.vmap(run)(*(x[None] for x in tensors.values()))[0]
    spoilt = out.isnan().any(-1)
    assert torch.equal(mapped.isnan(), spoilt[..., None].expand(out.shape))
    assert torch.equal(mapped[~spoilt], out[~spoilt])
    assert torch.equal(out[~spoilt], clean[~spoilt])
    assert 0 < spoilt.sum() < spoilt.numel()


def gradients(bad, grad_out, method):
    """Give the gradients of q, k, v and sinks with a bad number in one place, or in none."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(1, 2, 4, 3, generator=generator) for name in "qkv"}
    tensors["sinks"] = torch.zeros(2)
    bias = torch.zeros(1, 2, 4, 4)
    if bad == "bias":
        bias[0, 1, 2, 1] = math.inf
    elif bad:
        tensors[bad][0, 1, 2, 1] = math.nan
    leaves = [x.requires_grad_() for x in tensors.values()]
    options = {"mask": Mask.causal(), "sinks": leaves[3], "bias": bias, "method": method}
    out = attention(*leaves[:3], **options)
    return torch.autograd.grad(out, leaves, grad_out)


@pytest.mark.parametrize("method", ["auto", "tiled", "exact"])
@pytest.mark.parametrize("which", [None, 2, 3])
def test_a_bad_value_leaves_the_gradient_of_all_values_whole(method, which):
    grad_out = torch.randn(1, 2, 4, 3, generator=torch.Generator().manual_seed(1))
    clean = gradients(None, grad_out, method)
    if which is not None:  # what comes back through a spoilt row may be NaN itself
        grad_out[0, 1, which] = math.nan
    found = gradients("v", grad_out, method)
    lost = torch.zeros(1, 2, 4, dtype=torch.bool)
    lost[0, 1, 2:] = True
    seen = torch.zeros(1, 2, 4, dtype=torch.bool)
    seen[0, 1] = True  # every key, by the last query
    unsound = torch.zeros(1, 2, 4, dtype=torch.bool)
    if which is not None:
        unsound[0, 1, : which + 1] = True
    for name, flags in (("q", lost), ("k", seen), ("v", unsound)):
        place = "qkv".index(name)
        assert torch.equal(found[place].isnan(), flags[..., None].expand(1, 2, 4, 3)), name
        assert torch.equal(found[place][~flags], clean[place][~flags]) or which == 2, name


@pytest.mark.parametrize("method", ["auto", "tiled", "exact"])
@pytest.mark.parametrize("bad", ["q", "k", "bias"])
def test_nothing_flows_back_through_a_row_without_weights_but_nan_to_what_it_sees(method, bad):
    grad_out = torch.randn(1, 2, 4, 3, generator=torch.Generator().manual_seed(1))
    found = gradients(bad, grad_out, method)
    rows = torch.zeros(1, 2, 4, dtype=torch.bool)
    rows[0, 1, 2 : 4 if bad == "k" else 3] = True
    clean = gradients(None, torch.where(rows[..., None], 0.0, grad_out), method)
    seen = torch.zeros(1, 2, 4, dtype=torch.bool)
    seen[0, 1, : 4 if bad == "k" else 3] = True
    for place, flags in enumerate((rows, seen, seen)):
        assert torch.equal(found[place].isnan(), flags[..., None].expand(1, 2, 4, 3))
        assert torch.equal(found[place][~flags], clean[place][~flags])
    assert torch.equal(found[3], clean[3])
