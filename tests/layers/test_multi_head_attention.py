"""Attention with its projections."""

import copy

import pytest
import torch
from einops import repeat
from torch import nn
from torch.autograd import gradcheck

from stabletx import Mask, attention
from stabletx.layers import MultiHeadAttention, RotaryEmbedding
from stabletx.packing import Plan


def tokens(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def layer(dtype=torch.float64, **options):
    torch.manual_seed(0)
    made = MultiHeadAttention(16, 4, **options).to(dtype)
    with torch.no_grad():
        for x in made.parameters():
            x.add_(tokens(*x.shape, dtype=dtype) / 4)
    return made


def test_attention_layer_is_projection_attention_projection():
    made, x = layer(qk_norm=False), tokens(2, 5, 16)
    q, k, v = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in made.qkv(x).chunk(3, -1))
    mask = Mask.window(left=1, right=2)
    out = made.out(attention(q, k, v, mask=mask).transpose(1, 2).flatten(2))
    assert torch.equal(made(x, mask=mask), out)
    assert torch.equal(
        made(x, mask=mask.to_dense(5, 5)), made(x, mask=Mask.dense(mask.to_dense(5, 5)))
    )


@pytest.mark.parametrize("qk_norm", [False, True])
def test_grouped_heads_are_heads_that_share_keys_and_values(same_function, qk_norm):
    def grouped(dtype):
        return [layer(dtype, n_kv_heads=2, qk_norm=qk_norm)(tokens(2, 5, 16, dtype=dtype))]

    def repeated(dtype):
        few, many = (layer(dtype, n_kv_heads=g, qk_norm=qk_norm) for g in (2, 4))
        state = few.state_dict()
        for name in ("qkv.weight", "qkv.bias"):
            q, kv = state[name].split([16, 16])
            kv = repeat(kv, "(two g d) ... -> (two g r d) ...", two=2, g=2, r=2)
            state[name] = torch.cat([q, kv])
        many.load_state_dict(state)
        return [many(tokens(2, 5, 16, dtype=dtype))]

    same_function(grouped, repeated)


def test_attending_to_oneself_as_context_is_self_attention(same_function):
    def attend(dtype, **context):
        made, x = layer(dtype, n_kv_heads=2), tokens(2, 5, 16, dtype=dtype)
        out = made(x, **({"context": x} if context else {}))
        return [out, *torch.autograd.grad(out.square().sum(), list(made.parameters()))]

    same_function(attend, lambda dtype: attend(dtype, context=True))


def test_a_replaced_or_watched_projection_counts_for_a_context_too():
    made, x, context = layer(qk_norm=False), tokens(2, 3, 16), tokens(2, 5, 16, seed=1)
    before = made(x, context=context)
    shapes = []
    handle = made.qkv.register_forward_hook(lambda *call: shapes.append(call[-1].shape[1]))
    assert torch.allclose(made(x, context=context), before)
    assert shapes == [3, 5]
    handle.remove()

    class Adapted(nn.Module):
        """Add to a linear map what was learned, as LoRA does."""

        def __init__(self, base):
            super().__init__()
            self.base, self.in_features = base, base.in_features
            self.weight, self.bias = base.weight, base.bias
            self.learned = tokens(48, 16, seed=2)

        def forward(self, x):
            return self.base(x) + x @ self.learned.T

    merged = copy.deepcopy(made)
    made.qkv = Adapted(made.qkv)
    with torch.no_grad():
        merged.qkv.weight += made.qkv.learned
    assert torch.allclose(made(x, context=context), merged(x, context=context))


def test_causal_attention_moves_no_bit_of_the_past_when_the_future_changes():
    made, x = layer(is_causal=True), tokens(2, 9, 16)
    rotation = RotaryEmbedding(4)(torch.arange(9))
    before = made(x, rotation=rotation)
    for cut in range(1, 9):
        changed = x.clone()
        changed[:, cut:] = 100 * tokens(2, 9 - cut, 16, seed=cut)
        assert torch.equal(made(changed, rotation=rotation)[:, :cut], before[:, :cut])


def test_a_blocked_token_changes_no_bit_whatever_it_holds():
    made, x = layer(), tokens(2, 5, 16)
    keep = torch.tensor([[True, True, False, True, True]] * 2)
    before = made(x, mask=Mask.padding(keep))
    for value in (torch.nan, torch.inf, torch.finfo(x.dtype).max):
        changed = torch.where(keep[..., None], x, value)
        assert torch.equal(made(changed, mask=Mask.padding(keep))[keep], before[keep])


@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_tokens_attend_as_each_sequence_alone(same_function, is_causal):
    lengths = [3, 0, 4, 3, 1]

    def run(dtype, together):
        made = layer(dtype, is_causal=is_causal, n_kv_heads=2)
        x = tokens(sum(lengths), 16, dtype=dtype)
        rotary = RotaryEmbedding(4)
        if together:
            plan = Plan.of_lengths(torch.tensor(lengths))
            out = made(plan.pack(x), rotation=rotary(plan.positions), plan=plan)
            return [plan.unpack(out)]
        parts = x.split(lengths)
        outs = [made(p[None], rotation=rotary(torch.arange(len(p))))[0] for p in parts]
        return [torch.cat(outs)]

    same_function(lambda dtype: run(dtype, False), lambda dtype: run(dtype, True))


def test_attention_dropout_acts_in_training_alone():
    made, without = layer(dropout_p=0.5), layer()
    x = tokens(2, 5, 16)
    assert torch.equal(made.eval()(x), without(x))
    torch.manual_seed(0)
    first = made.train()(x)
    torch.manual_seed(0)
    assert torch.equal(made(x), first)
    assert not torch.equal(first, without(x))


def test_attention_layer_has_right_derivatives():
    made, x = layer(n_kv_heads=2, is_causal=True), tokens(1, 3, 16).requires_grad_()
    rotation = RotaryEmbedding(4)(torch.arange(3))
    assert gradcheck(lambda x: made(x, rotation=rotation), (x,))


@pytest.mark.parametrize("axes", ["t", "b"])
def test_attention_of_no_token_is_empty(axes):
    shape = (2, 0, 16) if axes == "t" else (0, 3, 16)
    assert layer()(tokens(*shape)).shape == shape


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"n_heads": 3}, ValueError, "n_heads must divide d_model, got n_heads=3"),
        ({"n_heads": 4, "n_kv_heads": 3}, ValueError, "n_kv_heads must divide n_heads, got .*=3"),
        ({"n_heads": 4, "dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got .*1.0"),
        ({"n_heads": 4, "d_model": 0}, ValueError, "d_model must be positive, got d_model=0"),
    ],
)
def test_attention_layer_refuses_sizes_that_do_not_fit(options, error, match):
    with pytest.raises(error, match=match):
        MultiHeadAttention(**{"d_model": 16, **options})


def test_attention_layer_refuses_arguments_that_exclude_each_other():
    made, x = layer(), tokens(2, 3, 16)
    plan = Plan.of_lengths(torch.tensor([3, 3]))
    with pytest.raises(ValueError, match=r"mask must be a rule on places beside plan, got mask=M"):
        made(x.flatten(0, 1), plan=plan, mask=Mask.padding(torch.ones(2, 3, dtype=torch.bool)))
    with pytest.raises(ValueError, match=r"rotation must be None beside context"):
        made(x, context=x, rotation=RotaryEmbedding(4)(torch.arange(3)))
    with pytest.raises(ValueError, match=r"x must have 3 axes \(b, t, m\)"):
        made(x[0])
    with pytest.raises(ValueError, match=r"x with 8"):
        made(x[..., :8])
