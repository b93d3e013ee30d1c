"""Linear maps: the numbers of torch's own, by whichever way, and never those of an old weight."""

import copy
import io
import re

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from stabletx.functional import gelu
from stabletx.layers import FeedForward, _prepacked
from stabletx.layers.linear import Linear
from stabletx.models import Decoder, TransformerConfig
from stabletx.testing import assert_within
from stabletx.testing.function_bounds import matmul_error_bound
from stabletx.testing.tolerances import condition_ulps

DTYPES = [torch.float32, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
has_onednn = pytest.mark.skipif(
    not _prepacked._has_onednn(torch.float32), reason="torch was built without oneDNN"
)


def linear(m=48, f=80, dtype=torch.float32, backend="prepacked", use_bias=True):
    torch.manual_seed(0)
    made = Linear(m, f, use_bias).to(dtype).eval()
    made.backend = backend
    return made


def rows(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture
def packings(monkeypatch):
    """Count how often a weight is packed."""
    made = []
    pack = _prepacked._pack
    monkeypatch.setattr(_prepacked, "_pack", lambda *a: made.append(1) or pack(*a))
    return made


def expected(made, x):
    bias = 0.0 if made.bias is None else made.bias.double()
    return x.double() @ made.weight.double().T + bias


def bound(made, x):
    """Take the bias as one more product, with a 1."""
    weight = made.weight.T
    if made.bias is not None:
        x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        weight = torch.cat([weight, made.bias[None]])
    return matmul_error_bound(x, weight)


@has_onednn
@every_dtype
@pytest.mark.parametrize("shape", [(1, 48), (3, 48), (2, 5, 48), (300, 48), (48,), (1, 1, 48)])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("backend", ["plain", "prepacked", "auto"])
@torch.no_grad()
def test_linear_agrees_with_reference_by_every_way(packings, dtype, shape, use_bias, backend):
    made, x = linear(dtype=dtype, use_bias=use_bias, backend=backend), rows(*shape, dtype=dtype)
    out = made(x)
    assert out.shape == (*shape[:-1], 80)
    assert out.dtype == dtype
    assert_within(bound(made, x), out, expected(made, x))
    assert backend == "auto" or len(packings) == (backend == "prepacked")


@has_onednn
@every_dtype
@torch.no_grad()
def test_fused_gelu_is_as_close_to_the_exact_one_as_the_formula(dtype):
    made = linear(1, 1, dtype, use_bias=False)
    made.weight.fill_(1.0)
    x = torch.linspace(-14, 14, 28001)[:, None].to(dtype)
    exact = 0.5 * x.double() * torch.special.erfc(-x.double() / 2**0.5)
    # What is asked of gelu itself: a few units in the last place of x.
    assert condition_ulps(made.forward_gelu(x), exact, x.double()).max() <= 4
    largest = torch.finfo(dtype).max
    ends = torch.tensor([[largest], [-largest], [2.0**21], [-(2.0**21)]]).to(dtype)
    assert torch.equal(made.forward_gelu(ends), ends.clamp(min=0.0))
    wild = torch.tensor([[torch.nan], [torch.inf], [-torch.inf], [1.0]]).to(dtype)
    assert made.forward_gelu(wild).isfinite().flatten().tolist() == [False] * 3 + [True]


@pytest.mark.parametrize("way", ["plain", "onednn", "transposed"])
@pytest.mark.parametrize("use_bias", [True, False])
@torch.no_grad()
def test_one_row_agrees_with_reference_by_whichever_way_was_fastest(monkeypatch, way, use_bias):
    tried = []

    def fastest(x, weight, ways, bias, then_gelu):
        tried.extend(ways)
        return way

    monkeypatch.setattr(_prepacked, "_found", {})
    monkeypatch.setattr(_prepacked, "_fastest", fastest)
    made, x = linear(backend="auto", use_bias=use_bias), rows(1, 1, 48)
    for _ in range(2):
        assert_within(bound(made, x), made(x), expected(made, x))
        made.weight.mul_(2)
    assert_within(bound(made, x), made.forward_gelu(x), gelu(expected(made, x)))
    assert tried == ["plain", "onednn", "transposed"] * 2
    assert linear(backend="auto", dtype=torch.bfloat16)(x.bfloat16()).shape == (1, 1, 80)


@has_onednn
@torch.no_grad()
def test_changed_weights_are_packed_again(packings):
    made, x = linear(), rows(7, 48)

    def check():
        before = len(packings)
        for _ in range(2):
            assert_within(bound(made, x), made(x), expected(made, x))
        return len(packings) - before

    assert check() == 1
    assert check() == 0
    made.weight.mul_(2)
    assert check() == 1
    made.load_state_dict(linear(use_bias=True).state_dict())
    assert check() == 1
    made.load_state_dict({k: v + 1 for k, v in made.state_dict().items()}, assign=True)
    assert check() == 1
    made.weight.data = made.weight.data + 1
    assert check() == 1
    made.weight = nn.Parameter(torch.flip(made.weight, (0,)))
    assert check() == 1
    made.weight.data.mul_(0.5)
    assert check() == 1
    with torch.inference_mode():
        made.weight.add_(1)
        assert check() == 1
    made.bias.add_(1)
    assert check() == 0


@has_onednn
@torch.inference_mode()
def test_weights_made_in_inference_mode_are_packed_and_their_changes_seen(packings):
    made, x = linear(), rows(7, 48)
    assert made.weight.is_inference()

    def check():
        assert_within(bound(made, x), made(x), expected(made, x))
        return len(packings)

    assert check() == check() == 1
    made.weight.mul_(2)
    assert check() == 2
    changed = made.state_dict()
    changed["weight"] = changed["weight"].clone()
    changed["weight"][1, 1] += 100  # one entry, which no probe need meet
    made.load_state_dict(changed)
    assert check() == 3


@has_onednn
@torch.inference_mode()
def test_tied_head_sees_a_table_that_was_loaded(packings):
    torch.manual_seed(0)
    made = Decoder(TransformerConfig(40, 16, 1, 4)).eval()
    ids = torch.tensor([[1, 2, 3]])
    made(ids)
    other = {name: x.clone() for name, x in made.state_dict().items()}
    other["stack.stem.embedding.tokens.weight"][7] += 1
    made.load_state_dict(other)
    fresh = Decoder(TransformerConfig(40, 16, 1, 4)).eval()
    fresh.load_state_dict(other)
    assert torch.equal(made(ids).logits, fresh(ids).logits)


@has_onednn
def test_a_step_of_any_optimizer_is_seen(packings):
    made, x = linear(), rows(7, 48)
    choices = [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    ]
    for choose in choices:
        optimizer = choose(made.parameters())
        for _ in range(2):
            made(x).square().sum().backward()
            optimizer.step()
            with torch.no_grad():
                assert_within(bound(made, x), made(x), expected(made, x))
    assert len(packings) == 2 * len(choices)


@has_onednn
@torch.no_grad()
def test_casts_there_and_back_are_seen_even_at_the_same_address():
    made, x = linear(), rows(7, 48)
    made(x)
    for _ in range(20):
        # Fill half of the entries anew so that rounding to 16 bits changes the weight.
        made.weight.copy_(rows(80, 48))
        made(x)
        made.half().float()
        assert_within(bound(made, x), made(x), expected(made, x))
        made(x)
        address = made.weight.data_ptr()
        made.weight.data = torch.flip(made.weight.data, (0,)).clone()
        assert made.weight.data_ptr() != address
        assert_within(bound(made, x), made(x), expected(made, x))
    made.bfloat16()
    assert made(x.bfloat16()).dtype == torch.bfloat16


@has_onednn
@torch.no_grad()
def test_copies_and_files_carry_no_packed_weight():
    made, x = linear(), rows(7, 48)
    made(x)
    twin = copy.deepcopy(made)
    twin.weight.zero_()
    assert torch.equal(twin(x), twin.bias.expand(7, -1))
    assert set(made.state_dict()) == {"weight", "bias"}
    file = io.BytesIO()
    torch.save(made, file)
    assert file.tell() < 2.5 * made.weight.nbytes
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(x), made(x))


@has_onednn
def test_only_inference_is_prepacked(packings):
    made, x = linear(), rows(7, 48)
    made(x).sum().backward()
    plain = nn.functional.linear(x, made.weight, made.bias)
    with torch.no_grad():
        assert torch.equal(made.train()(x), plain)
        made.eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert made(x).dtype == torch.bfloat16
        with torch.backends.mkldnn.flags(enabled=False):
            assert torch.equal(made(x), plain)
        made.double()(x.double())
        made.half()(x.half())
        made.float()
        other = {"weight": made.weight.detach() * 2, "bias": made.bias}
        called = torch.func.functional_call(made, other, (x,))
        assert_within(bound(made, x) * 2, called, expected(made, x) * 2 - made.bias.double())
        assert torch.func.vmap(made)(x).shape == (7, 80)
        assert made(x[:0]).shape == (0, 80)
    assert not packings


@has_onednn
@pytest.mark.parametrize(
    "bias",
    [
        torch.ones(1).expand(80),
        torch.arange(160.0)[::2],
        torch.ones(1),
        torch.ones(7, 80),
        torch.ones(80).to_sparse(),
    ],
    ids=["expanded", "strided", "one", "of each row", "sparse"],
)
@torch.no_grad()
def test_a_bias_that_is_no_vector_is_left_to_torch(packings, bias):
    made, x = linear(), rows(7, 48)
    made.bias = nn.Parameter(bias)
    try:
        plain = nn.functional.linear(x, made.weight, made.bias)
    except RuntimeError as refused:
        with pytest.raises(RuntimeError, match=re.escape(str(refused)[:60])):
            made(x)
    else:
        assert torch.equal(made(x), plain)
    assert not packings


@has_onednn
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@torch.no_grad()
def test_a_weight_in_another_layout_is_left_to_torch(packings):
    made, x = linear(), rows(7, 48)
    limit, exact = bound(made, x), expected(made, x)
    made.weight = nn.Parameter(made.weight.detach().to_sparse_csr(), requires_grad=False)
    assert_within(limit, made(x), exact)
    assert not packings


@has_onednn
@torch.no_grad()
def test_a_tangent_passes_through_without_autograd(packings):
    made, x, tangent = linear(), rows(7, 48), rows(7, 48).flip(0)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        found = forward_ad.unpack_dual(made(dual)).tangent
        assert torch.equal(found, nn.functional.linear(tangent, made.weight))
        bent = forward_ad.unpack_dual(made.forward_gelu(dual)).tangent
        expected = forward_ad.unpack_dual(gelu(nn.functional.linear(dual, *made.parameters())))
        assert torch.equal(bent, expected.tangent)
        other = {"bias": forward_ad.make_dual(made.bias, made.bias.flip(0))}
        moved = forward_ad.unpack_dual(torch.func.functional_call(made, other, (x,))).tangent
        assert torch.equal(moved, made.bias.flip(0).expand(7, -1))
    assert not packings


@has_onednn
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_what_is_traced_or_counted_is_torchs_own_product(packings):
    made, x = linear(), rows(7, 48)
    traced = torch.jit.trace(made, x, check_trace=False)
    with FlopCounterMode(display=False) as counted:
        made(x)
    assert counted.get_total_flops() == 2 * 7 * 48 * 80
    assert not packings
    made.weight.mul_(2)
    assert_within(bound(made, x), traced(x), expected(made, x))


@has_onednn
@torch.no_grad()
def test_choice_is_made_once_and_is_plain_when_determinism_is_asked(packings, monkeypatch):
    asked = []
    monkeypatch.setattr(_prepacked, "_found", {})
    monkeypatch.setattr(_prepacked, "_fastest", lambda *a: asked.append(1) or "onednn")
    made, x = linear(backend="auto"), rows(40, 48)
    plain = nn.functional.linear(x, made.weight, made.bias)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(made(x), plain)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not asked
    for _ in range(3):
        assert torch.equal(made(x), made(x))
        linear(backend="auto")(x)
    assert len(asked) == 1
    made(x[:1])
    assert len(asked) == 2
    monkeypatch.setattr(_prepacked, "_found", dict.fromkeys(_prepacked._found, "plain"))
    assert torch.equal(made(x), plain)


@torch.no_grad()
def test_plain_way_is_there_without_the_private_operation(monkeypatch):
    monkeypatch.setattr(_prepacked, "_has_onednn", lambda dtype: False)
    made, x = linear(), rows(7, 48)
    assert torch.equal(made(x), nn.functional.linear(x, made.weight, made.bias))
    assert torch.equal(made.forward_gelu(x), gelu(made(x)))


def test_linear_refuses_an_unknown_backend():
    with pytest.raises(ValueError, match=r"backend must be one of .* got backend='fast'"):
        linear(backend="fast")(rows(1, 48))


@torch.no_grad()
def test_hooks_on_the_wide_layer_see_it_before_the_activation():
    layer, x, seen = FeedForward(8).eval(), rows(40, 8), []
    handle = layer.widen.register_forward_hook(lambda module, args, out: seen.append(out))
    watched = layer(x)
    handle.remove()
    assert_within(bound(layer.widen, x), seen[0], expected(layer.widen, x))
    assert torch.allclose(watched, layer(x))


@torch.no_grad()
def test_a_forward_put_in_place_of_the_wide_layers_counts():
    layer, x = FeedForward(8).eval(), rows(40, 8)
    layer.widen.backend = "prepacked"
    own = layer.widen.forward
    layer.widen.forward = lambda x: own(x) + 1
    assert torch.equal(layer(x), layer.out(gelu(own(x) + 1)))


def test_linear_is_one_graph_when_compiled():
    made = torch.compile(linear(), fullgraph=True, backend="aot_eager")
    x = rows(7, 48)
    with torch.no_grad():
        assert_within(bound(linear(), x), made(x), expected(linear(), x))


@has_onednn
@every_dtype
@pytest.mark.parametrize("n_rows", [1, 4, 9])
@pytest.mark.parametrize("backend", ["plain", "prepacked", "auto"])
@torch.no_grad()
def test_a_map_made_ready_adds_to_a_stream_by_every_way(dtype, n_rows, backend):
    made, x, stream = linear(dtype=dtype, backend=backend), rows(n_rows, 48), rows(n_rows, 80)
    x, stream = x.to(dtype), stream.to(dtype)
    ready = made.ready(n_rows)
    assert_within(bound(made, x), ready(x), expected(made, x))
    # The stream is one more product, with a 1.
    out, exact = ready.plus(x, stream), expected(made, x) + stream.double()
    weight = torch.cat([made.weight.T, made.bias[None]])
    limit = torch.stack(
        [
            matmul_error_bound(
                torch.cat([x, torch.ones_like(x[:, :1]), stream[:, i : i + 1]], 1),
                torch.cat([weight[:, i : i + 1], torch.ones_like(weight[:1, :1])]),
            )[:, 0]
            for i in range(80)
        ],
        1,
    )
    # Without a fused sum the product is rounded to the dtype before the stream is added.
    assert_within(limit + bound(made, x), out, exact)
