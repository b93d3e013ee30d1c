"""stabletx.interop.torch means what torch means, and stays right where torch gives NaN."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from stabletx import Encoder, EncoderBlock, MultiHeadAttention
from stabletx.interop import torch as ours
from stabletx.testing import LAWS, check_attention

SHAPES = {  # leading axes of q, k and v, and of the mask
    "no heads": ((), (), (), ()),
    "heads alone": ((3,), (3,), (3,), (3,)),
    "usual": ((2, 3), (2, 3), (2, 3), (2, 3)),
    "one mask for all": ((2, 3), (2, 3), (2, 3), ()),
    "a mask a row": ((2, 3), (2, 3), (2, 3), (2, 1)),
    "keys shared by rows and heads": ((2, 3), (1, 1), (1, 1), (1, 3)),
    "queries shared": ((1, 1), (2, 3), (2, 3), (2, 3)),
    "grouped": ((2, 4), (2, 2), (2, 2), (2, 4)),
    "five axes": ((2, 2, 3), (1, 2, 3), (2, 1, 3), (2, 1, 1)),
}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_gradients(call, leaves):
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = call(*leaves)
    return [out, *torch.autograd.grad((out * draw(*out.shape, seed=9).to(out.dtype)).sum(), leaves)]


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "float", "float with -inf"])
@pytest.mark.parametrize("name", SHAPES)
def test_scaled_dot_product_attention_means_what_torch_means(name, kind, same_function):
    leading = SHAPES[name]
    inputs = [
        draw(*axes, n, d, seed=i)
        for i, (axes, n, d) in enumerate(zip(leading, (4, 6, 6), (5, 5, 7), strict=False))
    ]
    open_pairs = draw(*leading[3], 4, 6, seed=5) > -0.5
    open_pairs[..., 0] = True
    settings = {"scale": 0.7, "enable_gqa": name == "grouped", "is_causal": kind == "causal"}
    bias = draw(*leading[3], 4, 6, seed=6)
    if kind == "float with -inf":
        bias = bias.masked_fill(~open_pairs, -torch.inf)

    def run(attend):
        def call(dtype):
            mask = {"bool": open_pairs, "none": None, "causal": None}.get(kind, bias.to(dtype))
            given = [x.to(dtype) for x in inputs]
            return with_gradients(lambda q, k, v: attend(q, k, v, mask, **settings), given)

        return call

    same_function(
        run(functional.scaled_dot_product_attention), run(ours.scaled_dot_product_attention)
    )


def test_scaled_dot_product_attention_drops_weights_as_often_as_it_says():
    q, v = draw(1, 1, 40, 8), torch.eye(40, dtype=torch.float64)[None, None]
    kept = ours.scaled_dot_product_attention(q, q, v)
    torch.manual_seed(0)
    first = ours.scaled_dot_product_attention(q, q, v, dropout_p=0.25)
    torch.manual_seed(0)
    again = ours.scaled_dot_product_attention(q, q, v, dropout_p=0.25)
    assert torch.equal(first, again)
    dropped = first == 0
    assert torch.allclose(first[~dropped], kept[~dropped] / 0.75)
    # 1600 draws with a chance of a quarter: five standard deviations are 0.054.
    assert abs(dropped.double().mean() - 0.25) < 0.054


def test_scaled_dot_product_attention_reads_nothing_behind_a_mask():
    q, k, v = (draw(2, 3, 4, 5, seed=i) for i in range(3))
    keep = torch.tensor([[True, True, False, False], [False] * 4])[:, None, None]
    clean = ours.scaled_dot_product_attention(q, k, v, keep)
    k[:, :, 2:] = v[:, :, 2:] = torch.nan
    k[1] = v[1] = torch.inf
    dirty = ours.scaled_dot_product_attention(q, k, v, keep)
    assert torch.equal(clean, dirty)
    assert (dirty[1] == 0).all()
    assert functional.scaled_dot_product_attention(q, k, v, keep).isnan().any()


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"attn_mask": torch.ones(4, 4).bool(), "is_causal": True}, ValueError, "beside is_causal"),
        ({"attn_mask": torch.ones(4, 4).int()}, TypeError, "int32"),
        ({"attn_mask": torch.ones(4, 3).bool()}, ValueError, "4 keys"),
        ({"query": torch.zeros(4)}, ValueError, r"two axes at least.*\(4,\)"),
        ({"query": [1.0]}, TypeError, "query must be a torch.Tensor, got query=list"),
        ({"key": torch.zeros(2, 2, 4, 8)}, ValueError, "v with 4 and k with 2"),
        ({"query": torch.zeros(2, 3, 4, 8)}, ValueError, "query with 3 and key with 4"),
        ({"dropout_p": 1.5}, ValueError, "1.5"),
        ({"value": torch.zeros(2, 4, 4, 8).half()}, TypeError, "float16"),
    ],
)
def test_scaled_dot_product_attention_refuses_bad_arguments(arguments, error, match):
    given = {name: torch.zeros(2, 4, 4, 8) for name in ("query", "key", "value")} | arguments
    with pytest.raises(error, match=match):
        ours.scaled_dot_product_attention(**given)


@pytest.mark.nightly
def test_scaled_dot_product_attention_keeps_the_laws():
    # The adapter spreads a bias over a mask, so that its gradient is added up outside, in 16 bits.
    laws = [law.name for law in LAWS if law.name != "gradient-of-bias"]
    attend = ours.scaled_dot_product_attention
    report = check_attention(attend, adapter="sdpa", profile="quick", laws=laws)
    assert report.passed, str(report)


BUILDS = [
    {"batch_first": True},
    {"bias": False},
    {"kdim": 6, "vdim": 10},
    {"add_bias_kv": True, "batch_first": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6, "bias": False},
]


@pytest.mark.parametrize("masks", ["none", "padding", "pairs", "both", "float", "per head"])
@pytest.mark.parametrize("build", BUILDS, ids=lambda build: "-".join(build))
def test_multihead_attention_means_what_torch_means(build, masks, same_function):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(8, 2, **build)
    torch.manual_seed(0)
    mine = ours.MultiheadAttention(8, 2, **build)
    for name, parameter in theirs.state_dict().items():
        assert torch.equal(mine.state_dict()[name], parameter)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = padding[2, 0] = True
    pairs = torch.ones(4, 5).triu(2).bool()
    given = {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "pairs": {"attn_mask": pairs},
        "both": {"key_padding_mask": padding, "attn_mask": pairs},
        "float": {"key_padding_mask": padding * -2.0, "attn_mask": draw(4, 5)},
        "per head": {"attn_mask": draw(6, 4, 5, seed=4) > 1.0},
    }[masks]
    sizes = ((4, 8), (5, build.get("kdim", 8)), (5, build.get("vdim", 8)))

    def run(module, average):
        def call(dtype):
            module.to(dtype)
            x = [draw(3, *size, seed=i).to(dtype) for i, size in enumerate(sizes)]
            x = x if build.get("batch_first") else [y.transpose(0, 1) for y in x]
            options = {
                name: y.to(dtype) if y.is_floating_point() else y for name, y in given.items()
            }
            out, weights = module(*x, **options, average_attn_weights=average)
            alone, none = module(*x, **options, need_weights=False)
            assert none is None
            loss = (out * draw(*out.shape, seed=9).to(dtype)).sum()
            return [out, weights, alone, *torch.autograd.grad(loss, list(module.parameters()))]

        return call

    for average in (True, False):
        same_function(run(theirs, average), run(mine, average))


def test_multihead_attention_takes_one_sequence(same_function):
    torch.manual_seed(0)
    theirs, mine = nn.MultiheadAttention(8, 2), ours.MultiheadAttention(8, 2)
    mine.load_state_dict(theirs.state_dict())

    def run(module):
        def call(dtype):
            x = draw(5, 8).to(dtype)
            padding = torch.tensor([False, False, True, False, True])
            return module.to(dtype)(x, x, x, key_padding_mask=padding)

        return call

    same_function(run(theirs), run(mine))


def test_multihead_attention_of_padding_alone_is_finite_where_torchs_is_not():
    torch.manual_seed(0)
    mine = ours.MultiheadAttention(8, 2, batch_first=True)
    theirs = nn.MultiheadAttention(8, 2, batch_first=True)
    theirs.load_state_dict(mine.state_dict())
    x = draw(2, 3, 8, dtype=torch.float32).requires_grad_()
    padding = torch.tensor([[False, False, True], [True, True, True]])
    out, weights = mine(x, x, x, key_padding_mask=padding)
    assert torch.equal(out[1], mine.out_proj.bias.expand(3, 8))
    assert (weights[1] == 0).all()
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.isfinite().all()
    assert (gradient[1] == 0).all()
    assert theirs(x, x, x, key_padding_mask=padding)[0][1].isnan().all()


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"is_causal": True}, ValueError, "attn_mask must be given beside is_causal"),
        ({"attn_mask": torch.ones(3, 3).long()}, TypeError, "int64"),
        ({"key": torch.zeros(3, 8)}, ValueError, r"as query.*\(3, 8\)"),
        ({"key_padding_mask": torch.ones(2, 4).bool()}, ValueError, "3 keys"),
        ({"attn_mask": torch.ones(5, 3, 3).bool()}, ValueError, r"of 2 heads.*\(5, 3, 3\)"),
        ({"value": torch.zeros(2, 3, 7)}, ValueError, r"value must have 8 channels.*\(2, 3, 7\)"),
    ],
)
def test_multihead_attention_refuses_bad_arguments(arguments, error, match):
    module = ours.MultiheadAttention(8, 2, batch_first=True)
    given = {name: torch.zeros(2, 3, 8) for name in ("query", "key", "value")} | arguments
    with pytest.raises(error, match=match):
        module(**given)


CHOICES = list(itertools.product((False, True), ("relu", "gelu"), (False, True), (False, True)))


def encoders(norm_first, activation, batch_first, bias):
    settings = {
        "norm_first": norm_first, "activation": activation, "batch_first": batch_first,
        "bias": bias, "dropout": 0.0,
    }  # fmt: skip
    made = []
    for space in (nn, ours):
        torch.manual_seed(0)
        layer = space.TransformerEncoderLayer(8, 2, 16, **settings)
        norm = nn.LayerNorm(8) if norm_first else None
        stack = space.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)
        made.append(stack)
    return made


@pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_transformer_encoder_means_what_torch_means(choice, is_training, same_function):
    theirs, mine = (x.train(is_training) for x in encoders(*choice))
    mine.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(mine.state_dict(), strict=True)
    padding = torch.tensor([[False, False, False, True], [False] * 4, [True, False, False, True]])

    def run(stack, mask):
        def call(dtype):
            stack.to(dtype)
            x = draw(3, 4, 8).to(dtype)
            out = stack(x if choice[2] else x.transpose(0, 1), mask, padding)
            out = out if choice[2] else out.transpose(0, 1)
            real = out[~padding]
            loss = (real * draw(*real.shape, seed=9).to(dtype)).sum()
            return [real, *torch.autograd.grad(loss, list(stack.parameters()))]

        return call

    causal = torch.ones(4, 4).triu(1).bool()
    causal[0, 1] = False  # the third sequence begins with padding, which then sees its neighbour
    for mask in (None, causal):
        same_function(run(theirs, mask), run(mine, mask))


def test_transformer_encoder_takes_a_layer_of_torch():
    stack = ours.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2)
    assert all(type(layer.self_attn) is ours.MultiheadAttention for layer in stack.layers)
    x = torch.zeros(3, 1, 8)
    assert stack(x, src_key_padding_mask=torch.ones(1, 3).bool()).isfinite().all()


@pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
def test_transformer_encoder_of_padding_alone_is_finite(is_training):
    mine = encoders(False, "relu", True, True)[1].train(is_training)
    x, padding = draw(2, 3, 8, dtype=torch.float32), torch.ones(2, 3, dtype=torch.bool)
    padding[0] = False
    out = mine(x, src_key_padding_mask=padding)
    assert out.isfinite().all()
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in mine.parameters())


def test_transformer_encoder_is_traced_whole_and_exported():
    stack = encoders(False, "gelu", True, True)[1].eval().requires_grad_(False)
    x, padding = draw(2, 3, 8, dtype=torch.float32), torch.tensor([[False] * 3, [True] * 3])
    expected = stack(x, src_key_padding_mask=padding)
    exact = copy.deepcopy(stack).double()(x.double(), src_key_padding_mask=padding)
    bound = 4 * (expected - exact).abs().max()  # another order of the same sums
    exported = torch.export.export(stack, (x,), {"src_key_padding_mask": padding}).module()
    for other in (torch.compile(stack, backend="eager", fullgraph=True), exported):
        assert (other(x, src_key_padding_mask=padding) - exact).abs().max() <= bound


@pytest.mark.parametrize("bias", [True, False])
def test_from_torch_converts_an_attention(bias, same_function):
    theirs = nn.MultiheadAttention(8, 2, bias=bias, batch_first=True)
    keep = torch.tensor([[True, True, False, True]])
    other = draw(1, 4, 8, seed=3)

    def one(dtype):
        x, y = draw(1, 4, 8).to(dtype), other.to(dtype)
        return [
            theirs.to(dtype)(x, x, x, key_padding_mask=~keep)[0],
            theirs(x, y, y)[0],
            theirs(x, x, x, attn_mask=torch.ones(4, 4).triu(1).bool())[0],
        ]

    def two(dtype):
        x, y = draw(1, 4, 8).to(dtype), other.to(dtype)
        mine = MultiHeadAttention.from_torch(theirs.to(dtype))
        causal = MultiHeadAttention.from_torch(theirs, is_causal=True)
        return [mine(x, mask=keep[:, None, None]), mine(x, context=y), causal(x)]

    same_function(one, two)
    mine = MultiHeadAttention.from_torch(theirs)
    mine.qkv.weight.data.zero_()
    assert theirs.in_proj_weight.abs().max() > 0


@pytest.mark.parametrize("activation", ["relu", "gelu", nn.SiLU(), nn.GELU("tanh")], ids=str)
@pytest.mark.parametrize("norm_first", [False, True])
def test_from_torch_converts_an_encoder_and_its_layers(norm_first, activation, same_function):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, activation=activation, norm_first=norm_first, batch_first=True, dropout=0.0,
        layer_norm_eps=1e-3,
    )  # fmt: skip
    norm = nn.LayerNorm(8, eps=1e-3) if norm_first else None
    stack = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)
    for parameter in stack.parameters():
        nn.init.normal_(parameter)
    embedding, positions = nn.Embedding(20, 8), draw(6, 8, seed=3)
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]])
    keep = ids > 0

    def one(dtype):
        x = 2.0 * embedding.to(dtype)(ids) + positions[:4].to(dtype)
        stack.to(dtype)
        return [stack(x, src_key_padding_mask=~keep)[keep], stack.layers[0](x)]

    def two(dtype):
        stack.to(dtype), embedding.to(dtype)
        table = positions.to(dtype)
        mine = Encoder.from_torch(stack, embedding=embedding, positions=table, embedding_scale=2.0)
        x = 2.0 * embedding(ids) + table[:4]
        block = EncoderBlock.from_torch(stack.layers[0])
        return [mine(ids, keep).last_hidden_state[keep], block(x)]

    same_function(one, two)


def test_from_torch_says_what_it_cannot_convert():
    with pytest.raises(TypeError, match=r"nn.MultiheadAttention, got module=Linear"):
        MultiHeadAttention.from_torch(nn.Linear(2, 2))
    for settings, match in (
        ({"kdim": 4}, "kdim and vdim"),
        ({"add_bias_kv": True}, "add_bias_kv"),
        ({"add_zero_attn": True}, "add_zero_attn"),
    ):
        with pytest.raises(ValueError, match=match):
            MultiHeadAttention.from_torch(nn.MultiheadAttention(8, 2, **settings))
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=nn.Tanh())
    with pytest.raises(ValueError, match=r"activation must be relu, gelu or silu.*Tanh"):
        EncoderBlock.from_torch(layer)
    layer.activation, layer.norm2 = nn.ReLU(), nn.RMSNorm(8)
    with pytest.raises(TypeError, match=r"layer.norm2=RMSNorm"):
        EncoderBlock.from_torch(layer)
    stack = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, norm_first=True), 2, enable_nested_tensor=False
    )
    with pytest.raises(ValueError, match="norm=None and norm_first=True"):
        Encoder.from_torch(stack, embedding=nn.Embedding(4, 8))
    stack.norm = nn.LayerNorm(8)
    stack.layers[1].dropout1 = nn.Dropout(0.5)
    with pytest.raises(ValueError, match="layers that differ"):
        Encoder.from_torch(stack, embedding=nn.Embedding(4, 8))


def test_from_torch_keeps_dtype_mode_and_the_original():
    module = nn.MultiheadAttention(8, 2, dropout=0.3).bfloat16().eval()
    before = copy.deepcopy(module.state_dict())
    mine = MultiHeadAttention.from_torch(module)
    assert not mine.training
    assert mine.qkv.weight.dtype == torch.bfloat16
    assert mine.dropout_p == 0.3
    assert all(torch.equal(before[name], x) for name, x in module.state_dict().items())
