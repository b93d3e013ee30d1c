"""The encoder: padding never matters, wherever it lies and however it is run."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stabletx.models import Encoder, TransformerConfig
from stabletx.packing import Packed

SIZES = {"vocab_size": 50, "d_model": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
KINDS = {
    "pre rotary": {},
    "post learned": {"norm_position": "post", "position": "learned", "qk_norm": False},
    "peri none swiglu": {
        "norm_position": "peri",
        "position": "none",
        "norm": "rms",
        "activation": "swiglu",
        "use_bias": False,
    },
    "windows relative": {
        "window": 2,
        "global_every": 2,
        "window_rotary_base": 100.0,
        "relative_buckets": 8,
        "relative_max_distance": 6,
        "embedding_norm": True,
        "norm_bias": False,
        "activation": "geglu",
        "d_head": 6,
        "attention_scale": 1.0,
    },
    "factorised shared": {
        "n_layers": 4,
        "n_distinct_layers": 2,
        "d_embedding": 6,
        "n_token_types": 2,
        "position": "sinusoidal",
        "embedding_scale": 3.0,
        "norm_position": "post",
        "norm_eps": 1e-12,
        "activation": "relu",
    },
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def model(kind="pre rotary", dtype=torch.float64, **options):
    torch.manual_seed(0)
    made = Encoder(TransformerConfig(**{**SIZES, **KINDS[kind], **options}))
    if made.places.relative is not None:  # it starts at 0, where nothing shows
        torch.nn.init.normal_(made.places.relative.table.weight)
    return made.to(dtype)


def some_ids(*shape, seed=0):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))


def run(kind, dtype, ids, keep=None):
    """Encode; return the states and every gradient."""
    made = model(kind, dtype)
    out = made(ids, keep).last_hidden_state
    weights = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), list(made.parameters()))]


@pytest.fixture
def padded(monkeypatch):
    """Give a way to run a function as if packing were never worth it."""

    def without_packing(function):
        def call(dtype):
            with monkeypatch.context() as patch:
                patch.setattr("stabletx.models._inputs.FULL_ENOUGH", -1.0)
                return function(dtype)

        return call

    return without_packing


@every_kind
def test_packed_encoder_is_the_padded_one_with_its_gradients(same_function, padded, kind):
    @settings(max_examples=10, deadline=None)
    @given(kept=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=2, max_size=4))
    def check(kept):
        keep = torch.tensor(kept)
        keep[0, 2] = True  # at least one token, so that float32 shows some rounding
        ids = some_ids(*keep.shape)
        first = lambda dtype: run(kind, dtype, ids, keep)  # noqa: E731
        same_function(padded(first), first)

    check()


@every_kind
def test_packed_ids_give_the_packed_states_of_the_padded(kind):
    keep = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1]]).bool()
    ids = some_ids(4, 4)
    made = model(kind)
    packed = made(Packed(ids[keep], keep.sum(1))).last_hidden_state
    assert torch.equal(packed, made(ids, keep).last_hidden_state[keep])


@every_kind
@pytest.mark.parametrize("packs", [True, False])
def test_encoder_does_not_see_where_or_how_much_padding_there_is(
    same_function, padded, kind, packs
):
    ids = some_ids(1, 5)

    def alone(dtype):
        return [model(kind, dtype)(ids).last_hidden_state.expand(3, -1, -1).flatten(0, 1)]

    def with_padding(dtype):
        keep = torch.zeros(3, 9, dtype=torch.bool)
        keep[0, :5] = keep[1, 4:] = True
        keep[2, [0, 2, 3, 6, 8]] = True
        filled = some_ids(3, 9, seed=1).masked_scatter(keep, ids.expand(3, -1))
        out = model(kind, dtype)(filled, keep).last_hidden_state
        assert not out[~keep].any()
        return [out[keep]]

    same_function(alone, with_padding if packs else padded(with_padding))


@every_kind
def test_encoder_does_not_see_the_order_of_a_batch(same_function, kind):
    keep = torch.arange(6) < torch.tensor([[3], [6], [1], [3]])
    ids, order = some_ids(4, 6), torch.tensor([2, 0, 3, 1])

    def ordered(dtype, order):
        out = model(kind, dtype)(ids[order], keep[order]).last_hidden_state
        return [out[order.argsort()]]

    same_function(lambda d: ordered(d, torch.arange(4)), lambda d: ordered(d, order))


@pytest.mark.parametrize("fill", ["packed", "padded", "full"])
def test_encoder_moves_no_bit_of_a_row_when_another_changes(fill, monkeypatch):
    if fill == "padded":
        monkeypatch.setattr("stabletx.models._inputs.FULL_ENOUGH", -1.0)
    keep = torch.arange(6) < torch.tensor([[3], [6], [3]])
    keep = None if fill == "full" else keep
    made, ids = model(), some_ids(3, 6)
    changed = ids.clone()
    changed[1] = some_ids(6, seed=1)
    a, b = (made(x, keep).last_hidden_state for x in (ids, changed))
    assert torch.equal(a[[0, 2]], b[[0, 2]])
    assert not torch.equal(a[1], b[1])


@every_kind
def test_encoder_gives_zeros_for_a_batch_of_padding_alone(kind):
    out, *grads = run(kind, torch.float64, some_ids(2, 4), torch.zeros(2, 4, dtype=torch.bool))
    assert torch.equal(out, torch.zeros(2, 4, 16, dtype=torch.float64))
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_encoder_takes_a_batch_without_rows_or_columns(shape, masked):
    keep = torch.ones(shape, dtype=torch.bool) if masked else None
    assert model()(some_ids(*shape), keep).last_hidden_state.shape == (*shape, 16)


def test_encoder_reads_masks_of_zeros_and_ones_as_booleans():
    keep = torch.tensor([[1, 1, 0], [1, 1, 1]])
    made, ids = model(), some_ids(2, 3)
    expected = made(ids, keep.bool()).last_hidden_state
    for dtype in (torch.int64, torch.float32):
        assert torch.equal(made(ids, keep.to(dtype)).last_hidden_state, expected)
    full = made(ids, torch.ones_like(keep)).last_hidden_state
    assert torch.equal(full, made(ids).last_hidden_state)


NARROW = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_encoder_reads_ids_lengths_and_types_of_any_integer_dtype(dtype):
    made, ids, keep = model("factorised shared"), some_ids(2, 3), torch.ones(2, 3).bool()
    keep[0, 2] = False
    types = ids % 2
    for mask in (None, keep):
        expected = made(ids, mask, token_type_ids=types).last_hidden_state
        found = made(ids.to(dtype), mask, token_type_ids=types.to(dtype)).last_hidden_state
        assert torch.equal(found, expected)
    lengths = torch.tensor([2, 3])
    expected = made(Packed(ids[keep], lengths)).last_hidden_state
    packed = Packed(ids[keep].to(dtype), lengths.to(dtype))
    assert torch.equal(made(packed).last_hidden_state, expected)


def test_encoder_works_where_new_tensors_lie_on_another_device():
    made, ids, keep = model(), some_ids(2, 3), torch.tensor([[True, True, False], [True] * 3])
    packed = Packed(ids[keep], keep.sum(1))
    with torch.device("meta"):
        outs = [made(ids, keep).last_hidden_state, made(packed).last_hidden_state]
    assert torch.equal(outs[0], made(ids, keep).last_hidden_state)
    assert torch.equal(outs[1], made(packed).last_hidden_state)


def test_encoder_is_one_graph_when_compiled(same_function):
    keep = torch.tensor([[True, True, False], [True, True, True]])

    def eager(dtype, compiles=False):
        made = model(dtype=dtype, n_layers=1)
        if compiles:
            made = torch.compile(made, fullgraph=True, backend="aot_eager")
        out = made(some_ids(2, 3), keep).last_hidden_state
        return [out, *torch.autograd.grad(out.square().sum(), list(made.parameters()))]

    same_function(eager, lambda dtype: eager(dtype, compiles=True))


def test_encoder_drops_in_training_alone():
    torch.manual_seed(0)
    made, ids = Encoder(TransformerConfig(**SIZES, dropout_p=0.5)), some_ids(2, 5)
    keep = torch.arange(5) < torch.tensor([[2], [5]])
    outs = []
    for _ in range(2):
        torch.manual_seed(1)
        outs.append(made.train()(ids, keep).last_hidden_state)
    assert torch.equal(*outs)
    made.eval()
    assert torch.equal(made(ids, keep).last_hidden_state, made(ids, keep).last_hidden_state)
    assert not torch.equal(made(ids, keep).last_hidden_state, outs[0])


def test_weights_start_so_that_depth_does_not_swell_the_stream():
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "d_model": 64, "n_heads": 4}
    shallow, deep = (Encoder(TransformerConfig(n_layers=n, **sizes)) for n in (1, 16))
    for block in (shallow.blocks[0], deep.blocks[0]):
        within = block.feed_forward.widen.weight.detach()
        assert within.std() == pytest.approx((2 / (5 * 64)) ** 0.5, rel=4 / within.numel() ** 0.5)
    a, b = (x.blocks[0].feed_forward.out.weight.detach() for x in (shallow, deep))
    assert a.std() / b.std() == pytest.approx(4, rel=8 / a.numel() ** 0.5)


@pytest.mark.parametrize(
    ("ids", "keep", "error", "match"),
    [
        (torch.zeros(2, 3), None, TypeError, r"input_ids must hold integers, got .*float32"),
        (torch.zeros(3).long(), None, ValueError, r"input_ids must have 2 axes \(b, n\)"),
        (torch.full((1, 2), 50), None, ValueError, r"in \[0, vocab_size=50\), got .*from 50 to 50"),
        (torch.full((1, 2), -1), None, ValueError, r"in \[0, vocab_size=50\), got .*from -1 to -1"),
        (
            torch.zeros(2, 3).long(),
            torch.ones(2, 4),
            ValueError,
            r"attention_mask must have the shape of input_ids, got attention_mask with \(2, 4\)",
        ),
        (
            Packed(torch.zeros(3).long(), torch.tensor([3])),
            torch.ones(1, 3),
            ValueError,
            "attention_mask must be None beside packed ids",
        ),
        (
            torch.zeros(1, 2).long(),
            torch.tensor([[0.0, -1e9]]),
            ValueError,
            "attention_mask must hold 0 and 1 or be boolean, .*pass attention_mask == 0",
        ),
        (torch.zeros(1, 2).long(), torch.tensor([[1, 2]]), ValueError, "must hold 0 and 1"),
        (torch.zeros(1, 1).long(), torch.tensor([[torch.nan]]), ValueError, "must hold 0 and 1"),
    ],
)
def test_encoder_refuses_what_are_not_ids_or_their_mask(ids, keep, error, match):
    with pytest.raises(error, match=match):
        model()(ids, keep)


def test_encoder_refuses_more_tokens_than_it_has_learned_positions():
    config = TransformerConfig(**SIZES, position="learned", max_seq_len=4)
    made = Encoder(config)
    assert made(some_ids(1, 4)).last_hidden_state.shape == (1, 4, 16)
    for ids in (some_ids(1, 5), Packed(some_ids(5), torch.tensor([5]))):
        with pytest.raises(ValueError, match=r"at most max_seq_len=4 tokens.*got input_ids=5"):
            made(ids)
    rotary = Encoder(TransformerConfig(**SIZES, max_seq_len=4))
    assert rotary(some_ids(1, 5)).last_hidden_state.isfinite().all()


def test_encoder_that_recomputes_has_the_same_bits():
    plain, frugal = model(), model(recompute_feed_forward=True)
    for made in (plain, frugal):
        made(some_ids(2, 5)).last_hidden_state.square().sum().backward()
    for a, b in zip(plain.parameters(), frugal.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert frugal.blocks[0].feed_forward.recompute
