"""Checkpoints of every family give what transformers gives, and a report on every tensor."""

import json

import pytest
import torch

from stabletx.interop import checkpoints
from stabletx.interop.checkpoints import carry_out, convert, load, read, save
from stabletx.models import (
    Decoder,
    Encoder,
    EncoderDecoder,
    MaskedLanguageModel,
    SequenceClassifier,
    TransformerConfig,
)
from tests.interop.checkpoint_judge import NAMES, batch, edit, judging, rewrite, stored, tiny

pytest.importorskip("transformers")
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}  # the figures that were asked for


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    from transformers.utils import logging

    logging.disable_progress_bar()


def outputs(model, ids, keep, **more):
    """Give what a model of either library returns, at real tokens only."""
    made = model(input_ids=ids, attention_mask=keep.long(), **more)
    found = [made.get(key) for key in ("last_hidden_state", "pooler_output", "logits")]
    per_token = keep.shape if "decoder_input_ids" not in more else None
    return [x[keep] if x.shape[:2] == per_token else x for x in found if x is not None]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_gives_the_outputs_and_gradients_of_transformers(name, dtype, tmp_path):
    theirs = tiny(name)
    ours = load(stored(theirs, tmp_path), dtype=dtype)
    theirs = theirs.to(dtype)
    ids, keep = batch(theirs.config.pad_token_id)
    more = {}
    if isinstance(ours, EncoderDecoder):
        more["decoder_input_ids"] = torch.randint(5, 50, (4, 20))
    with judging(theirs):
        wanted = outputs(theirs, ids, keep, **more)
        torch.manual_seed(1)
        cotangents = [torch.randn_like(x) / x.numel() for x in wanted]
        sum((x * c).sum() for x, c in zip(wanted, cotangents, strict=True)).backward()
    found = outputs(ours, ids, keep, **more)
    sum((x * c).sum() for x, c in zip(found, cotangents, strict=True)).backward()
    for a, b in zip(wanted, found, strict=True):
        assert a.dtype == b.dtype == dtype
        assert (a - b).abs().max() <= LIMITS[dtype]
    compare_gradients(theirs, ours, LIMITS[dtype])


def compare_gradients(theirs, ours, limit):
    tensors = dict(theirs.named_parameters())
    names = {*tensors, *theirs.state_dict()}
    conversion = convert(theirs.config.to_dict(), names, model=type(ours))
    gradients = {name: x.grad for name, x in tensors.items() if x.grad is not None}
    made, report = carry_out(conversion, gradients)
    assert set(report.missing) <= {"final_logits_bias"}  # a buffer of theirs, a parameter of ours
    own = dict(ours.named_parameters())
    assert len(made) == len(own) - len(report.missing)
    for name, gradient in made.items():
        assert (gradient - own[name].grad).abs().max() <= limit, name


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_checkpoint_is_loaded_by_transformers(name, tmp_path):
    import transformers

    theirs = tiny(name)
    ours = load(stored(theirs, tmp_path / "theirs"))
    save(ours, tmp_path / "ours", family=theirs.config.model_type)
    again, said = getattr(transformers, name.split("-")[0]).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(said[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids, keep = batch(theirs.config.pad_token_id)
    more = {"decoder_input_ids": ids} if isinstance(ours, EncoderDecoder) else {}
    first, second = (outputs(x.eval(), ids, keep, **more) for x in (theirs, again))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    for tensor, other in zip(
        ours.state_dict().values(), load(tmp_path / "ours").state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other)


def test_a_family_is_found_for_a_model_that_is_built_like_it(tmp_path):
    for name in ("BertForMaskedLM", "ModernBertModel", "LlamaForCausalLM", "MarianMTModel"):
        theirs = tiny(name)
        save(load(stored(theirs, tmp_path / name)), tmp_path / "ours")
        settings = json.loads((tmp_path / "ours" / "config.json").read_text())
        assert settings["model_type"] == theirs.config.model_type
        assert settings["architectures"] == [name]


def test_save_refuses_what_no_family_can_express(tmp_path):
    model = Encoder(TransformerConfig(50, 16, 2, 4))
    with pytest.raises(ValueError, match=r"model must be what one of bert, .* got model=one with"):
        save(model, tmp_path)
    with pytest.raises(ValueError, match=r"model_type must be one of .*, got model_type='gpt5'"):
        save(model, tmp_path, family="gpt5")
    with pytest.raises(TypeError, match="model must be a StoredModel, got model=Linear"):
        save(torch.nn.Linear(2, 2), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("BertModel", Encoder),
        ("BertForPreTraining", MaskedLanguageModel),
        ("ElectraForPreTraining", Encoder),
        ("AlbertForSequenceClassification", SequenceClassifier),
        ("MistralForCausalLM", Decoder),
        ("MarianMTModel", EncoderDecoder),
    ],
)
def test_the_architecture_says_which_model_it_is(name, kind, tmp_path):
    made = read(stored(tiny(name), tmp_path))
    assert type(made.model) is kind
    assert made.report.model == kind.__name__
    assert not made.report.missing
    assert not made.report.unexpected
    assert not made.report.fresh


def test_a_report_names_every_tensor_of_both(tmp_path):
    theirs = tiny("BertForPreTraining")
    made = read(stored(theirs, tmp_path))
    report = made.report
    from safetensors.torch import load_file

    held = set(load_file(tmp_path / "model.safetensors"))
    assert report.n_loaded == len(made.model.state_dict())
    joined = {name for theirs, _, how in report.reshaped if how == "joined" for name in theirs}
    assert "bert.encoder.layer.0.attention.self.key.bias" in joined
    assert {name for name, _ in report.ignored} == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias",
        "cls.seq_relationship.weight", "cls.seq_relationship.bias",
    }  # fmt: skip
    assert all(reason for _, reason in report.ignored)
    pieces = convert(theirs.config.to_dict(), held, model=MaskedLanguageModel).pieces
    named = {name for piece in pieces for name in piece.theirs}
    named |= {name for name, _ in report.ignored} | {name for name, _ in report.tied}
    assert named >= held
    said = str(report)
    assert said.startswith(f"bert into MaskedLanguageModel: {report.n_loaded} tensors loaded")
    assert "ignored     cls.seq_relationship.bias (of a head that is not asked for)" in said


def test_rows_of_positions_that_no_token_reads_are_reported(tmp_path):
    report = read(stored(tiny("RobertaModel"), tmp_path)).report
    change = "without its first 2 rows"
    table = "embeddings.position_embeddings.weight"
    assert ((table,), "stem.embedding.positions.weight", change) in report.reshaped


def test_a_classifier_grows_on_a_bare_encoder(tmp_path):
    theirs = tiny("BertModel")
    made = read(stored(theirs, tmp_path), labels=("bad", "good", "neither"))
    assert isinstance(made.model, SequenceClassifier)
    assert made.model.config.labels == ("bad", "good", "neither")
    assert made.report.fresh == ("head.out.weight", "head.out.bias")
    assert made.report.missing == ("classifier.weight", "classifier.bias")
    pooler = theirs.pooler.dense.weight
    assert torch.equal(made.model.head.hidden.linear.weight, pooler)
    ids, keep = batch()
    assert made.model(ids, keep, labels=torch.tensor([0, 1, 2, 0])).loss.isfinite()


def test_a_last_layer_of_other_classes_starts_anew_and_one_of_as_many_stays(tmp_path):
    theirs = tiny("DistilBertForSequenceClassification")
    stored(theirs, tmp_path)
    same = read(tmp_path, labels=("no", "yes"))
    assert torch.equal(same.model.head.out.weight, theirs.classifier.weight)
    assert not same.report.fresh
    other = read(tmp_path, labels=("a", "b", "c"))
    assert other.report.fresh == ("head.out.weight", "head.out.bias")
    why = "its 2 classes are not the 3 asked for"
    assert other.report.ignored == (("classifier.bias", why), ("classifier.weight", why))


def test_an_encoder_leaves_a_head_out_and_says_so(tmp_path):
    made = read(stored(tiny("RobertaForMaskedLM"), tmp_path), model=Encoder)
    assert isinstance(made.model, Encoder)
    assert {name for name, _ in made.report.ignored} >= {"lm_head.dense.weight", "lm_head.bias"}


def test_shards_and_old_pickles_give_the_same_model(tmp_path):
    theirs = tiny("BertModel")
    whole = load(stored(theirs, tmp_path / "whole")).state_dict()
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    (tmp_path / "old").mkdir()
    torch.save(theirs.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    theirs.config.save_pretrained(tmp_path / "old")
    for name in ("shards", "old"):
        other = read(tmp_path / name, model=Encoder).model.state_dict()
        assert whole.keys() == other.keys()
        assert all(torch.equal(x, other[key]) for key, x in whole.items())


def test_names_from_before_2019_are_read(tmp_path):
    theirs = tiny("BertModel")
    stored(theirs, tmp_path)
    held = {}
    for name, x in theirs.state_dict().items():
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        held[old.replace("LayerNorm.bias", "LayerNorm.beta")] = x
    rewrite(tmp_path, held)
    assert torch.equal(load(tmp_path).stem.norm.weight, theirs.embeddings.LayerNorm.weight)


def test_a_config_without_model_type_is_known_by_its_weights(tmp_path):
    stored(tiny("BertForMaskedLM"), tmp_path)
    edit(tmp_path, drop=("model_type", "architectures"))
    made = read(tmp_path)
    assert isinstance(made.model, MaskedLanguageModel)
    assert made.report.notes == (
        "no model_type: taken for bert by the names of the weights",
        "no architectures: taken for a MaskedLanguageModel by the names",
    )


def test_a_bare_model_without_model_type_asks_for_its_family(tmp_path):
    stored(tiny("BertModel"), tmp_path)
    edit(tmp_path, drop=("model_type", "architectures"))
    with pytest.raises(ValueError, match=r"model_type must be one of .* Pass family= where"):
        load(tmp_path)
    assert isinstance(load(tmp_path, family="bert"), Encoder)


def test_a_buffer_is_ignored_with_a_reason(tmp_path):
    theirs = tiny("BertModel")
    stored(theirs, tmp_path)
    rewrite(tmp_path, {**theirs.state_dict(), "embeddings.position_ids": torch.arange(9)[None]})
    ignored = read(tmp_path).report.ignored
    assert ignored == (("embeddings.position_ids", "a buffer: positions are counted"),)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "whisper"}, r"model_type must be one of 'albert', .*'t5', got .*'whisper'"),
        ({"model_type": "stabletx"}, "model_type must be another library's"),
        ({"architectures": ["BertForQuestionAnswering"]}, "architectures must be one of BertFor"),
        (
            {"hidden_size": 32},
            r"query.weight must have 32 rows, as config.json says, got",
        ),
        ({"vocab_size": 49}, r"weight of shape \(50, 16\) instead of \(49, 16\)"),
        ({"num_hidden_layers": 5}, "must hold all tensors of the model, got none for .*layer.4"),
        ({"num_hidden_layers": 3}, "must hold no unknown tensors, got .*layer.3.*ignore="),
        ({"num_attention_heads": 3}, "n_heads must divide d_model, got n_heads=3"),
        ({"hidden_act": "mish"}, "config.json's hidden_act must be one of gelu, .*='mish'"),
        ({"position_embedding_type": "relative_key"}, "must be 'absolute', got .*relative_key"),
        ({"is_decoder": True}, "config.json's is_decoder must be False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config must be None"),
        ({"drop": ("hidden_size",)}, "config.json must have the key 'hidden_size'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(changes, match, tmp_path):
    stored(tiny("BertForSequenceClassification"), tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=match):
        load(tmp_path)


def test_tensors_that_lack_or_exceed_are_refused_until_named(tmp_path):
    theirs = tiny("BertModel")
    stored(theirs, tmp_path)
    held = dict(theirs.state_dict())
    rewrite(tmp_path, {**held, "mystery.weight": torch.ones(2)})
    with pytest.raises(ValueError, match=r"no unknown tensors, got mystery.weight"):
        load(tmp_path)
    assert read(tmp_path, ignore=["mystery.weight"]).report.ignored == (
        ("mystery.weight", "as asked for"),
    )
    del held["encoder.layer.2.output.dense.bias"]
    rewrite(tmp_path, held)
    with pytest.raises(ValueError, match=r"hold all tensors .*layer.2.output.dense.bias"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"hold all tensors .*layer.2.output.dense.bias"):
        load(tmp_path, model=SequenceClassifier)


def test_a_head_that_is_promised_and_not_there_is_refused(tmp_path):
    theirs = tiny("MPNetModel")
    stored(theirs, tmp_path)
    edit(tmp_path, architectures=["MPNetForMaskedLM"])
    with pytest.raises(ValueError, match=r"none for lm_head.bias, .* Pass model=stabletx.Encoder"):
        load(tmp_path)
    assert isinstance(load(tmp_path, model=Encoder), Encoder)


def test_tied_tensors_that_differ_are_refused(tmp_path):
    theirs = tiny("BertForMaskedLM")
    stored(theirs, tmp_path)
    held = dict(theirs.state_dict())
    held["cls.predictions.decoder.weight"] = held["cls.predictions.decoder.weight"] + 1
    rewrite(tmp_path, held)
    with pytest.raises(ValueError, match=r"decoder.weight must equal bert.embeddings.*tie_word"):
        load(tmp_path)
    edit(tmp_path, tie_word_embeddings=False)
    model = load(tmp_path)
    assert torch.equal(model.head.weight, held["cls.predictions.decoder.weight"])


def test_dtypes_are_kept_changed_or_refused(tmp_path):
    theirs = tiny("BertModel").to(torch.bfloat16)
    stored(theirs, tmp_path)
    assert {x.dtype for x in load(tmp_path).parameters()} == {torch.bfloat16}
    assert {x.dtype for x in load(tmp_path, dtype=torch.float64).parameters()} == {torch.float64}
    held = dict(theirs.state_dict())
    rewrite(tmp_path, {**held, "pooler.dense.bias": torch.ones(16)})
    with pytest.raises(
        TypeError, match=r"have one dtype, got .*bfloat16, torch.float32. Pass dtype"
    ):
        load(tmp_path)
    assert load(tmp_path, dtype=torch.float32).pooler is not None
    rewrite(tmp_path, {**held, "pooler.dense.bias": torch.ones(16, dtype=torch.int8)})
    with pytest.raises(TypeError, match=r"pooler.dense.bias must hold float32, .*torch.int8 in"):
        load(tmp_path)
    with pytest.raises(TypeError, match=r"dtype must be None or one of .*, got dtype=torch.int8"):
        load(tmp_path, dtype=torch.int8)


def test_damaged_and_missing_files_are_named(tmp_path):
    stored(tiny("BertModel"), tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors must be a whole and fitting file"):
        load(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"folder must hold model.safetensors, pytorch_mod"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json must be a whole and fitting file"):
        load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"folder must hold config.json"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="source must be a folder or a hub id"):
        load(tmp_path / "nowhere")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_a_pickle_of_more_than_tensors_is_refused_and_not_run(tmp_path):
    theirs = tiny("BertModel")
    theirs.config.save_pretrained(tmp_path)
    edit(tmp_path, architectures=["BertModel"])
    path = tmp_path / "pytorch_model.bin"
    torch.save({**theirs.state_dict(), "bomb": Bomb()}, path)
    with pytest.raises(ValueError, match=r"must be a whole pickle of tensors alone.*Nothing in it"):
        load(tmp_path)
    torch.save([torch.ones(2)], path)
    with pytest.raises(ValueError, match=r"a list that holds more than dense tensors by name"):
        load(tmp_path)
    torch.save(theirs.state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"pytorch_model.bin must be a whole"):
        load(tmp_path)


def test_an_index_that_leads_astray_is_refused(tmp_path):
    theirs = tiny("BertModel")
    theirs.save_pretrained(tmp_path, max_shard_size="5KB")
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    first = next(iter(values["weight_map"]))
    kept = values["weight_map"][first]
    for name, error, match in [
        ("../other.safetensors", ValueError, "must name files beside it"),
        ("gone.safetensors", FileNotFoundError, "folder must hold gone.safetensors"),
    ]:
        values["weight_map"][first] = name
        index.write_text(json.dumps(values))
        with pytest.raises(error, match=match):
            load(tmp_path)
    values["weight_map"] = {**values["weight_map"], first: kept, "ghost": kept}
    index.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="no shard holds ghost"):
        load(tmp_path)


def test_a_hub_id_needs_the_hub_library(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match="source must be a folder, got source='org/name'"):
        load("org/name")


def test_a_hub_id_is_read_through_the_hub_library(monkeypatch, tmp_path):
    import huggingface_hub

    theirs = tiny("BertModel")
    stored(theirs, tmp_path)
    asked = []

    def download(source, *, revision, allow_patterns):
        asked.append((source, revision, tuple(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert isinstance(load("org/name", revision="abc"), Encoder)
    patterns = ("config.json", "model*.safetensors", "model.safetensors.index.json")
    assert asked == [("org/name", "abc", patterns)]


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("AlbertModel", {"inner_group_num": 2}, "inner_group_num must be 1"),
        (
            "ModernBertModel",
            {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
            "full",
        ),
        ("ModernBertModel", {"attention_bias": True}, "attention_bias must be mlp_bias, False"),
        ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}, "must be False"),
        ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type must be 'def"),
        ("MarianMTModel", {"decoder_ffn_dim": 12}, "decoder_ffn_dim must be 24"),
        ("T5ForConditionalGeneration", {"feed_forward_proj": "gated-tanh"}, "feed_forward_proj"),
    ],
)
def test_settings_that_cannot_be_expressed_are_refused(name, changes, match, tmp_path):
    stored(tiny(name), tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=match):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "drop", "old"),
    [
        (
            "ModernBertModel",
            ("layer_types", "rope_parameters"),
            {
                "global_attn_every_n_layers": 3,
                "global_rope_theta": 160000.0,
                "local_rope_theta": 10000.0,
            },
        ),
        ("LlamaForCausalLM", ("rope_parameters",), {"rope_theta": 10000.0, "rope_scaling": None}),
        ("T5ForConditionalGeneration", ("scale_decoder_outputs",), {}),
    ],
)
def test_settings_of_earlier_versions_mean_the_same(name, drop, old, tmp_path):
    stored(tiny(name), tmp_path)
    config = load(tmp_path).config
    edit(tmp_path, drop=drop, **old)
    assert load(tmp_path).config == config


def test_model_must_be_one_that_the_family_fills(tmp_path):
    stored(tiny("BertModel"), tmp_path)
    with pytest.raises(
        ValueError, match=r"model must be one of SequenceClassifier, .* got .*Decoder"
    ):
        load(tmp_path, model=Decoder)
    with pytest.raises(ValueError, match="labels must be None beside model=Encoder, got labels=n"):
        load(tmp_path, model=Encoder, labels=("a", "b"))


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "MistralForCausalLM"])
def test_a_loaded_decoder_writes_what_transformers_writes(name, tmp_path):
    theirs = tiny(name)
    ours = load(stored(theirs, tmp_path), dtype=torch.float64)
    ids, keep = batch(lengths=(9, 9))
    theirs.generation_config.eos_token_id = None
    wanted = theirs.double().generate(
        ids, attention_mask=keep.long(), max_new_tokens=12, do_sample=False
    )
    object.__setattr__(ours.config, "eos_id", None)
    assert torch.equal(ours.generate(ids, keep, max_new_tokens=12), wanted[:, 9:])


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "MarianMTModel"])
def test_a_loaded_encoder_decoder_writes_what_its_own_scores_say(name, tmp_path):
    model = load(stored(tiny(name), tmp_path), dtype=torch.float64)
    ids, keep = batch(lengths=(9, 4))
    written = model.generate(ids, keep, max_new_tokens=10)
    begun = torch.cat([torch.full((2, 1), model.bos_id), written], dim=1)[:, :-1]
    scores = model(ids, keep, decoder_input_ids=begun).logits
    ends = (written == model.config.eos_id).long()
    ended = ends.cumsum(1) - ends > 0
    assert torch.equal(scores.argmax(-1)[~ended], written[~ended])


def test_the_public_names_are_there():
    assert set(checkpoints.__all__) <= set(dir(checkpoints))
