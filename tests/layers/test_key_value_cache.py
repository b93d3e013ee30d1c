"""What a decoder remembers of earlier tokens."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch

from stabletx import Mask, attention
from stabletx.functional import _guards
from stabletx.functional._one_query import attend_one_query
from stabletx.layers import KeyValueCache, MultiHeadAttention, RotaryEmbedding
from stabletx.layers import attention as module
from stabletx.testing import assert_within, attention_error_bound
from stabletx.testing.reference import reference_attention


def entries(t, b=2, g=2, d=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(t)
    return torch.randn(2, b, g, t, d, generator=generator).to(dtype)


def test_cache_gives_back_what_it_was_given_as_views_of_one_memory():
    cache = KeyValueCache(2, 2, 6, 4)
    parts = [entries(t) for t in (3, 1, 2)]
    for part in parts:
        k, v = cache.append(*part)
        assert k.data_ptr() == cache.read()[0].data_ptr()
    first = k.data_ptr()
    assert torch.equal(torch.stack([k, v]), torch.cat(parts, dim=3))
    assert repr(cache) == "KeyValueCache(6 of 6 tokens, batch size 2)"
    cache.reset()
    k, _ = cache.append(*parts[0])
    assert k.data_ptr() == first
    assert torch.equal(k, parts[0][0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_a_cache_goes_on_by_itself(copied):
    first, (k, v) = KeyValueCache(2, 2, 7, 4), entries(3)
    first.append(k, v)
    second = copied(first)
    one = torch.cat([k[:, :, 0], v[:, :, 0]], 1)
    for cache, factor in ((first, 1), (second, 100)):
        cache.append(factor * k, factor * v)
        assert torch.equal(cache.read()[0], torch.cat([k, factor * k], 2))
        longest = factor * float(k.norm(dim=-1).max())
        assert cache.longest()[0] == pytest.approx(longest)
        for all_tokens, new in zip(cache.append_one(factor * one), (k, v), strict=True):
            assert torch.equal(all_tokens[:, :, -1], factor * new[:, :, 0])


def test_cache_made_in_inference_mode_says_where_it_can_be_used():
    with torch.inference_mode():
        cache = KeyValueCache(2, 2, 6, 4)
        cache.append(*entries(3))
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"cache must be used in .*=False"):
        cache.append(*entries(3))
    assert cache.length == 3


@pytest.mark.parametrize(
    ("batch_size", "error"), [(-1, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_cache_refuses_a_batch_size_that_is_none(batch_size, error):
    with pytest.raises(error, match=f"batch_size must be .*, got batch_size={batch_size}"):
        KeyValueCache(batch_size, 2, 6, 4)


def test_cache_refuses_a_token_too_many():
    cache = KeyValueCache(2, 2, 3, 4)
    cache.append(*entries(3))
    with pytest.raises(ValueError, match=r"cache must have room for 4 tokens, got .*capacity=3"):
        cache.append(*entries(1))
    assert cache.length == 3


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"b": 1}, ValueError, "batch size of cache, got k with 1 and cache with 2"),
        ({"g": 4}, ValueError, "number of heads of cache, got k with 4 and cache with 2"),
        ({"d": 8}, ValueError, "head dim of cache, got k with 8 and cache with 4"),
        ({"dtype": torch.float64}, TypeError, "dtype of cache, got k with torch.float64"),
    ],
)
def test_cache_refuses_what_it_was_not_made_for(options, error, match):
    with pytest.raises(error, match=match):
        KeyValueCache(2, 2, 3, 4).append(*entries(1, **options))


def test_cache_refuses_to_lose_a_gradient():
    k, v = entries(1).requires_grad_()
    with pytest.raises(RuntimeError, match=r"KeyValueCache must be used without gradient"):
        KeyValueCache(2, 2, 3, 4).append(k, v)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_attention_from_a_cache_is_that_of_the_whole(same_function, n_kv_heads):
    keep = torch.tensor([[False, False, True, True, True, True], [True] * 6])

    def layer(dtype):
        torch.manual_seed(0)
        made = MultiHeadAttention(16, 4, n_kv_heads=n_kv_heads, is_causal=True).to(dtype)
        x = torch.randn(2, 6, 16, dtype=torch.float64).to(dtype)
        return made, x, RotaryEmbedding(4)

    @torch.no_grad()
    def whole(dtype):
        made, x, rotary = layer(dtype)
        return [made(x, mask=Mask.padding(keep), rotation=rotary(torch.arange(6)))]

    @torch.no_grad()
    def in_steps(dtype):
        made, x, rotary = layer(dtype)
        cache = KeyValueCache(2, n_kv_heads, 6, 4, dtype=dtype)
        outs = []
        for start, end in ((0, 3), (3, 4), (4, 5), (5, 6)):
            rotation = rotary(torch.arange(start, end))
            mask = Mask.padding(keep[:, :end])
            outs.append(made(x[:, start:end], mask=mask, rotation=rotation, cache=cache))
        return [torch.cat(outs, dim=1)]

    same_function(whole, in_steps)


@torch.no_grad()
def test_context_is_projected_once_where_there_is_a_cache():
    made, x = MultiHeadAttention(16, 4), torch.randn(2, 3, 16)
    cache = KeyValueCache(2, 4, 5, 4)
    context = torch.randn(2, 5, 16)
    first = made(x, context=context, cache=cache)
    assert torch.equal(first, made(x, context=context))
    assert torch.equal(first, made(x, context=torch.full_like(context, torch.nan), cache=cache))
    assert cache.length == 5


LEFT = torch.tensor([[False, False, True, True, True, True], [True] * 6])
MASKS = {
    "all": None,
    "left padding": Mask.padding(LEFT),
    "window": Mask.window(1, 1),
    "window, left padding": Mask.window(2, 0) & Mask.padding(LEFT),
    "any": Mask.dense(torch.rand(2, 4, 1, 6, generator=torch.Generator().manual_seed(0)) > 0.3),
}


@pytest.fixture
def fast_ways(monkeypatch):
    """Count the one-query steps that were taken, and those that were left to attention."""
    taken = []

    def count(*tensors, **options):
        out = attend_one_query(*tensors, **options)
        taken.append(out is not None)
        return out

    monkeypatch.setattr(module, "attend_one_query", count)
    return taken


def filled(k, v):
    cache = KeyValueCache(*k.shape[:2], k.shape[2], k.shape[3], dtype=k.dtype)
    cache.append(k[:, :, :-1], v[:, :, :-1])
    cache.longest()
    cache.append(k[:, :, -1:], v[:, :, -1:])
    return cache


def one_query(q, k, v, mask):
    cache = filled(k, v)
    longest_key, longest_value = cache.longest()
    return attend_one_query(
        q, *cache.read(), mask=mask, scale=None,
        longest_key=longest_key, longest_value=longest_value,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mask", MASKS)
def test_one_query_agrees_with_reference(dtype, n_kv_heads, mask):
    allowed = MASKS[mask]
    k, v = entries(6, g=n_kv_heads, dtype=dtype)
    q = entries(1, g=4, dtype=dtype)[0]
    out = one_query(q, k, v, allowed)
    dense = None if allowed is None else allowed.tile(torch.zeros(1).long(), torch.arange(6), 1, 6)
    bound = attention_error_bound(q, k, v, mask=dense)
    assert_within(bound, out.to(dtype), reference_attention(q, k, v, mask=dense))


@pytest.mark.parametrize("place", ["q", "k", "v"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e4, 2.0**100])
def test_one_query_leaves_to_attention_what_the_kernel_gets_wrong(place, value):
    tensors = {"q": entries(1, g=4)[0], "k": entries(6)[0], "v": entries(6)[1]}
    tensors[place][1, 0, -1, 0] = value
    out = one_query(tensors["q"], tensors["k"], tensors["v"], None)
    moderate = place == "v" and value == 1e4
    assert (out is not None) == moderate


def test_one_query_leaves_an_empty_row_to_attention():
    k, v = entries(6)
    nobody = Mask.padding(torch.zeros(2, 6, dtype=torch.bool))
    for mask in (nobody, Mask.window(0, 0) & nobody, Mask.causal(offset=-1)):
        assert one_query(entries(1, g=4)[0], k, v, mask) is None


def test_cache_measures_each_token_once_and_bounds_all():
    cache = KeyValueCache(2, 2, 6, 4)
    assert cache.longest() == (0.0, 0.0)
    k, v = entries(6)
    v[0, 0, 1] = torch.nan
    for i in range(6):
        cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        found = cache.longest()
        assert found[0] == pytest.approx(float(k[:, :, : i + 1].norm(dim=-1).max()))
        assert found[1] == pytest.approx(float(v[:, :, 0].norm(dim=-1).max())) if i == 0 else True
        assert i == 0 or found[1] == torch.inf
    cache.reset()
    assert cache.longest() == (0.0, 0.0)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mask", ["all", "left padding", "window", "window, left padding"])
@torch.no_grad()
def test_every_prefix_from_a_cache_is_that_of_the_whole(same_function, fast_ways, n_kv_heads, mask):
    def run(dtype, edges):
        torch.manual_seed(0)
        made = MultiHeadAttention(16, 4, n_kv_heads=n_kv_heads, is_causal=True).to(dtype).eval()
        x = torch.randn(2, 6, 16, dtype=torch.float64).to(dtype)
        rotary, cache, outs = RotaryEmbedding(4), None, []
        if len(edges) > 2:
            cache = KeyValueCache(2, n_kv_heads, 6, 4, dtype=dtype)
        for start, end in pairwise(edges):
            rule = Mask.window(2, 2) if "window" in mask else None
            if "padding" in mask:
                kept = Mask.padding(LEFT[:, :end])
                rule = kept if rule is None else rule & kept
            rotation = rotary(torch.arange(start, end))
            outs.append(made(x[:, start:end], mask=rule, rotation=rotation, cache=cache))
        return [torch.cat(outs, 1)]

    for prefix in range(1, 6):
        del fast_ways[:]
        edges = [0, *range(prefix, 7)]
        same_function(lambda d: run(d, [0, 6]), lambda d, edges=edges: run(d, edges))
        assert any(fast_ways)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_one_token_in_16_bits_errs_by_rounding_alone(fast_ways, dtype):
    torch.manual_seed(0)
    made, x = MultiHeadAttention(16, 4, is_causal=True).to(dtype).eval(), torch.randn(2, 6, 16)
    x, cache = x.to(dtype), KeyValueCache(2, 4, 6, 4, dtype=dtype)
    made(x[:, :5], cache=cache)
    out = made(x[:, 5:], cache=cache)
    assert fast_ways == [True]
    assert out.dtype == dtype
    exact = made.double()(x.double())[:, 5:]
    # Rounded to 16 bits at each of a handful of steps.
    assert (out - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()


@torch.no_grad()
def test_a_wild_key_in_the_cache_reaches_only_those_who_see_it(fast_ways):
    made, x = MultiHeadAttention(16, 4, is_causal=True).eval(), torch.randn(2, 6, 16)
    cache = KeyValueCache(2, 4, 6, 4)
    cache.append(*(torch.full((2, 4, 2, 4), torch.nan) for _ in range(2)))
    mask = Mask.padding(torch.tensor([[False, False, True], [True, True, True]]))
    out = made(x[:, :1], mask=mask, cache=cache)
    assert fast_ways == [False]
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


@torch.no_grad()
def test_scores_too_large_for_the_kernel_are_those_of_attention(fast_ways):
    q, (k, v) = entries(1, g=4)[0] * _guards.LARGEST_SCORE, entries(6)
    assert one_query(q, k, v, None) is None
    exact = reference_attention(q, k, v)
    assert_within(attention_error_bound(q, k, v), attention(q, k, v), exact)


def test_one_token_side_by_side_is_one_that_was_appended():
    (k, v), (new_k, new_v) = entries(3), entries(1)
    cache, other = KeyValueCache(2, 2, 4, 4), KeyValueCache(2, 2, 4, 4)
    for made in (cache, other):
        made.append(k, v)
        made.longest()
    together = torch.cat([new_k[:, :, 0], new_v[:, :, 0]], 1)
    for got, expected in zip(cache.append_one(together), other.append(new_k, new_v), strict=True):
        assert torch.equal(got, expected)
    with pytest.raises(ValueError, match=r"cache must have room for 5 tokens, got .*capacity=4"):
        cache.append_one(together)
    assert cache.longest() == other.longest()
    cache.take_back(3)
    for got, expected in zip(cache.read(), (k, v), strict=True):
        assert torch.equal(got, expected)
    cache.append_one(100 * together)  # looked at again, though as many tokens were seen before
    assert cache.longest()[0] == pytest.approx(100 * float(new_k.norm(dim=-1).max()))
    cache.measured(torch.inf, 1.0)
    assert cache.longest()[0] == torch.inf
