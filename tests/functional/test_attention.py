"""Derivatives of every order, every option together, every refusal, and the choice of a method."""

import math
import re

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from stabletx import Mask
from stabletx.functional._problem import checked_problem
from stabletx.functional.attention import _choose
from stabletx.testing import attention_error_bound, reference_attention
from tests.ways import METHODS, attention, attention_details

every_method = pytest.mark.parametrize("method", METHODS)


def inputs(t=5, s=5, d=3, e=3, h=2, g=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        made = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        return made.requires_grad_()

    q, k, v = draw(2, h, t, d), draw(2, g, s, d), draw(2, g, s, e)
    return q, k, v, draw(1, h, t, s), draw(h)


Q, K, V, B, S = (x.detach() for x in inputs(dtype=torch.float32))
MASKS = {
    "none": None,
    "causal": Mask.causal(0),
    "empty rows": Mask.causal(-2),
    "padding": Mask.padding(torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()),
    "dense": Mask.dense(torch.rand(2, 2, 5, 5, generator=torch.Generator().manual_seed(1)) > 0.5),
}


@pytest.mark.parametrize("method", ["auto", "fused", "tiled", "exact"])
@pytest.mark.parametrize("mask", MASKS)
def test_first_and_second_derivatives_are_right(method, mask):
    q, k, v, _, _ = inputs()

    def run(q, k, v):
        return attention(q, k, v, mask=MASKS[mask], method=method)

    assert gradcheck(run, (q, k, v))
    assert gradgradcheck(run, (q, k, v), fast_mode=True)


@every_method
@pytest.mark.parametrize("mask", ["causal", "empty rows"])
def test_derivatives_are_right_with_every_option(method, mask):
    q, k, v, bias, sinks = inputs(e=2)

    def run(q, k, v, bias, sinks):
        options = {"mask": MASKS[mask], "scale": 0.7, "softcap": 2.0, "method": method}
        found = attention_details(q, k, v, bias=bias, sinks=sinks, **options)
        return found.out, found.lse

    assert gradcheck(run, (q, k, v, bias, sinks))
    assert gradgradcheck(run, (q, k, v, bias, sinks), fast_mode=True)


@pytest.mark.parametrize("axes", [(1, 1, 5, 5), (2, 1, 1, 5), (1, 2, 5, 1), (2, 2, 5, 5)])
@every_method
def test_gradient_of_a_broadcast_bias_has_its_shape(axes, method):
    q, k, v, _, _ = inputs()
    bias = torch.randn(axes, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda bias: attention(q, k, v, bias=bias, method=method), (bias,))


@every_method
@pytest.mark.parametrize("mask", MASKS)
def test_a_bias_joins_every_mask(method, mask):
    q, k, v, bias, _ = (x.detach() for x in inputs(dtype=torch.float32))
    found = attention(q, k, v, mask=MASKS[mask], bias=bias, method=method)
    allowed = None if MASKS[mask] is None else MASKS[mask].to_dense(5, 5)
    exact = reference_attention(q, k, v, mask=allowed, bias=bias).out
    bound = attention_error_bound(q, k, v, mask=allowed, bias=bias).out
    assert ((found - exact).abs() <= bound).all()


def test_hessian_jvp_and_vmap_are_those_of_the_formula():
    q, k, v, _, _ = (x.detach() for x in inputs())

    def run(q):
        return attention(q, k, v, mask=Mask.causal())

    tangent = torch.ones_like(q)
    _, pushed = torch.func.jvp(run, (q,), (tangent,))
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(run(forward_ad.make_dual(q, tangent)))
        assert torch.equal(out.tangent, pushed)
    jacobian = torch.autograd.functional.jacobian(run, q)
    assert gradcheck(run, (q.clone().requires_grad_(),), check_forward_ad=True)
    assert pushed.allclose(jacobian.flatten(4).sum(-1))
    hessian = torch.func.hessian(lambda q: run(q).sum())(q)
    expected = torch.autograd.functional.hessian(lambda q: run(q).sum(), q)
    assert hessian.allclose(expected)
    batch = torch.stack([q, 2 * q])
    mapped = torch.func.vmap(run)(batch)
    assert torch.equal(
        mapped, torch.stack([attention(x, k, v, mask=Mask.causal(), method="exact") for x in batch])
    )


def test_second_derivative_through_dropout_is_refused():
    q, k, v, _, _ = inputs()
    for method in ("fused", "tiled"):
        out = attention(q, k, v, dropout_p=0.5, training=True, method=method)
        with pytest.raises(RuntimeError, match=r'dropout_p=0.5. Pass method="exact"'):
            torch.autograd.grad(out.sum(), q, create_graph=True)
    out = attention(q, k, v, dropout_p=0.5, training=True, method="exact")
    first = torch.autograd.grad(out.sum(), q, create_graph=True)[0]
    assert torch.autograd.grad(first.sum(), k)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS)
def test_compiled_attention_has_no_graph_break_and_agrees(dtype, mask):
    q, k, v, _, _ = inputs(dtype=dtype)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, mask=MASKS[mask]), fullgraph=True, backend="aot_eager"
    )
    exact = attention(q, k, v, mask=MASKS[mask], method="exact")
    assert torch.equal(compiled(q, k, v), exact)


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_bit_of_float32_attention(method, dtype):
    q, k, v, bias, _ = inputs(dtype=torch.float32)
    plain = attention(q, k, v, mask=Mask.causal(), bias=bias, method=method)
    with torch.autocast("cpu", dtype=dtype):
        cast = attention(q, k, v, mask=Mask.causal(), bias=bias, method=method)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)


def test_a_bias_written_to_before_the_backward_pass_is_refused():
    q = torch.randn(1, 1, 400, 8, requires_grad=True)
    bias = torch.randn(1, 1, 400, 400)
    out = attention(q, q, q, bias=bias, method="fused")
    bias.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("method", ["auto", "tiled"])
@pytest.mark.parametrize("n", [20, 300])
@pytest.mark.parametrize("poisoned", [False, True])
def test_a_mask_written_to_before_the_backward_pass_is_refused(method, n, poisoned):
    q = torch.randn(1, 1, n, 8)
    q[0, 0, 1] = torch.nan if poisoned else 1.0
    q.requires_grad_()
    allowed = torch.rand(1, 1, n, n) > 0.5
    out = attention(q, q, q, mask=Mask.dense(allowed), method=method)
    allowed.logical_not_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@every_method
def test_a_mask_made_under_inference_mode_serves_in_training(method):
    q = torch.randn(1, 2, 20, 8, requires_grad=True)
    with torch.inference_mode():
        allowed = torch.ones(20, 20).tril()[None, None] > 0
    grads = [
        torch.autograd.grad(attention(q, q, q, mask=mask, method=method).sum(), q)[0]
        for mask in (Mask.dense(allowed), Mask.dense(torch.ones(20, 20).tril()[None, None] > 0))
    ]
    assert torch.equal(*grads)


def test_lengths_may_vary_without_a_graph_break():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, mask=Mask.causal() & Mask.window(3, 0)),
        fullgraph=True, backend="aot_eager", dynamic=True,
    )  # fmt: skip
    for n in (5, 7, 11):
        q, k, v, _, _ = inputs(t=n, s=n, dtype=torch.float32)
        exact = attention(q, k, v, mask=Mask.causal() & Mask.window(3, 0), method="exact")
        assert torch.equal(compiled(q, k, v), exact)


def test_dropout_keeps_the_mean_and_drops_the_share():
    torch.manual_seed(0)
    q = torch.zeros(1, 1, 512, 4)
    v = torch.eye(512)[None, None]
    for method in METHODS:
        kept = attention(q, q, v, dropout_p=0.25, training=True, method=method) > 0
        share = kept.double().mean()
        # Four standard errors of a mean of 512 * 512 draws.
        assert abs(share - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 512**2)
        again = attention(q, q, v, dropout_p=0.25, training=True, method=method) > 0
        assert not torch.equal(kept, again)


NEEDS_TILES = {"softcap": 1.0}
CHOICES = [
    ("auto", {}, "fused", "nothing stands against torch's kernels"),
    ("auto", NEEDS_TILES, "tiled", "torch's kernels cannot take it: a soft-cap"),
    (
        "auto",
        {"stats": True},
        "tiled",
        "details need every row's scores, which the kernel keeps",
    ),
    ("auto", {"stats": True, "weights": True}, "exact", "weights asked for"),
    ("exact", {"stats": True, "weights": True}, "exact", "asked for"),
    ("exact", {}, "exact", "asked for"),
    ("tiled", {}, "tiled", "asked for"),
    ("tiled", {"stats": True}, "tiled", "asked for"),
    ("fused", {}, "fused", "asked for"),
]


@pytest.mark.parametrize(("method", "options", "name", "why"), CHOICES)
def test_a_choice_says_what_it_took_and_why(method, options, name, why):
    problem = checked_problem(
        Q, K, V, None, None, None, options.get("softcap"), None, 0.0, None
    )  # fmt: skip
    wanted = {"stats": False, "weights": False} | {
        key: value for key, value in options.items() if key != "softcap"
    }
    assert _choose(problem, method, **wanted)[1:] == (name, why)


def test_only_auto_exports_one_call_and_only_where_it_can(monkeypatch):
    for name in ("is_exporting", "is_compiling"):
        monkeypatch.setattr(torch.compiler, name, lambda: True)
    problem, capped = (
        checked_problem(Q, K, V, None, None, None, softcap, None, 0.0, None)
        for softcap in (None, 1.0)
    )
    plain = {"stats": False, "weights": False}
    graph = ("fused", "torch.export is tracing: a graph for other runtimes")
    traced = ("exact", "torch.compile or torch.export is tracing")
    assert _choose(problem, "auto", **plain)[1:] == graph
    assert _choose(problem, "auto", stats=True, weights=False)[1:] == traced
    assert _choose(capped, "auto", **plain)[1:] == traced
    assert _choose(problem, "exact", **plain)[1:] == ("exact", "asked for")


def test_details_say_what_ran_and_why():
    found = attention_details(Q, K, V, weights=True)
    assert (found.method, found.reason) == ("exact", "weights asked for")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(Q, torch.ones_like(Q))
        found = attention_details(dual, K, V)
        everything = [torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)) for x in (Q, K, V)]
        assert attention_details(*everything).reason == "forward-mode derivatives"
        assert attention_details(Q, K, V).method == "tiled"
    assert (found.method, found.reason) == ("exact", "forward-mode derivatives")
    reasons = []

    def run(q):
        found = attention_details(q, K, V)
        reasons.append((found.method, found.reason))
        return found.out

    torch.func.vmap(run)(Q[None])
    assert reasons == [("exact", "a torch.func transform is active")]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"softcap": 1.0}, "a soft-cap"),
        ({"sinks": torch.zeros(2)}, "sinks"),
        ({"bias": torch.zeros(1, 1, 1, 1, requires_grad=True)}, "a bias that wants a gradient"),
        ({"v": V[..., :1]}, "values of another width than the queries"),
        ({"q": Q[:, :, :0]}, "an axis of size 0"),
        ({"k": K[:, :, :0], "v": V[:, :, :0]}, "an axis of size 0"),
    ],
)
def test_fused_says_what_it_cannot_express(options, why):
    tensors = {"q": Q, "k": K, "v": V} | options
    with pytest.raises(ValueError, match=f"got method='fused' with {why}\\."):
        attention(tensors.pop("q"), tensors.pop("k"), tensors.pop("v"), method="fused", **tensors)


def test_fused_drops_weights_of_short_rows_alone():
    q = torch.zeros(1, 1, 257, 1)
    options = {"dropout_p": 0.5, "training": True, "method": "fused"}
    assert attention(q[:, :, :1], q, q + 1, **options).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"with dropout on the weights of long rows\."):
        attention(q, q, q, **options)


def test_methods_say_what_they_cannot_express():
    q, k, v, _, _ = inputs()
    with pytest.raises(ValueError, match=r"method='fused' with details asked for\."):
        attention_details(q, k, v, method="fused")
    with pytest.raises(ValueError, match=r"method='tiled' with weights asked for\."):
        attention_details(q, k, v, method="tiled", weights=True)
    with pytest.raises(ValueError, match=r"method='tiled' with a .*func transform"):
        torch.func.vmap(lambda q: attention(q, k, v, method="tiled"))(q[None])


KEEP = torch.ones(2, 5, dtype=torch.bool)
REFUSED = [
    (
        {"q": [1.0]},
        TypeError,
        "q must be a torch.Tensor, got q=list. Use torch.as_tensor.",
    ),
    (
        {"q": Q.long()},
        TypeError,
        "q must have a floating-point dtype, got q=torch.int64.",
    ),
    (
        {"q": Q[0]},
        ValueError,
        "q must have 4 axes (b, h, t, d), got q=a tensor of shape (2, 5, 3). Split the "
        "heads first.",
    ),
    (
        {"k": K[0]},
        ValueError,
        "k must have 4 axes (b, g, s, d), got k=a tensor of shape (1, 5, 3). Split the "
        "heads first.",
    ),
    (
        {"v": V[0]},
        ValueError,
        "v must have 4 axes (b, g, s, e), got v=a tensor of shape (1, 5, 3). Split the "
        "heads first.",
    ),
    (
        {"k": K.double()},
        TypeError,
        "k must have the dtype of q, got k with torch.float64 and q with torch.float32.",
    ),
    (
        {"v": V.half()},
        TypeError,
        "v must have the dtype of q, got v with torch.float16 and q with torch.float32.",
    ),
    (
        {"q": Q.to(torch.float8_e4m3fn)},
        TypeError,
        "q must be float64, float32, bfloat16 or float16, got q=torch.float8_e4m3fn. "
        "Convert it: an 8-bit float cannot hold attention.",
    ),
    (
        {"k": K.to("meta")},
        ValueError,
        "k must have the device of q, got k with meta and q with cpu.",
    ),
    (
        {"k": K[:1]},
        ValueError,
        "k must have the batch size of q, got k with 1 and q with 2.",
    ),
    (
        {"v": V[:, :, :3]},
        ValueError,
        "v must have the number of keys of k, got v with 3 and k with 5.",
    ),
    (
        {"v": torch.cat([V, V], 1)},
        ValueError,
        "v must have the number of heads of k, got v with 2 and k with 1.",
    ),
    (
        {"k": K[..., :2]},
        ValueError,
        "k must have the head dim of q, got k with 2 and q with 3.",
    ),
    (
        {"k": K.expand(2, 3, 5, 3), "v": V.expand(2, 3, 5, 3)},
        ValueError,
        "k.shape[1] must divide q.shape[1], got k.shape[1]=3 and q.shape[1]=2.",
    ),
    (
        {"k": K.expand(2, 5, 5, 3), "v": V.expand(2, 5, 5, 3)},
        ValueError,
        "k.shape[1] must divide q.shape[1], got k.shape[1]=5 and q.shape[1]=2.",
    ),
    (
        {"k": K.expand(2, 3, 5, 3)[:, :, :2], "v": V.expand(2, 3, 5, 3)[:, :, :2]},
        ValueError,
        "k.shape[1] must divide q.shape[1], got k.shape[1]=3 and q.shape[1]=2.",
    ),
    (
        {"mask": KEEP},
        ValueError,
        "mask must have 4 axes (b, h, t, s), got mask=a tensor of shape (2, 5). (b, s) "
        "and (t, s) look alike: use Mask.padding(keep) for (b, s), mask[None, None] for "
        "(t, s).",
    ),
    (
        {"mask": torch.ones(5, 5).bool()},
        ValueError,
        "mask must have 4 axes (b, h, t, s), got mask=a tensor of shape (5, 5). (b, s) "
        "and (t, s) look alike: use Mask.padding(keep) for (b, s), mask[None, None] for "
        "(t, s).",
    ),
    (
        {"mask": torch.zeros(1, 1, 5, 5)},
        TypeError,
        "mask must be boolean (True = may attend), got mask=torch.float32. A float mask "
        "is a bias: pass it as bias=, where -inf blocks.",
    ),
    (
        {"mask": torch.zeros(1, 1, 5, 5).byte()},
        TypeError,
        "mask must be boolean (True = may attend), got mask=torch.uint8. Where a non-zero"
        " entry means True, pass mask.bool().",
    ),
    (
        {"mask": "causal"},
        TypeError,
        "mask must be a Mask, got mask=str. Pass a stabletx.Mask or a boolean tensor of 4 axes.",
    ),
    (
        {"mask": torch.ones(2, 1, 5, 4).bool()},
        ValueError,
        "allowed must cover the 5 keys, got allowed=a mask over 4.",
    ),
    (
        {"mask": torch.ones(3, 1, 5, 5).bool()},
        ValueError,
        "mask must have batch size 1 or 2, got mask=a mask with batch size 3.",
    ),
    (
        {"mask": torch.ones(2, 3, 5, 5).bool()},
        ValueError,
        "mask must have heads 1 or 2, got mask=a mask with heads 3.",
    ),
    (
        {"mask": Mask.padding(KEEP.to("meta"))},
        ValueError,
        "mask must be on cpu, got mask=a mask on meta.",
    ),
    (
        {"bias": B[0]},
        ValueError,
        "bias must have 4 axes (b, h, t, s), got bias=a tensor of shape (2, 5, 5). Add "
        "axes of size 1.",
    ),
    (
        {"bias": KEEP[None, None]},
        TypeError,
        "bias must have a floating-point dtype, got bias=torch.bool. A boolean belongs in mask=.",
    ),
    (
        {"bias": B[..., :2]},
        ValueError,
        "bias must have each axis full or 1 for the scores' shape (2, 2, 5, 5), got "
        "bias=a tensor of shape (1, 2, 5, 2).",
    ),
    (
        {"bias": B.to("meta")},
        ValueError,
        "bias must have the device of q, got bias with meta and q with cpu.",
    ),
    (
        {"sinks": torch.zeros(3)},
        ValueError,
        "sinks must have shape (2,), got sinks=a tensor of shape (3,).",
    ),
    (
        {"sinks": torch.zeros(2).long()},
        TypeError,
        "sinks must have a floating-point dtype, got sinks=torch.int64.",
    ),
    (
        {"scale": math.nan},
        ValueError,
        "scale must be finite, got scale=nan.",
    ),
    (
        {"scale": math.inf},
        ValueError,
        "scale must be finite, got scale=inf.",
    ),
    (
        {"scale": "1"},
        TypeError,
        "scale must be a number, got scale='1'.",
    ),
    (
        {"softcap": 0.0},
        ValueError,
        "softcap must be positive, got softcap=0.0. Pass None for no soft-cap.",
    ),
    (
        {"softcap": math.inf},
        ValueError,
        "softcap must be finite, got softcap=inf.",
    ),
    (
        {"dropout_p": 1.0, "training": True},
        ValueError,
        "dropout_p must be in [0, 1), got dropout_p=1.0.",
    ),
    (
        {"dropout_p": -0.1, "training": True},
        ValueError,
        "dropout_p must be in [0, 1), got dropout_p=-0.1.",
    ),
    (
        {"dropout_p": math.nan, "training": True},
        ValueError,
        "dropout_p must be in [0, 1), got dropout_p=nan.",
    ),
    (
        {"dropout_p": "0", "training": True},
        TypeError,
        "dropout_p must be a number, got dropout_p='0'.",
    ),
    (
        {"dropout_p": 0.1},
        ValueError,
        "training must be True or False where dropout_p > 0, got training=None. Pass "
        "training=self.training.",
    ),
    (
        {"training": 1},
        TypeError,
        "training must be None, True or False, got training=1.",
    ),
    (
        {"method": "flash"},
        ValueError,
        "method must be one of 'auto', 'fused', 'tiled', 'exact', got method='flash'.",
    ),
]


@pytest.mark.parametrize(("options", "error", "text"), REFUSED)
@pytest.mark.parametrize("function", [attention, attention_details])
def test_attention_refuses_bad_arguments_and_says_why(function, options, error, text):
    arguments = {"q": Q, "k": K, "v": V, **options}
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        function(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
