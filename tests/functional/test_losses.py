"""Cross entropy: nothing to learn from costs nothing, and what is ignored cannot poison."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stabletx.functional import cross_entropy, logsumexp
from stabletx.testing.assertions import assert_within
from stabletx.testing.tolerances import cross_entropy_error_bound

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])

OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "weights": {"class_weights": torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0])},
    "z_loss": {"z_loss": 1e-2},
    "all": {
        "label_smoothing": 0.2,
        "class_weights": torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0]),
        "z_loss": 1e-3,
    },
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def noise(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def forward_and_gradient(logits, labels, **options):
    logits = logits.detach().clone().requires_grad_()
    loss = cross_entropy(logits, labels, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), logits)


def plainly(logits, labels, ignore_label=-100, label_smoothing=0.0, class_weights=None, z_loss=0.0):
    """Compute each row's loss and weight with nothing but Python's own floats."""
    losses, weights = [], []
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        w = [1.0] * len(row) if class_weights is None else class_weights.double().tolist()
        weights.append(0.0 if label == ignore_label else w[label])
        if weights[-1] == 0.0:
            losses.append(0.0)
            continue
        top = max(row)
        log_total = math.log(math.fsum(math.exp(score - top) for score in row))
        minus_log_p = [log_total - (score - top) for score in row]
        possible = [c for c, score in enumerate(row) if score != -math.inf]
        even = math.fsum(w[c] * minus_log_p[c] for c in possible) / len(possible)
        losses.append(
            (1 - label_smoothing) * w[label] * minus_log_p[label]
            + label_smoothing * even
            + z_loss * w[label] * (top + log_total) ** 2
        )
    return losses, weights


@each_option
@each_reduction
def test_cross_entropy_is_its_formula(options, reduction):
    logits, labels = noise(9, 5, dtype=torch.float64) * 3, torch.arange(9) % 5
    logits[2, 1] = logits[7, 4] = -torch.inf
    labels[4] = -100
    losses, weights = plainly(logits, labels, **options)
    expected = {
        "none": losses,
        "sum": math.fsum(losses),
        "mean": math.fsum(losses) / math.fsum(weights),
    }[reduction]
    loss = cross_entropy(logits, labels, reduction=reduction, **options)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))


@each_dtype
@each_option
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
def test_cross_entropy_is_within_the_bound_of_rounding(dtype, options, scale):
    logits, labels = noise(9, 5, dtype=dtype) * scale, torch.arange(9) % 5
    losses = cross_entropy(logits, labels, reduction="none", **options)
    expected, _ = plainly(logits, labels, **options)
    wide = logits.to(losses.dtype)  # the loss is not rounded to the dtype of the logits
    bound = cross_entropy_error_bound(wide, labels, reduction="none", **options)
    assert_within(bound, losses, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@each_reduction
def test_cross_entropy_agrees_with_torch_on_ordinary_rows(weighted, label_smoothing, reduction):
    logits, labels = noise(7, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 4, -7, 1, 0])
    weights = torch.tensor([0.5, 2.0, 1.0, 0.1, 3.0], dtype=torch.float64) if weighted else None
    expected = torch.nn.functional.cross_entropy(
        logits,
        labels,
        weights,
        ignore_index=-7,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    loss = cross_entropy(
        logits,
        labels,
        ignore_label=-7,
        class_weights=weights,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    torch.testing.assert_close(loss, expected)


@each_dtype
@each_option
@each_reduction
@pytest.mark.parametrize("rows", [0, 3])
def test_no_present_row_gives_loss_zero_and_gradient_zero(dtype, options, reduction, rows):
    logits, labels = noise(rows, 5, dtype=dtype), torch.full((rows,), -100)
    for poison in (0.0, torch.nan, -torch.inf):
        loss, gradient = forward_and_gradient(
            logits + poison, labels, reduction=reduction, **options
        )
        assert torch.equal(loss, torch.zeros_like(loss))
        assert torch.equal(gradient, torch.zeros_like(gradient))


@each_reduction
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_class_weights_of_zero_for_every_label_give_zero(reduction, label_smoothing):
    logits, labels = noise(2, 3), torch.tensor([0, 1])
    logits[0] = torch.nan
    options = {"class_weights": torch.tensor([0.0, 0.0, 1.0]), "label_smoothing": label_smoothing}
    loss, gradient = forward_and_gradient(logits, labels, reduction=reduction, **options)
    assert not loss.any()
    assert not gradient.any()


@each_dtype
@each_option
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, "largest"])
@pytest.mark.parametrize("absent", ["ignored", "weightless"])
def test_absent_rows_change_no_bit_whatever_they_hold(dtype, options, poison, absent):
    if absent == "weightless":
        options = {**options, "class_weights": torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0])}
    labels = torch.tensor([1, -100 if absent == "ignored" else 3, 4, 0])
    logits = noise(4, 5, dtype=dtype)
    loss, gradient = forward_and_gradient(logits, labels, **options)
    logits[1] = torch.finfo(dtype).max if poison == "largest" else poison
    logits[1, 2] = -1.0
    spoilt = forward_and_gradient(logits, labels, **options)
    assert torch.equal(loss, spoilt[0])
    assert torch.equal(gradient, spoilt[1])
    assert not gradient[1].any()
    assert gradient[[0, 2, 3]].any(-1).all()


@each_dtype
@each_option
def test_classes_ruled_out_by_minus_inf_leave_loss_and_gradient_finite(dtype, options):
    logits, labels = noise(3, 5, dtype=dtype), torch.tensor([0, 1, 4])
    logits[:, 2:4] = -torch.inf
    loss, gradient = forward_and_gradient(logits, labels, **options)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert not gradient[:, 2:4].any()


def test_smoothing_spreads_over_the_possible_classes_only():
    logits, labels = noise(4, 3), torch.tensor([0, 1, 2, 1])
    ruled_out = torch.full((4, 2), -torch.inf)
    wide = torch.cat([logits, ruled_out], -1)
    for label_smoothing in (0.0, 0.1, 0.9):
        loss, gradient = forward_and_gradient(logits, labels, label_smoothing=label_smoothing)
        out = forward_and_gradient(wide, labels, label_smoothing=label_smoothing)
        torch.testing.assert_close(out[0], loss)
        torch.testing.assert_close(out[1][:, :3], gradient)


def test_a_label_ruled_out_costs_infinity_and_still_pushes_the_others_down():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    loss, gradient = forward_and_gradient(logits, torch.tensor([2]))
    assert loss == torch.inf
    assert torch.equal(gradient, torch.tensor([[0.5, 0.5, -1.0]]))


@each_dtype
@each_option
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_present_row_that_is_not_finite_is_not_swallowed(dtype, options, bad):
    logits, labels = noise(3, 5, dtype=dtype), torch.tensor([0, 1, 4])
    clean, clean_gradient = forward_and_gradient(logits, labels, reduction="none", **options)
    logits[1, 2] = bad
    loss, gradient = forward_and_gradient(logits, labels, reduction="none", **options)
    assert loss[1].isnan()
    assert gradient[1].isnan().all()
    assert torch.equal(loss[[0, 2]], clean[[0, 2]])
    assert torch.equal(gradient[[0, 2]], clean_gradient[[0, 2]])
    assert cross_entropy(logits, labels, **options).isnan()
    logits[1] = -torch.inf
    assert cross_entropy(logits, labels, **options).isnan()


@each_option
def test_a_common_offset_moves_no_bit_of_loss_or_gradient(options):
    options = {**options, "z_loss": 0.0}
    logits, labels = (noise(6, 5) * 64).round() / 16, torch.arange(6) % 5
    here = forward_and_gradient(logits, labels, **options)
    assert all(map(torch.equal, here, forward_and_gradient(logits + 2.0**19, labels, **options)))


@each_dtype
def test_logits_of_the_largest_float_give_a_finite_loss_where_it_is_representable(dtype):
    most = torch.finfo(dtype).max
    logits = torch.tensor([[most, -most, 0.0], [most, most, most]], dtype=dtype)
    loss, gradient = forward_and_gradient(logits, torch.tensor([0, 2]), reduction="none")
    assert loss[0] == 0
    assert torch.equal(loss[1], torch.tensor(3.0, dtype=loss.dtype).log())
    assert gradient.isfinite().all()


def test_the_mean_of_losses_whose_sum_overflows_is_finite():
    logits = torch.tensor([[1e38, 0.0]]).expand(8, 2)
    loss, gradient = forward_and_gradient(logits, torch.ones(8, dtype=torch.int64))
    assert loss == torch.tensor(1e38)
    assert gradient.isfinite().all()


@each_dtype
@each_reduction
def test_the_loss_of_sixteen_bit_logits_is_float32(dtype, reduction):
    logits, labels = noise(4, 5, dtype=dtype), torch.tensor([0, 1, -100, 4])
    loss, gradient = forward_and_gradient(logits, labels, reduction=reduction, label_smoothing=0.1)
    wide = logits.to(torch.promote_types(dtype, torch.float32))
    expected = forward_and_gradient(wide, labels, reduction=reduction, label_smoothing=0.1)
    assert loss.dtype == wide.dtype
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1].to(dtype))


@settings(deadline=None)
@given(
    batch=st.lists(st.integers(0, 3), max_size=2),
    c=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]),
    option=st.sampled_from(sorted(OPTIONS)),
)
def test_leading_axes_and_label_dtypes_change_no_bit(batch, c, seed, dtype, option):
    options = {**OPTIONS[option], "ignore_label": 7}
    if "class_weights" in options:
        options["class_weights"] = noise(c, seed=seed).abs()
    labels = torch.randint(0, c, batch, generator=torch.Generator().manual_seed(seed))
    labels = torch.where(noise(*batch, seed=seed) > 1, 7, labels)
    logits = noise(*batch, c, seed=seed)
    losses = cross_entropy(logits, labels.to(dtype), reduction="none", **options)
    assert losses.shape == tuple(batch)
    flat = cross_entropy(logits.reshape(-1, c), labels.reshape(-1), reduction="none", **options)
    assert torch.equal(losses.reshape(-1), flat)
    expected, _ = plainly(logits.reshape(-1, c), labels.reshape(-1), **options)
    torch.testing.assert_close(flat, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize(
    ("options", "reduction"),
    [(OPTIONS[name], "mean") for name in OPTIONS] + [(OPTIONS["all"], r) for r in ("sum", "none")],
)
def test_derivatives_agree_with_differences_and_transforms(options, reduction):
    logits = noise(4, 5, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([0, -100, 4, 3])

    def function(z):
        return cross_entropy(z, labels, reduction=reduction, **options)

    assert torch.autograd.gradcheck(function, logits, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, logits)
    if reduction != "none":
        hessian = torch.func.hessian(function)(logits.detach())
        twice_reverse = torch.autograd.functional.hessian(function, logits.detach())
        torch.testing.assert_close(hessian, twice_reverse)
        _, tangent = torch.func.jvp(function, (logits.detach(),), (logits.detach(),))
        slope = torch.func.grad(function)(logits.detach())
        torch.testing.assert_close(tangent, (slope * logits).sum())


@each_option
def test_vmap_agrees_with_a_loop(options):
    logits, labels = noise(4, 3, 5, dtype=torch.float64), torch.tensor([[0, -100, 1]] * 4)
    labels[2] = -100

    def function(z, y):
        return cross_entropy(z, y, **options)

    gradients = torch.func.vmap(torch.func.grad(function))(logits, labels)
    loop = [torch.func.grad(function)(z, y) for z, y in zip(logits, labels, strict=True)]
    torch.testing.assert_close(gradients, torch.stack(loop))


def test_gradients_reach_class_weights():
    logits, labels = noise(4, 3, dtype=torch.float64), torch.tensor([0, 1, -100, 1])
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda w: cross_entropy(logits, labels, class_weights=w, label_smoothing=0.1), weights
    )


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]], ids=["plain", "all"])
def test_compiled_and_autocast_equal_eager_to_the_bit(options):
    def function(logits, labels):
        return cross_entropy(logits, labels, **options)

    def run(function, logits):
        logits = logits.clone().requires_grad_()
        loss = function(logits, labels)
        return loss.detach(), *torch.autograd.grad(loss.sum(), logits)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    labels = torch.tensor([0, -100, 4, 3])
    for dtype in (torch.float32, torch.bfloat16):
        logits = noise(4, 5, dtype=dtype)
        eager = run(function, logits)
        assert all(map(torch.equal, eager, run(compiled, logits)))
        with torch.autocast("cpu", torch.bfloat16):
            assert all(map(torch.equal, eager, run(function, logits)))


def test_z_loss_is_its_coefficient_times_the_squared_normalizer():
    logits, labels = noise(4, 5, dtype=torch.float64), torch.tensor([0, 1, -100, 4])
    rows = {"reduction": "none"}
    extra = cross_entropy(logits, labels, z_loss=0.5, **rows) - cross_entropy(
        logits, labels, **rows
    )
    expected = 0.5 * logsumexp(logits) ** 2 * torch.tensor([1, 1, 0, 1])
    torch.testing.assert_close(extra, expected)


def test_a_label_that_is_no_class_is_an_error():
    for label in (5, -1):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            cross_entropy(noise(1, 5), torch.tensor([label]))


def test_wrong_arguments_are_refused_by_name():
    logits, labels = noise(2, 3), torch.tensor([0, 1])
    with pytest.raises(TypeError, match=r"logits must have a floating-point dtype, got logits=tor"):
        cross_entropy(logits.long(), labels)
    for dtype in (torch.float32, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=rf"labels must hold integers, got labels={dtype}"):
            cross_entropy(logits, labels.to(dtype))
    with pytest.raises(
        ValueError, match=r"labels must have shape \(2,\), one label per row .*\(3,\)"
    ):
        cross_entropy(logits, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"where they are axis 1, pass logits.movedim\(1, -1\)"):
        cross_entropy(noise(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64))
    for shape in ((), (2, 0)):
        with pytest.raises(ValueError, match=r"logits must have a last axis of at least one class"):
            cross_entropy(torch.zeros(shape), labels)
    with pytest.raises(
        ValueError, match=r"class_weights must have shape \(3,\), got class_weights=a"
    ):
        cross_entropy(logits, labels, class_weights=torch.ones(2))
    for label_smoothing in (-0.1, 1.0, float("nan")):
        with pytest.raises(
            ValueError, match=rf"label_smoothing must be in \[0, 1\), got .*={label_smoothing}"
        ):
            cross_entropy(logits, labels, label_smoothing=label_smoothing)
    for z_loss in (-1e-4, 1.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"z_loss must be .*, got z_loss={z_loss}"):
            cross_entropy(logits, labels, z_loss=z_loss)
    with pytest.raises(ValueError, match=r"reduction must be one of 'mean', 'sum', 'none', got re"):
        cross_entropy(logits, labels, reduction="average")
    for ignore_label in (True, 1.0, None):
        with pytest.raises(TypeError, match=rf"ignore_label must be an int, got .*={ignore_label}"):
            cross_entropy(logits, labels, ignore_label=ignore_label)
    with pytest.raises(
        ValueError, match=r"labels must have the device of logits, got labels with m"
    ):
        cross_entropy(logits, labels.to("meta"))
