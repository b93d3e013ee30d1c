"""One token at a time: the general pass by fewer operations, or none at all."""

from itertools import pairwise

import pytest
import torch

from stabletx.layers import KeyValueCache
from stabletx.models import Decoder, TransformerConfig
from stabletx.models._inputs import read_inputs
from stabletx.models._one_token import OneToken
from stabletx.models._watched import Watched

KINDS = {
    "rotary grouped": {"n_kv_heads": 2},
    "learned as GPT-2": {"position": "learned", "qk_norm": False},
    "one head, rms, post": {
        "n_kv_heads": 1, "norm": "rms", "norm_position": "post", "activation": "gelu_tanh",
        "n_distinct_layers": 1,
    },
    "peri, no bias": {
        "position": "none", "norm_position": "peri", "activation": "swiglu", "use_bias": False,
    },
    "windows": {"window": 2, "global_every": 2, "window_rotary_base": 100.0, "d_head": 6},
    "sinusoidal, other head": {
        "position": "sinusoidal", "d_embedding": 6, "head_activation": "gelu", "head_norm": True,
        "attention_scale": 0.3,
    },
    "scaled head": {"tie_head": False, "head_bias": True, "logit_scale": 0.5},
}  # fmt: skip
LEFT = torch.arange(4) >= torch.tensor([[0], [2], [3]])
HOLED = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]]).bool()


def model(kind="learned as GPT-2", dtype=torch.float32, backend="auto", **options):
    torch.manual_seed(0)
    made = Decoder(TransformerConfig(40, 16, 3, 4, **KINDS[kind], **options)).to(dtype).eval()
    for module in made.modules():
        if hasattr(module, "backend"):
            module.backend = backend
    return made


def prompts(b):
    return torch.randint(1, 40, (b, 4), generator=torch.Generator().manual_seed(b))


def begun(made, ids, keep=None):
    """Read the prompt; give the cache and what takes the steps."""
    cache = made.new_cache(len(ids), 12)
    with torch.inference_mode():
        made.stack(read_inputs(ids, keep, may_pack=False), cache=cache)
        return cache, OneToken.of(made.stack, cache)


def decoded(made, ids, keep, step):
    cache, one_token = begun(made, ids, keep)
    outs = []
    for new in prompts(len(ids)).split(1, 1):
        with torch.inference_mode():
            outs.append(step(made, cache, one_token, new))
    return [torch.stack(outs)]


def by_one_token(made, cache, one_token, new):
    out = one_token(new)
    assert out is not None
    assert cache.length == len(cache.layers[0].read()[0][0, 0])
    return out


def by_the_general_way(made, cache, one_token, new):
    return made(new, cache=cache).logits[:, -1]


@pytest.fixture
def steps(monkeypatch):
    """List for each step of a generation whether it was taken."""
    taken = []
    step = OneToken.__call__

    def count(self, ids):
        out = step(self, ids)
        taken.append(out is not None)
        return out

    monkeypatch.setattr(OneToken, "__call__", count)
    return taken


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("b", [1, 3, 5])
def test_one_token_is_the_general_pass_at_every_step(same_function, kind, b):
    def run(step):
        return lambda dtype: decoded(model(kind, dtype), prompts(b), None, step)

    same_function(run(by_the_general_way), run(by_one_token))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "windows"])
@pytest.mark.parametrize("keep", [LEFT, HOLED], ids=["left", "holed"])
def test_one_token_sees_no_padding(same_function, kind, keep):
    def run(step):
        return lambda dtype: decoded(model(kind, dtype), prompts(3), keep, step)

    same_function(run(by_the_general_way), run(by_one_token))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("b", [1, 2, 3, 5])
@pytest.mark.parametrize("backend", ["plain", "prepacked", "auto"])
def test_generate_writes_the_same_by_every_way_to_multiply(steps, kind, b, backend):
    made = model(kind, backend=backend)
    line = prompts(b)
    with torch.no_grad():
        for _ in range(4):
            line = torch.cat([line, made(line).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made.generate(line[:, :4], max_new_tokens=4), line[:, 4:])
    assert steps == [True] * 3


def spoil_scores(made):
    made.stack.blocks[-1].attention.qkv.weight.mul_(100)


def spoil_a_mean(made):
    made.stack.blocks[-1].feed_forward.out.bias.add_(1e4)


def spoil_a_square(made):
    made.stack.blocks[-1].feed_forward.out.weight.mul_(1e30)


def spoil_everything(made):
    made.stack.blocks[-1].feed_forward.out.bias[3] = torch.nan


def spoil_a_value(made):
    made.stack.blocks[-1].attention.qkv.bias[-1] = torch.inf


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("learned as GPT-2", spoil_scores),
        ("learned as GPT-2", spoil_a_mean),
        ("one head, rms, post", spoil_a_square),
        ("learned as GPT-2", spoil_everything),
        ("one head, rms, post", spoil_everything),
        ("learned as GPT-2", spoil_a_value),
    ],
)
@torch.no_grad()
def test_a_step_that_needs_a_guard_has_not_happened(steps, kind, spoil):
    made = model(kind)
    spoil(made)
    ids = prompts(3)
    cache, one_token = begun(made, ids)
    with torch.inference_mode():
        expected = made(ids[:, :1], cache=begun(made, ids)[0]).logits[:, -1]
        assert one_token(ids[:, :1]) is None
        assert {kept.length for kept in cache.layers} == {4}
        after = made(ids[:, :1], cache=cache).logits[:, -1]
    assert torch.equal(after.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
    del steps[:]
    written = made.generate(ids, max_new_tokens=4)
    assert steps == [False]  # and the general way from there on
    for i, (a, _) in enumerate(pairwise(range(5))):
        line = torch.cat([ids, written[:, :a]], 1)
        assert torch.equal(made(line).logits[:, -1].argmax(-1), written[:, i])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 2.0**100, 1e4, 1.0])
@pytest.mark.parametrize("head", range(6))
def test_any_head_of_any_row_that_is_too_large_is_told(value, head):
    heads = torch.ones(2, 6, 4)  # 2 of queries, 2 of keys and 2 of values
    heads[1, head, 2] = value
    watched, kept = Watched(), KeyValueCache(2, 2, 4, 4)
    watched.attend(heads, kept, window=None, added=None, scale=0.5)
    harmless = value == 1.0 or (value == 1e4 and head >= 4)
    assert watched.needed_no_guard() == harmless


def hook(made):
    made.stack.blocks[0].attention.out.register_forward_hook(lambda *_: None)


def replace(made):
    class Other(torch.nn.LayerNorm):
        pass

    made.stack.blocks[0].attention_shortcut.norm_in = Other(16)


def patch(made):
    made.stack.blocks[1].forward = made.stack.blocks[1].forward


def choose_a_method(made):
    made.stack.blocks[1].attention.method = "exact"


def cast_one(made):
    made.stack.blocks[1].attention_shortcut.norm_in.double()


@pytest.mark.parametrize(
    "change", [hook, replace, patch, choose_a_method, cast_one, Decoder.train, Decoder.bfloat16]
)
def test_whatever_is_not_as_it_was_made_takes_the_general_way(change):
    made = model()
    cache = made.new_cache(2, 12)
    with torch.inference_mode():
        assert OneToken.of(made.stack, cache) is not None
        change(made)
        assert OneToken.of(made.stack, cache) is None


def test_one_token_is_for_inference_and_for_what_it_knows():
    made = model()
    assert OneToken.of(made.stack, made.new_cache(2, 12)) is None  # a gradient is wanted
    with torch.inference_mode():
        assert OneToken.of(made.stack, made.new_cache(0, 12)) is None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert OneToken.of(made.stack, made.new_cache(2, 12)) is None
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
        try:
            assert OneToken.of(made.stack, made.new_cache(2, 12)) is None
        finally:
            handle.remove()
        relative = model("peri, no bias", relative_buckets=6, relative_max_distance=4)
        assert OneToken.of(relative.stack, relative.new_cache(2, 12)) is None
    assert begun(model("windows"), prompts(3), LEFT)[1] is None


def test_hooks_on_the_head_see_every_step():
    made, seen = model(), []
    made.stack.head.register_forward_hook(lambda module, args, out: seen.append(out))
    made.generate(prompts(2), max_new_tokens=4)
    assert len(seen) == 4


@pytest.mark.parametrize("backend", ["plain", "prepacked", "auto"])
@torch.no_grad()
def test_generate_never_uses_a_weight_of_before(backend):
    made, ids = model(backend=backend), prompts(2)
    made.generate(ids, max_new_tokens=4)
    for change in (
        lambda x: x.mul_(2),
        lambda x: x.data.add_(torch.randn_like(x)),
        lambda x: setattr(x, "data", torch.randn_like(x)),
    ):
        for weight in made.parameters():
            change(weight)
        fresh = model(backend=backend)
        fresh.load_state_dict(made.state_dict())
        expected = fresh.generate(ids, max_new_tokens=4)
        assert torch.equal(made.generate(ids, max_new_tokens=4), expected)


def test_generate_refuses_more_tokens_than_there_are_positions(steps):
    made = model(max_seq_len=6)
    assert made.generate(prompts(2), max_new_tokens=3).shape == (2, 3)
    with pytest.raises(ValueError, match=r"max_seq_len.*7|7.*max_seq_len"):
        made.generate(prompts(2), max_new_tokens=5)
