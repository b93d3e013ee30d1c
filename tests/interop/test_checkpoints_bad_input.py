"""Whatever a folder holds, loading ends in a model or in an error that says what is wrong."""

import json

import pytest
import torch

from stabletx.interop.checkpoints import load, read
from stabletx.models import Encoder, TransformerConfig
from tests.interop.checkpoint_judge import NAMES, edit, rewrite, stored, tiny

pytest.importorskip("transformers")
QUERY, KEY = (f"encoder.layer.0.attention.self.{x}.weight" for x in ("query", "key"))
BODIES = [name for name in NAMES if not name.endswith(("SequenceClassification", "MaskedLM"))]


@pytest.fixture(autouse=True)
def quiet():
    from transformers.utils import logging

    logging.disable_progress_bar()


def complaint(folder):
    """Load, and give the error that there may be; another kind of error goes through."""
    try:
        load(folder)
    except (ValueError, TypeError) as error:
        return str(error)
    return ""


@pytest.mark.nightly
@pytest.mark.parametrize("name", BODIES)
def test_no_setting_makes_loading_break(name, tmp_path):
    stored(tiny(name), tmp_path)
    kept = (tmp_path / "config.json").read_text()
    for key in json.loads(kept):
        for value in (None, "x", -1, 0, 2.5, [1], {"a": 1}, True, 10**9, float("inf")):
            edit(tmp_path, **{key: value})
            said = complaint(tmp_path).removeprefix(f"{tmp_path / 'config.json'} must")
            assert not said or " must " in said or "overflowed" in said
            (tmp_path / "config.json").write_text(kept)


@pytest.mark.nightly
@pytest.mark.parametrize("name", BODIES)
def test_no_shape_makes_loading_break(name, tmp_path):
    theirs = tiny(name)
    stored(theirs, tmp_path)
    held = theirs.state_dict()
    for key in [key for key in held if ".1." not in key and ".2." not in key]:
        x = held[key]
        for other in (x.new_tensor(1.0), x[None], x[:0], torch.cat([x, x], -1)):
            rewrite(tmp_path, {**held, key: other})
            said = complaint(tmp_path)
            assert not said or "config.json" in said


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("BertModel", {"num_hidden_layers": 10**9}, "at most the number of tensors"),
        ("AlbertModel", {"num_hidden_groups": 10**9}, "at most the number of tensors"),
        ("BertModel", {"model_type": ["bert"]}, r"model_type must be one of .*got .*\['bert'\]"),
        ("BertModel", {"architectures": 3}, "architectures must be one of .*, got architectures=3"),
        ("BertModel", {"hidden_act": [1]}, r"hidden_act must be one of gelu, .*=\[1\]"),
        ("RobertaModel", {"max_position_embeddings": "9"}, "embeddings must be an int"),
        ("LlamaForCausalLM", {"num_attention_heads": 0}, "attention_heads must be an int of"),
        ("LlamaForCausalLM", {"rope_parameters": [1]}, r"rope_parameters must be an object, got"),
        ("T5ForConditionalGeneration", {"feed_forward_proj": 1}, "be the name of an activation"),
        ("BertForSequenceClassification", {"id2label": 5}, "id2label must be an object, got"),
        (
            "BertForSequenceClassification",
            {"id2label": {"0": "no", "7": "yes"}},
            "id2label must number its classes from 0 to 1, got",
        ),
    ],
)
def test_a_setting_that_is_no_setting_is_named(name, changes, match, tmp_path):
    stored(tiny(name), tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=match):
        load(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"labels": "ab"}, TypeError, "labels must be a list or tuple of different texts, got"),
        ({"labels": {"a", "b"}}, TypeError, "labels must be a list or tuple of different texts"),
        ({"labels": (0, 1)}, TypeError, r"labels must be a list .*, got labels=\(0, 1\)"),
        ({"labels": 3}, TypeError, "labels must be a list .*, got labels=3"),
        ({"labels": ("a", "a")}, ValueError, r"labels must be a list .*, got labels=\('a', 'a'\)"),
        ({"labels": ()}, ValueError, r"labels must be a list .*, got labels=\(\)"),
        ({"ignore": "abc"}, TypeError, "ignore must be a list of names, got ignore='abc'"),
        ({"model": "bert"}, ValueError, "model must be one of .*, got model=an instance"),
        (
            {"model": Encoder(TransformerConfig(5, 8, 1, 1))},
            ValueError,
            "be one of SequenceClassifier, .* for bert, got model=an instance",
        ),
    ],
)
def test_an_argument_of_the_wrong_kind_is_named(arguments, error, match, tmp_path):
    stored(tiny("BertModel"), tmp_path)
    with pytest.raises(error, match=match):
        load(tmp_path, **arguments)


def test_parts_of_different_width_are_named(tmp_path):
    theirs = tiny("BertModel")
    stored(theirs, tmp_path)
    rewrite(tmp_path, {**theirs.state_dict(), KEY: torch.ones(16, 8)})
    with pytest.raises(ValueError, match=rf"{KEY} must have rows of shape \(16,\), as those it"):
        load(tmp_path)


def test_an_old_name_beside_the_new_one_is_unknown(tmp_path):
    theirs = tiny("BertModel")
    stored(theirs, tmp_path)
    rewrite(tmp_path, {**theirs.state_dict(), "embeddings.LayerNorm.gamma": torch.zeros(16)})
    with pytest.raises(ValueError, match=r"no unknown tensors, got embeddings.LayerNorm.gamma"):
        load(tmp_path)


def test_a_tensor_is_taken_from_the_shard_that_the_index_names(tmp_path):
    from safetensors.torch import load_file, save_file

    theirs = tiny("BertModel")
    theirs.save_pretrained(tmp_path, max_shard_size="5KB")
    last = max(tmp_path.glob("*.safetensors"))
    held = {name: x.clone() for name, x in load_file(last).items()}
    assert QUERY not in held
    save_file({**held, QUERY: torch.zeros(16, 16)}, last)
    first = load(tmp_path).state_dict()["blocks.0.attention.qkv.weight"][:16]
    assert torch.equal(first, theirs.state_dict()[QUERY])


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", r"must be a whole and fitting file, got: EOFError"),
        (b"\x80", r"must be a whole and fitting file, got: index out of range"),
        (b"hello world", r"must be a whole and fitting file, got: \d+"),
        (b"cos\nabort\n(tR.", r"pickle of tensors alone, got .*GLOBAL os.abort.* Nothing in it"),
    ],
)
def test_bytes_that_are_no_weights_are_named(data, match, tmp_path):
    tiny("BertModel").config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(ValueError, match=match) as caught:
        load(tmp_path, model=Encoder)
    assert "weights_only" not in str(caught.value)  # nobody is told to run it


@pytest.mark.parametrize("cut", [1, 10, 50, 200, 1000, -1])
@pytest.mark.parametrize("is_old", [True, False])
def test_a_pickle_that_ends_early_is_named(cut, is_old, tmp_path):
    theirs = tiny("BertModel")
    theirs.config.save_pretrained(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    torch.save(theirs.state_dict(), path, _use_new_zipfile_serialization=not is_old)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"pytorch_model.bin must be a whole"):
        load(tmp_path, model=Encoder)


@pytest.mark.parametrize(
    "change",
    [
        lambda held: {name: x.to("meta") for name, x in held.items()},
        lambda held: {**held, QUERY: held[QUERY].to_sparse()},
        lambda held: {**held, 3: torch.ones(1)},
        lambda held: {"state_dict": held},
    ],
    ids=["no values", "sparse", "a number for a name", "nested"],
)
def test_a_pickle_of_other_things_than_dense_tensors_is_refused(change, tmp_path):
    theirs = tiny("BertModel")
    theirs.config.save_pretrained(tmp_path)
    torch.save(change(dict(theirs.state_dict())), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"a dict that holds more than dense tensors by name"):
        load(tmp_path, model=Encoder)


def test_nested_settings_without_end_are_a_damaged_file(tmp_path):
    stored(tiny("BertModel"), tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config.json must be a whole and fitting file"):
        read(tmp_path)


def test_a_path_that_is_not_there_is_no_hub_id():
    for source in ("../nowhere", "./nowhere", "-x/y"):
        with pytest.raises(FileNotFoundError, match="source must be a folder or a hub id"):
            load(source)
