"""Blocks, and what holds for every layer: casts, copies, devices, tracing."""

import copy

import pytest
import torch

from stabletx import Mask
from stabletx.layers import (
    ClassificationHead,
    DecoderBlock,
    EncoderBlock,
    FeedForward,
    LayerNorm,
    MultiHeadAttention,
    RMSNorm,
    RotaryEmbedding,
)

POSITIONS = ["pre", "post", "peri"]
LAYERS = {
    "attention": lambda: MultiHeadAttention(16, 4, n_kv_heads=2),
    "feed-forward gelu": lambda: FeedForward(16),
    "feed-forward swiglu": lambda: FeedForward(16, activation="swiglu"),
    "encoder pre": lambda: EncoderBlock(16, 4),
    "encoder post": lambda: EncoderBlock(16, 4, norm_position="post", use_bias=False),
    "encoder peri": lambda: EncoderBlock(16, 4, norm_position="peri", norm="rms"),
    "decoder": lambda: DecoderBlock(16, 4),
    "layer norm": lambda: LayerNorm(16),
    "rms norm": lambda: RMSNorm(16),
    "head": lambda: ClassificationHead(16, 3, pooling="attention"),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def made(name, dtype=torch.float32):
    torch.manual_seed(0)
    return LAYERS[name]().to(dtype)


def tokens(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("position", POSITIONS)
def test_block_puts_its_norms_where_it_says(position):
    torch.manual_seed(0)
    block, x = EncoderBlock(16, 4, norm_position=position), tokens(2, 5, 16)
    out = x
    parts = (
        (block.attention, block.attention_shortcut),
        (
            block.feed_forward,
            block.feed_forward_shortcut,
        ),
    )
    for branch, way in parts:
        if position == "pre":
            out = out + branch(way.norm_in(out))
        elif position == "post":
            out = way.norm_out(out + branch(out))
        else:
            out = out + way.norm_branch(branch(way.norm_in(out)))
    assert torch.equal(block(x), out)


@every_layer
def test_layer_gives_the_same_bits_with_and_without_gradient(name):
    layer, x = made(name), tokens(2, 5, 16)
    before = x.clone()
    with torch.no_grad():
        without = layer(x)
    assert torch.equal(x, before)
    assert torch.equal(layer(x), without)


@every_layer
def test_layer_copies_and_reloads_to_the_same_bits(name):
    layer, x = made(name), tokens(2, 5, 16)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    other = LAYERS[name]()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected)


@every_layer
def test_layer_is_made_without_memory_and_then_drawn_alike(name):
    with torch.device("meta"):
        layer = LAYERS[name]()
    assert all(x.is_meta for x in layer.parameters())
    layer = layer.to_empty(device="cpu")
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for name_, x in layer.named_parameters():
        assert x.isfinite().all(), name_
    assert layer(tokens(2, 5, 16)).isfinite().all()


@every_layer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_layer_cast_to_16_bits_errs_by_rounding_alone(name, dtype):
    narrow = made(name, dtype)
    exact = copy.deepcopy(narrow).double()
    x = tokens(2, 5, 16, dtype=dtype)
    out = narrow(x)
    assert out.dtype == dtype
    expected = exact(x.double())
    single = copy.deepcopy(narrow).float()(x.float())
    # First order: rounding errors grow with the unit of the dtype.
    growth = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    assert (out - expected).abs().max() <= growth * (single - expected).abs().max()


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_rotary_tables_keep_every_bit_through_a_cast_and_a_reload(cast):
    positions = torch.tensor([0, 1, 131071])
    expected = RotaryEmbedding(8)(positions)
    rotary = getattr(RotaryEmbedding(8), cast)()
    rotary.load_state_dict(RotaryEmbedding(8).state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tables = rotary(positions)
    for table, right in zip(tables, expected, strict=True):
        assert table.dtype == torch.float32
        assert torch.equal(table, right)


@pytest.mark.parametrize("name", ["encoder pre", "encoder peri", "decoder", "head"])
def test_layer_is_one_graph_when_compiled(same_function, name):
    def eager(dtype):
        return [made(name, dtype)(tokens(2, 5, 16, dtype=dtype))]

    def compiled(dtype):
        layer = torch.compile(made(name, dtype), fullgraph=True, backend="aot_eager")
        return [layer(tokens(2, 5, 16, dtype=dtype))]

    same_function(eager, compiled)


def test_decoder_block_sees_its_context_alone_where_it_has_one():
    block, x, context = DecoderBlock(16, 4, has_context=True), tokens(2, 3, 16), tokens(2, 5, 16)
    out = block(x, context=context, context_mask=Mask.lengths(torch.tensor([4, 0])))
    changed = context.clone()
    changed[0, 4:] = torch.nan
    changed[1] = torch.nan
    mask = Mask.lengths(torch.tensor([4, 0]))
    assert torch.equal(block(x, context=changed, context_mask=mask), out)
    with pytest.raises(ValueError, match=r"context must be given to a block made with"):
        block(x)
    with pytest.raises(ValueError, match=r"context must be None, got context=a tensor"):
        DecoderBlock(16, 4)(x, context=context)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(
    "place",
    ["attention", "attention.out", "feed_forward", "feed_forward.out"],
)
def test_what_a_hook_saw_is_not_written_to(position, place):
    torch.manual_seed(0)
    block, seen = EncoderBlock(16, 4, norm_position=position).eval(), []
    names = [place]
    if position == "peri":
        names.append(f"{place.partition('.')[0]}_shortcut.norm_branch")
    for name in names:
        block.get_submodule(name).register_forward_hook(lambda *call: seen.append(call[-1]))
    block(tokens(2, 5, 16))
    with torch.no_grad():
        block(tokens(2, 5, 16))
    for as_trained, as_used in zip(seen[: len(names)], seen[len(names) :], strict=True):
        assert torch.equal(as_trained, as_used)


@pytest.mark.parametrize("part", ["attention", "feed_forward"])
@torch.no_grad()
def test_a_branch_that_gives_its_input_back_leaves_it_as_it_was(part):
    block, x = EncoderBlock(16, 4, norm_position="post").eval(), tokens(2, 5, 16)
    block.get_submodule(part).forward = lambda x, **_: x
    entered = []
    block.get_submodule(part).register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    block(x)
    assert torch.equal(x, tokens(2, 5, 16))
    del block.get_submodule(part).forward
    block.get_submodule(f"{part}_shortcut")(x, lambda y: y)
    assert torch.equal(x, tokens(2, 5, 16))


def test_block_drops_in_training_alone():
    block, x = EncoderBlock(16, 4, dropout_p=0.5), tokens(2, 5, 16)
    torch.manual_seed(0)
    first = block.train()(x)
    torch.manual_seed(0)
    assert torch.equal(block(x), first)
    assert torch.equal(block.eval()(x), block(x))
    assert not torch.equal(block(x), first)


@pytest.mark.parametrize("choice", ["norm_position", "norm", "activation"])
def test_block_refuses_an_unknown_choice(choice):
    with pytest.raises(ValueError, match=f"{choice} must be one of .*, got {choice}='other'"):
        EncoderBlock(16, 4, **{choice: "other"})
