"""Linear maps in training: the numbers and derivatives of torch's own, by whichever library."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from stabletx.layers import _prepacked, _trained
from stabletx.layers.linear import Linear
from stabletx.testing import assert_within
from stabletx.testing.function_bounds import matmul_error_bound

pytestmark = pytest.mark.skipif(
    not _prepacked._has_onednn(torch.float32), reason="torch was built without oneDNN"
)
M, F = 12, 20


@pytest.fixture
def products(monkeypatch):
    """Record the shapes that oneDNN multiplies."""
    made = []
    multiply = _trained._multiply
    monkeypatch.setattr(
        _trained, "_multiply", lambda *a: made.append(tuple(a[1].shape)) or multiply(*a)
    )
    return made


def whole_numbers(*shape, seed=0):
    """Draw numbers whose products and sums are exact in every order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).float()


def linear(backend="prepacked", use_bias=True):
    made = Linear(M, F, use_bias).train()
    made.backend = backend
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p.copy_(whole_numbers(*p.shape, seed=i + 1))
    return made


def derivatives(out, inputs, grad, **options):
    return torch.autograd.grad(out, [x for x in inputs if x.requires_grad], grad, **options)


def compared(made, x, grad):
    """Give output and gradients, and those of torch's own operation."""
    inputs = [x, *made.parameters()]
    out = made(x)
    plain = nn.functional.linear(x, made.weight, made.bias)
    mine, theirs = (derivatives(o, inputs, grad) for o in (out, plain))
    return [out, *mine], [plain, *theirs]


@pytest.mark.parametrize("shape", [(7, M), (2, 5, M), (1, M), (2, 3, 4, M)])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_output_and_gradients_are_torchs(products, shape, use_bias, mode):
    made = getattr(linear(use_bias=use_bias), mode)()
    x = whole_numbers(*shape).requires_grad_()
    mine, theirs = compared(made, x, whole_numbers(*shape[:-1], F))
    assert all(map(torch.equal, mine, theirs))
    assert products == [(F, M), (M, F)]


@pytest.mark.parametrize("n", [1, 7, 300])
def test_rounding_is_that_of_one_product(products, n):
    made, generator = linear(use_bias=False), torch.Generator().manual_seed(5)
    x, grad = (torch.randn(n, width, generator=generator) for width in (M, F))
    with torch.no_grad():
        made.weight.copy_(torch.randn(F, M, generator=generator))
    out = made(x.requires_grad_())
    dx, dweight = derivatives(out, [x, made.weight], grad)
    x, weight = x.detach(), made.weight.detach()
    factors = ((x, weight.t(), out.detach()), (grad, weight, dx), (grad.t(), x, dweight))
    for a, b, found in factors:
        assert_within(matmul_error_bound(a, b), found, a.double() @ b.double())
    assert len(products) == 2


@pytest.mark.parametrize("layout", ["expanded", "transposed", "strided"])
def test_layout_of_inputs_and_upstream_gradients_changes_nothing(products, layout):
    x, grad = {
        "expanded": lambda: (whole_numbers(1, M).expand(6, M), torch.ones(()).expand(6, F)),
        "transposed": lambda: (whole_numbers(M, 6).t(), whole_numbers(F, 6).t()),
        "strided": lambda: (whole_numbers(6, 2 * M)[:, ::2], whole_numbers(6, 2 * F)[:, 1::2]),
    }[layout]()
    mine, theirs = compared(linear(), x.requires_grad_(), grad)
    assert all(map(torch.equal, mine, theirs))
    assert len(products) == 2


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_only_what_is_wanted_is_computed(products, wanted):
    made, x = linear(), whole_numbers(7, M)
    inputs = {"x": x, "weight": made.weight, "bias": made.bias}
    for name, each in inputs.items():
        each.requires_grad_(name == wanted)
    mine, theirs = compared(made, x, whole_numbers(7, F))
    assert len(mine) == 2
    assert all(map(torch.equal, mine, theirs))
    assert products == [(F, M), (M, F)][: 1 + (wanted == "x")]


def test_derivatives_of_derivatives_are_torchs():
    made, x = linear(), whole_numbers(7, M).requires_grad_()
    inputs, grad = [x, *made.parameters()], whole_numbers(7, F)
    found = []
    for out in (made(x), nn.functional.linear(x, made.weight, made.bias)):
        first = derivatives(out.square(), inputs, grad, create_graph=True)
        found.append(derivatives(sum(a.square().sum() for a in first), inputs, None))
    assert all(map(torch.equal, *found))


def test_a_batch_of_gradients_goes_back_at_once(products):
    made, x = linear(), whole_numbers(7, M).requires_grad_()
    inputs, grads = [x, *made.parameters()], whole_numbers(3, 7, F)
    apart = [derivatives(made(x), inputs, grad) for grad in grads]
    apart = [torch.stack(each) for each in zip(*apart, strict=True)]
    at_once = derivatives(made(x), inputs, grads, is_grads_batched=True)
    assert all(map(torch.equal, at_once, apart))
    out = made(x)
    products.clear()
    mapped = torch.func.vmap(lambda grad: derivatives(out, inputs, grad))(grads)
    assert all(map(torch.equal, mapped, apart))
    assert not products


def test_size_alone_decides_unless_a_way_is_asked_for(products, monkeypatch):
    x = whole_numbers(7, M).requires_grad_()
    monkeypatch.setattr(_trained, "FROM", 7 * M * F)
    linear("auto")(x)
    assert len(products) == 1
    linear("auto")(x[:6])
    linear("plain")(x)
    assert len(products) == 1
    linear("prepacked")(x[:6])
    assert len(products) == 2


@pytest.mark.filterwarnings("ignore")
def test_what_torch_alone_can_do_is_left_to_it(products):
    made, x = linear(), whole_numbers(7, M)
    made(x[0])
    made.bfloat16()(x.bfloat16())
    made.double()(x.double())
    made.float()
    with torch.no_grad():
        made(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert made(x).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        made(x)
    torch.func.vmap(made)(x)
    torch.func.functional_call(made, {"weight": made.weight * 2}, (x,))
    torch.func.jacrev(made)(x)
    with FlopCounterMode(display=False) as counted:
        made(x).sum().backward()
    assert counted.get_total_flops() == 2 * (2 * 7 * M * F)
    torch.use_deterministic_algorithms(True)
    try:
        made(x)
    finally:
        torch.use_deterministic_algorithms(False)
    made.requires_grad_(False)(x)
    assert not products
    made(x.clone().requires_grad_())
    assert len(products) == 1


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_a_weight_that_lies_otherwise_is_left_to_torch(products, layout):
    made, x = linear(), whole_numbers(7, M).requires_grad_()
    weight = {
        "transposed": whole_numbers(M, F).t(),
        "strided": whole_numbers(F, 2 * M)[:, ::2],
        "expanded": whole_numbers(1, M).expand(F, M),
    }[layout]
    made.weight = nn.Parameter(weight)
    mine, theirs = compared(made, x, whole_numbers(7, F))
    assert all(map(torch.equal, mine, theirs))
    assert not products


def test_compiled_training_takes_sizes_on_either_side_without_recompiling(monkeypatch):
    monkeypatch.setattr(_trained, "FROM", 5 * M * F)
    made, counter = linear("auto"), CompileCounter()
    compiled = torch.compile(made, backend=counter, dynamic=True, fullgraph=True)
    for n in (3, 4, 6, 9):
        x = whole_numbers(n, M).requires_grad_()
        assert torch.equal(compiled(x), nn.functional.linear(x, made.weight, made.bias))
    assert counter.frame_count == 1


def test_weights_made_in_inference_mode_are_read_without_a_graph(products):
    with torch.inference_mode():
        made = linear().requires_grad_(False)
    x = whole_numbers(7, M)
    assert torch.equal(made(x), nn.functional.linear(x, made.weight, made.bias))
    assert not products


def test_a_weight_written_to_before_the_backward_pass_is_refused():
    made, x = linear(), whole_numbers(7, M).requires_grad_()
    out = made(x).sum()
    with torch.no_grad():
        made.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_nothing_is_swallowed_and_output_may_be_written_to():
    made, x = linear(), whole_numbers(3, M)
    x[1, 0] = torch.nan
    x.requires_grad_()
    out = made(x)
    assert out.isnan().any(-1).tolist() == [False, True, False]
    out.mul_(2)
    out[0].sum().backward()
    assert torch.equal(x.grad[0], 2 * made.weight.sum(0))
    assert not x.grad[1:].any()


def test_seeded_training_repeats_its_bits(products, monkeypatch):
    monkeypatch.setattr(_trained, "FROM", 1)

    def trained():
        torch.manual_seed(3)
        made = nn.Sequential(Linear(M, F), nn.Tanh(), Linear(F, 1))
        optimizer = torch.optim.AdamW(made.parameters(), lr=0.1)
        x = torch.randn(33, M)
        for _ in range(5):
            optimizer.zero_grad()
            made(x).square().mean().backward()
            optimizer.step()
        return [p.detach().clone() for p in made.parameters()]

    assert all(map(torch.equal, trained(), trained()))
    assert products
