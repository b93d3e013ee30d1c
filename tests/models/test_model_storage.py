"""Models in folders: the same bits back, and clear words where a file is damaged."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from stabletx.models import (
    Decoder,
    Encoder,
    EncoderDecoder,
    MaskedLanguageModel,
    SequenceClassifier,
    TransformerConfig,
)

CONFIG = TransformerConfig(30, 16, 2, 4, labels=("a", "b"), bos_id=1)
MODELS = [Encoder, Decoder, EncoderDecoder, SequenceClassifier, MaskedLanguageModel]
IDS = torch.arange(8).view(2, 4)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    SequenceClassifier(CONFIG).save_pretrained(tmp_path)
    return tmp_path


def outputs(model):
    options = {"labels": IDS} if isinstance(model, EncoderDecoder) else {}
    return model.eval()(IDS, **options).to_tuple()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_model_comes_back_to_the_bit(tmp_path, kind, dtype):
    made = kind(CONFIG).to(dtype)
    made.save_pretrained(tmp_path / "new" / "folder")
    again = kind.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == CONFIG
    assert not again.training
    assert all(x.requires_grad for x in again.parameters())
    for a, b in zip(outputs(made), outputs(again), strict=True):
        assert torch.equal(a, b)


def test_a_shared_embedding_is_stored_once_and_stays_shared(tmp_path):
    config = TransformerConfig(30, 16, 2, 4, bos_id=1, share_embeddings=True, n_decoder_layers=1)
    made = EncoderDecoder(config)
    assert len(made.stack.blocks) == 1
    made.save_pretrained(tmp_path)
    assert "stack.stem.embedding.tokens.weight" not in load_file(tmp_path / "model.safetensors")
    again = EncoderDecoder.from_pretrained(tmp_path)
    tables = [x.stem.embedding.tokens.weight for x in (again.encoder, again.stack)]
    assert tables[0] is tables[1]
    for a, b in zip(outputs(made), outputs(again), strict=True):
        assert torch.equal(a, b)


def test_layers_that_share_their_weights_are_stored_once(tmp_path):
    made = Encoder(TransformerConfig(30, 16, 6, 4, n_distinct_layers=2)).eval()
    made.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    assert {name.split(".")[1] for name in held if name.startswith("blocks")} == {"0", "1"}
    again = Encoder.from_pretrained(tmp_path)
    x = made.stem(IDS, torch.arange(4))
    whole, _ = made.places(torch.arange(4))
    for i in (0, 0, 0, 1, 1, 1):
        x = made.blocks[i](x, **whole._asdict())
    torch.testing.assert_close(made.norm(x), made(IDS).last_hidden_state)
    assert torch.equal(again(IDS).last_hidden_state, made(IDS).last_hidden_state)


def test_read_weights_lie_in_memory_as_torch_aligns_it(folder):
    # Unaligned views of the file would be slower, and a product could differ in its last bits.
    for x in SequenceClassifier.from_pretrained(folder).parameters():
        assert x.data_ptr() % 64 == 0


def test_folder_says_what_it_holds(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "stabletx"
    assert config["architectures"] == ["SequenceClassifier"]
    assert config["labels"] == ["a", "b"]
    assert sorted(x.name for x in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_reading_a_model_draws_no_random_number(folder):
    before = torch.get_rng_state()
    SequenceClassifier.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("where", ["safetensors.torch.save_file", "os.replace", "os.fsync"])
def test_a_save_that_fails_leaves_the_last_model_whole(folder, monkeypatch, where):
    before = {x.name: x.read_bytes() for x in folder.iterdir()}

    def fail(*args, **options):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        with pytest.raises(OSError, match=r"No space left"):
            SequenceClassifier(CONFIG).save_pretrained(folder)
    assert {x.name: x.read_bytes() for x in folder.iterdir()} == before


def test_a_disk_that_fills_before_the_last_file_leaves_the_last_model_whole(folder, monkeypatch):
    before = {x.name: x.read_bytes() for x in folder.iterdir()}

    def fail(*args, **options):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", fail)  # config.json, which is written last
        with pytest.raises(OSError, match=r"No space left"):
            SequenceClassifier(CONFIG).save_pretrained(folder)
    assert {x.name: x.read_bytes() for x in folder.iterdir()} == before


@pytest.mark.skipif(os.name != "posix", reason="is about the modes of posix")
@pytest.mark.parametrize("umask", [0o022, 0o077], ids=oct)
def test_the_umask_decides_who_may_read_a_saved_model(tmp_path, umask):
    before = os.umask(umask)
    try:
        SequenceClassifier(CONFIG).save_pretrained(tmp_path)
    finally:
        os.umask(before)
    modes = {x.name: oct(x.stat().st_mode & 0o777) for x in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("config.json", "model.safetensors"), oct(0o666 & ~umask))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"folder must hold {name}"):
        SequenceClassifier.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"folder must hold config\.json"):
        SequenceClassifier.from_pretrained(folder / "elsewhere")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", r"config\.json must be a whole and fitting file, got: Expecting"),
        ("[]", r"config\.json .* it holds a list, not an object"),
        ("[" * 100_000, r"config\.json must be a whole and fitting file, got: maximum recursion"),
        ("{}", r"config\.json .* its model_type is None, not 'stabletx'"),
        ('{"model_type": "bert"}', r"config\.json .* its model_type is 'bert'"),
    ],
)
def test_a_damaged_configuration_is_named(folder, text, match):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=match):
        SequenceClassifier.from_pretrained(folder)


def test_bytes_that_are_no_text_are_named(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"config\.json .*can't decode"):
        SequenceClassifier.from_pretrained(folder)


def test_a_configuration_with_a_wrong_value_is_named(folder):
    values = json.loads((folder / "config.json").read_text())
    for change, match in (({"n_heads": 3}, "n_heads=3"), ({"size": 1}, "unknown: size")):
        (folder / "config.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(ValueError, match=rf"config\.json .*{match}"):
            SequenceClassifier.from_pretrained(folder)


def test_another_kind_of_model_is_refused(folder):
    with pytest.raises(ValueError, match=r"describes \['SequenceClassifier'\], not \['Encoder'\]"):
        Encoder.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_damaged_weights_are_named(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors must be a whole and fitting file"):
        SequenceClassifier.from_pretrained(folder)


def test_weights_that_do_not_fit_are_listed(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["extra"] = weights.pop("head.out.bias")
    weights["encoder.norm.bias"] = torch.zeros(3)
    weights["encoder.norm.weight"] = torch.zeros(16, dtype=torch.int64)
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"model\.safetensors") as caught:
        SequenceClassifier.from_pretrained(folder)
    for fault in (
        "missing head.out.bias",
        "unexpected extra",
        "encoder.norm.bias of shape (3,) instead of (16,)",
        "encoder.norm.weight of dtype torch.int64",
    ):
        assert fault in str(caught.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pkl"])
def test_a_pickle_is_refused_unread(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ValueError, match=rf"{name}. A pickle can run any code when read"):
        SequenceClassifier.from_pretrained(folder)
