"""The decoder: causal to the bit, the same from a cache, and what it writes."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stabletx.functional import cross_entropy
from stabletx.layers import KeyValueCache
from stabletx.models import Decoder, TransformerConfig
from stabletx.packing import Packed

KINDS = {
    "rotary grouped": {"n_kv_heads": 2},
    "learned one head": {"n_kv_heads": 1, "position": "learned", "norm_position": "post"},
    "none peri": {"position": "none", "norm_position": "peri", "activation": "swiglu"},
    "windows relative": {
        "window": 2, "global_every": 2, "relative_buckets": 6, "relative_max_distance": 4,
        "d_head": 6, "n_kv_heads": 2, "tie_head": False, "head_bias": True, "logit_scale": 0.5,
    },
    "sinusoidal shared": {
        "position": "sinusoidal", "n_distinct_layers": 1, "d_embedding": 6,
        "head_activation": "gelu", "head_norm": True, "norm_position": "post",
    },
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS)
IDS = torch.randint(1, 40, (3, 7), generator=torch.Generator().manual_seed(0))
LEFT = torch.arange(7) >= torch.tensor([[0], [3], [6]])
HOLED = torch.tensor([[1, 0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0, 0]]).bool()


def model(kind="rotary grouped", dtype=torch.float64, **options):
    torch.manual_seed(0)
    made = Decoder(TransformerConfig(40, 16, 2, 4, **KINDS[kind], **options))
    if made.stack.places.relative is not None:  # it starts at 0, where nothing shows
        torch.nn.init.normal_(made.stack.places.relative.table.weight)
    return made.to(dtype).eval()


@every_kind
@pytest.mark.parametrize("keep", [None, LEFT, HOLED], ids=["full", "left", "holed"])
@torch.no_grad()
def test_decoding_from_a_cache_is_the_full_forward_at_every_prefix(same_function, kind, keep):
    def cut(x, start, end):
        return None if x is None else x[:, start:end]

    def whole(dtype):
        return [model(kind, dtype)(IDS, keep).logits]

    for prefix in range(8):

        def in_steps(dtype, prefix=prefix):
            made = model(kind, dtype)
            cache = made.new_cache(3, 7)
            edges = [0, prefix, *range(prefix + 1, 8)]
            outs = [
                made(IDS[:, a:b], cut(keep, a, b), cache=cache).logits for a, b in pairwise(edges)
            ]
            assert repr(cache).startswith("DecoderCache(2 layers, KeyValueCache(7 of 7 tokens")
            return [torch.cat(outs, dim=1)]

        same_function(whole, in_steps)


@every_kind
def test_decoder_moves_no_bit_of_the_past_when_the_future_changes(kind):
    made = model(kind)
    before = made(IDS).logits
    for start in range(1, 7):
        changed = IDS.clone()
        changed[:, start:] = 39 - changed[:, start:]
        assert torch.equal(made(changed).logits[:, :start], before[:, :start])


@every_kind
def test_packed_decoder_is_the_padded_one_with_its_gradients(same_function, monkeypatch, kind):
    @settings(max_examples=10, deadline=None)
    @given(kept=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=2, max_size=3))
    def check(kept):
        keep = torch.tensor(kept)
        keep[0, :2] = True  # at least one token with a next one

        def run(dtype, full_enough):
            monkeypatch.setattr("stabletx.models._inputs.FULL_ENOUGH", full_enough)
            made = model(kind, dtype)
            ids = IDS[: len(keep), :5]
            out = made(ids, keep, labels=ids)
            assert not out.logits[~keep].any()
            return [out.logits, *torch.autograd.grad(out.loss, list(made.parameters()))]

        same_function(lambda dtype: run(dtype, -1.0), lambda dtype: run(dtype, 0.95))

    check()


@pytest.mark.parametrize("keep", [LEFT, HOLED], ids=["left", "holed"])
def test_each_real_token_is_asked_for_the_next_real_one(same_function, keep):
    def padded(dtype):
        return [model(dtype=dtype)(IDS, keep, labels=IDS).loss]

    def packed(dtype):
        return [model(dtype=dtype)(Packed(IDS[keep], keep.sum(1)), labels=IDS[keep]).loss]

    def by_hand(dtype):
        made, logits, targets = model(dtype=dtype), [], []
        for row, real in zip(IDS, keep, strict=True):
            logits.append(made(row[real][None]).logits[0, :-1])
            targets.append(row[real][1:])
        return [cross_entropy(torch.cat(logits), torch.cat(targets))]

    same_function(by_hand, padded)
    same_function(by_hand, packed)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16], ids=str)
def test_labels_of_any_integer_dtype_are_the_same(dtype):
    made = model()
    for keep in (None, LEFT, HOLED):
        loss = made(IDS, keep, labels=IDS).loss
        assert torch.equal(made(IDS.to(dtype), keep, labels=IDS.to(dtype)).loss, loss)


def test_decoder_loss_is_zero_where_no_token_has_a_next_one():
    made = model()
    for ids in (IDS[:, :1], IDS[:, :0], IDS[:0]):
        assert made(ids, labels=ids).loss == 0


@every_kind
@pytest.mark.parametrize("keep", [LEFT, HOLED], ids=["left", "holed"])
@torch.no_grad()
def test_generate_writes_the_best_token_each_time_wherever_padding_lies(kind, keep):
    made = model(kind)
    written = made.generate(IDS, keep, max_new_tokens=5)
    for row, real, new in zip(IDS, keep, written, strict=True):
        line = row[real]
        for _ in range(5):
            line = torch.cat([line, made(line[None]).logits[0, -1:].argmax(-1)])
        assert torch.equal(line[-5:], new)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_generate_works_in_16_bits(kind, dtype):
    made = model(kind, dtype)
    for keep in (None, LEFT):
        assert made.generate(IDS, keep, max_new_tokens=3).shape == (3, 3)


def test_generate_draws_repeatably_and_from_the_best_alone_when_told():
    made = model()

    def draw(seed=0, **options):
        generator = torch.Generator().manual_seed(seed)
        return made.generate(IDS, max_new_tokens=8, generator=generator, **options)

    greedy = made.generate(IDS, max_new_tokens=8)
    assert torch.equal(draw(temperature=1.0), draw(temperature=1.0))
    assert not torch.equal(draw(temperature=1.0), draw(1, temperature=1.0))
    assert torch.equal(draw(temperature=1.0, top_p=1e-9), greedy)
    assert torch.equal(draw(temperature=1.0, top_p=1e-300), greedy)


def test_generate_pads_after_an_end_and_stops_when_all_have_ended():
    greedy = model().generate(IDS, max_new_tokens=6)
    eos = int(greedy[0, 2])
    made = model(eos_id=eos, pad_id=0)
    written = made.generate(IDS, max_new_tokens=6)
    for new, free in zip(written, greedy, strict=True):
        ends = (free == eos).nonzero()
        n = int(ends[0]) + 1 if len(ends) else 6
        assert torch.equal(new[:n], free[: len(new)][:n])
        assert not new[n:].any()
    one = made.generate(IDS[:1], max_new_tokens=6)
    assert one.shape == (1, int((greedy[0] == eos).nonzero()[0]) + 1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be positive, got max_new_tokens=0"),
        ({"max_new_tokens": -1}, "max_new_tokens must be positive, got max_new_tokens=-1"),
        ({"temperature": -1.0}, "temperature must be at least 0, got temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got top_p=0.0"),
    ],
)
def test_generate_refuses_settings_that_pick_nothing(options, match):
    with pytest.raises(ValueError, match=match):
        model().generate(IDS, **{"max_new_tokens": 1, **options})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens must be an int, got max_new_tokens=2.5"),
        ({"max_new_tokens": None}, "max_new_tokens must be an int, got max_new_tokens=None"),
        ({"generator": 5}, "generator must be a Generator, got generator=int"),
        ({"input_ids": Packed(IDS[0], torch.tensor([7]))}, "input_ids must be a torch.Tensor"),
    ],
)
def test_generate_refuses_what_are_not_settings(options, match):
    with pytest.raises(TypeError, match=match):
        model().generate(**{"input_ids": IDS, "max_new_tokens": 1, **options})


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 1e-320])
def test_any_small_temperature_draws_the_best_token(temperature):
    made = model(dtype=torch.float32)
    with torch.no_grad():
        made.stack.stem.embedding.tokens.weight.mul_(1000)  # scores of hundreds
    drawn = made.generate(IDS, max_new_tokens=4, temperature=temperature)
    assert torch.equal(drawn, made.generate(IDS, max_new_tokens=4))


@pytest.mark.parametrize("keep", [None, LEFT], ids=["full", "left"])
def test_a_pass_that_was_cut_short_leaves_nothing_in_a_cache(keep):
    made = model().requires_grad_(False)
    cache = made.new_cache(3, 9)
    made.stack.blocks[1].requires_grad_(True)
    with pytest.raises(RuntimeError, match="KeyValueCache must be used without gradient"):
        made(IDS, keep, cache=cache)
    with torch.no_grad():
        out = made(IDS, keep, cache=cache).logits
        other = made.new_cache(3, 9)
        assert torch.equal(out, made(IDS, keep, cache=other).logits)
        assert cache.length == other.length == 7
        new = IDS[:, :2]
        assert torch.equal(made(new, cache=cache).logits, made(new, cache=other).logits)


@torch.no_grad()
def test_decoder_refuses_a_cache_that_is_not_its_own():
    made = model()
    for n_layers in (1, 3):
        cache = Decoder(TransformerConfig(40, 16, n_layers, 4)).new_cache(3, 9)
        with pytest.raises(ValueError, match=f"cache must have .* got cache with {n_layers} and"):
            made(IDS, cache=cache)
    with pytest.raises(TypeError, match="cache must be a DecoderCache, got cache=KeyValueCache"):
        made(IDS, cache=KeyValueCache(3, 2, 9, 4))
    with pytest.raises(ValueError, match="batch_size must be at least 0, got batch_size=-1"):
        made.new_cache(-1, 9)
    with torch.inference_mode():
        cache = made.new_cache(3, 9)
    with pytest.raises(RuntimeError, match=r"cache must be used in torch.inference_mode\(\)"):
        made(IDS, LEFT, cache=cache)


def test_decoder_refuses_a_full_cache_another_batch_and_an_empty_prompt():
    made = model()
    with torch.no_grad():
        cache = made.new_cache(3, 4)
        with pytest.raises(ValueError, match=r"cache must have room for 7 tokens, got .*=4"):
            made(IDS, cache=cache)
        with pytest.raises(ValueError, match=r"batch size of cache, got input_ids with 2"):
            made(IDS[:2, :2], cache=made.new_cache(3, 4))
        with pytest.raises(ValueError, match=r"packed ids must be None beside cache"):
            made(Packed(IDS[0], torch.tensor([7])), cache=cache)
    with pytest.raises(ValueError, match=r"input_ids.shape\[1\] must be positive"):
        made.generate(IDS[:, :0], max_new_tokens=1)
    with pytest.raises(ValueError, match=r"labels must have the shape of input_ids"):
        made(IDS, labels=IDS[:, 1:])
