"""What lets one query go straight to the kernel, at its limits."""

import math
import re

import pytest
import torch

from stabletx import Mask, attention
from stabletx.functional._guards import LARGEST_ENTRY, LARGEST_SCORE
from stabletx.functional._one_query import attend_one_query, finite_or_inf, is_safe, longest_rows
from stabletx.testing import assert_within, attention_error_bound, reference_attention

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.parametrize("scale", [0.5, -0.5])
def test_scores_up_to_the_limit_are_safe(scale):
    assert is_safe(2.0, LARGEST_SCORE, 1.0, scale)
    assert is_safe(LARGEST_SCORE, 2.0, 1.0, scale)
    assert not is_safe(2.02, LARGEST_SCORE, 1.0, scale)
    assert not is_safe(2.0, LARGEST_SCORE, 1.0, 1.01 * scale)


@pytest.mark.parametrize("which", range(3))
def test_numbers_up_to_the_limit_are_safe(which):
    lengths = [0.0] * 3
    lengths[which] = LARGEST_ENTRY
    assert is_safe(*lengths, 1.0)
    for beyond in (1.01 * LARGEST_ENTRY, math.inf):
        lengths[which] = beyond
        assert not is_safe(*lengths, 1.0)


@each_dtype
def test_the_longest_row_of_each_part_is_found_and_nan_counts_as_infinite(dtype):
    x = torch.zeros(3, 2, 2, 2, dtype=dtype)
    x[0, 1, 0] = torch.tensor([3.0, 4.0])
    x[0, 0, 1] = torch.tensor([1.0, 4.0])
    x[1, 0, 0, 0] = math.nan
    x[2, 1, 1, 1] = -math.inf
    assert longest_rows(x) == [5.0, math.inf, math.inf]
    assert longest_rows(torch.full((1, 1, 4), 2.0**15, dtype=dtype)) == [2.0**16]
    assert [finite_or_inf(x) for x in (2.0, math.inf, math.nan)] == [2.0, math.inf, math.inf]


def test_a_mask_that_does_not_fit_is_refused():
    q, k = torch.randn(2, 4, 1, 8), torch.randn(2, 4, 5, 8)
    options = {"scale": None, "longest_key": 1.0, "longest_value": 1.0}
    for mask, text in (
        (torch.ones(3, 1, 1, 5), "mask must have batch size 1 or 2, got mask=a mask with batch "),
        (torch.ones(2, 3, 1, 5), "mask must have heads 1 or 4, got mask=a mask with heads 3."),
        (torch.ones(2, 1, 1, 5, device="meta"), "mask must be on cpu, got mask=a mask on meta."),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            attend_one_query(q, k, k, mask=Mask.dense(mask.bool()), **options)


def test_what_holds_nothing_is_left_to_attention():
    options = {"mask": None, "scale": None, "longest_key": 0.0, "longest_value": 0.0}
    for shape in ((0, 4, 1, 8), (2, 4, 1, 0)):
        q = torch.zeros(shape)
        assert attend_one_query(q, q, q, **options) is None
    q = torch.zeros(2, 4, 1, 8)
    assert attend_one_query(q.to("meta"), q, q, **options) is None
    for mask in (Mask.causal(-1), Mask.lengths(torch.tensor([0, 1]))):  # a row sees nothing
        options["mask"] = mask
        assert attend_one_query(q, q, q, **options) is None


@pytest.mark.parametrize("mask", [None, Mask.window(2, 0), Mask.lengths(torch.tensor([3, 5]))])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_one_query_is_attention_with_any_scale_and_mask(mask, scale):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 1, 8), (2, 2, 5, 8), (2, 2, 5, 8))
    q, k, v = (torch.randn(x, generator=generator, dtype=torch.float64) for x in shapes)
    longest = [longest_rows(x[None])[0] for x in (k, v)]
    found = attend_one_query(
        q, k, v, mask=mask, scale=scale, longest_key=longest[0], longest_value=longest[1]
    )
    assert torch.allclose(found, attention(q, k, v, mask=mask, scale=scale, method="exact"))


@each_dtype
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_one_query_is_attention_in_its_dtype_whatever_the_default_device(dtype, device):
    q, k, v = (torch.randn(2, 2, n, 8).to(dtype) for n in (1, 5, 5))
    keep = torch.arange(5) >= torch.tensor([[0], [2]])
    mask, dense = Mask.padding(keep), keep[:, None, None]
    with torch.device(device):
        out = attend_one_query(
            q, k, v, mask=mask, scale=None, longest_key=longest_rows(k)[0], longest_value=1.0
        )
    assert out is not None
    assert out.dtype == dtype
    exact = reference_attention(q, k, v, mask=dense)
    assert_within(attention_error_bound(q, k, v, mask=dense), out, exact)
