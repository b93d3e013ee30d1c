"""What a decoder remembers of earlier tokens."""

import pytest
import torch

from stabletx import Mask
from stabletx.layers import KeyValueCache, MultiHeadAttention, RotaryEmbedding


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
