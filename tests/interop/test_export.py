"""Exported graphs answer as the model does, at shapes that nobody traced, with padding absent."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stabletx import Mask, attention
from stabletx.data import DataError, Tokenizer
from stabletx.interop import export
from stabletx.models import Encoder, SequenceClassifier, TransformerConfig
from stabletx.testing import assert_within, attention_error_bound

pytest.importorskip("onnx", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")
pytest.importorskip("onnxruntime", reason="needs the export extra")

PARITY = 1e-6  # what the project promises
SHAPES = ((1, 1), (2, 64), (7, 33))  # none was traced
TEXTS = ["a good film", "a bad film", "no film at all", "good, bad and ugly"]
VARIANTS = {
    "default": {},
    "learned": {"position": "learned", "qk_norm": False},
    "post, grouped heads": {"norm_position": "post", "n_kv_heads": 2, "pooling": "attention"},
    "peri, rms, swiglu": {
        "norm_position": "peri",
        "norm": "rms",
        "activation": "swiglu",
        "n_kv_heads": 1,
        "pooling": "first",
    },
    "windows": {"window": 3, "global_every": 2, "activation": "geglu"},
    "relative, types": {"relative_buckets": 8, "n_token_types": 2, "norm_position": "post"},
    "shared, factorised": {"n_distinct_layers": 1, "d_embedding": 16, "head_activation": "tanh"},
}


def config(**changes):
    sizes = {"vocab_size": 100, "d_model": 32, "n_layers": 1, "n_heads": 4, "max_seq_len": 64}
    return TransformerConfig(**{**sizes, "labels": ("no", "so-so", "so gut"), **changes})


def model_of(kind=SequenceClassifier, **changes):
    torch.manual_seed(0)
    return kind(config(**changes)).eval()


def batch(b, n, seed=0):
    """Random ids, padding on the right and in holes; the last row of several has no token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(100, (b, n), generator=generator)
    keep = (torch.rand(b, n, generator=generator) < 0.7).long()
    if b > 1:
        keep[-1] = 0
    return ids, keep


def with_garbage(ids, keep):
    return torch.where(keep > 0, ids, (ids + 17) % 100)


def run_onnx(session, ids, keep):
    feeds = {"input_ids": ids.numpy(), "attention_mask": keep.numpy()}
    return torch.from_numpy(session.run(None, feeds)[0])


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A folder like those of ``stabletx train``."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = Tokenizer.train(TEXTS)
    model_of(vocab_size=max(100, tokenizer.vocab_size), position="learned").save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def onnx_file(run_folder):
    said = export.export_run(str(run_folder), "onnx")
    assert "at two shapes that were not traced" in said
    return run_folder / "model.onnx"


@pytest.fixture(scope="module")
def classifier(run_folder):
    return SequenceClassifier.from_pretrained(run_folder)


@pytest.fixture(scope="module")
def program(run_folder):
    said = export.export_run(str(run_folder), "torch")
    assert str(run_folder / "model.pt2") in said
    return torch.export.load(run_folder / "model.pt2").module()


@pytest.mark.parametrize("shape", SHAPES)
def test_onnx_agrees_with_the_model_at_shapes_not_traced(onnx_file, classifier, shape):
    ids, keep = batch(*shape)
    with torch.inference_mode():
        expected = classifier(ids, keep).logits
    actual = run_onnx(export.onnx_session(onnx_file), ids, keep)
    assert (actual - expected).abs().max() <= PARITY


def test_onnx_padding_is_absent_and_empty_rows_are_finite(onnx_file, classifier):
    session = export.onnx_session(onnx_file)
    ids, keep = batch(5, 12)
    found = run_onnx(session, ids, keep)
    assert torch.equal(found, run_onnx(session, with_garbage(ids, keep), keep))
    with torch.inference_mode():
        empty = classifier(ids[-1:], keep[-1:]).logits
    assert found.isfinite().all()
    assert (found[-1:] - empty).abs().max() <= PARITY


def test_onnx_file_says_what_its_classes_are_and_nothing_of_this_machine(onnx_file):
    session = export.onnx_session(onnx_file)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["labels"]) == ["no", "so-so", "so gut"]
    assert json.loads(about["max_seq_len"]) == 64
    assert [x.shape for x in session.get_inputs()] == [["batch", "length"]] * 2
    assert [(x.name, x.shape) for x in session.get_outputs()] == [("logits", ["batch", 3])]
    assert str(Path(__file__).parent.parent.parent).encode() not in onnx_file.read_bytes()


@pytest.mark.parametrize("shape", SHAPES)
def test_program_agrees_with_the_model_at_shapes_not_traced(program, classifier, shape):
    ids, keep = batch(*shape)
    with torch.inference_mode():
        expected = classifier(ids, keep).logits
        actual = program(ids, keep)
        again = program(with_garbage(ids, keep), keep)
    assert (actual - expected).abs().max() <= PARITY
    assert torch.equal(actual, again)


def test_program_runs_without_stabletx(run_folder, program, classifier):
    ids, keep = batch(3, 9)
    with torch.inference_mode():
        expected = program(ids, keep)
    code = (
        "import sys, torch\n"
        f"run = torch.export.load({str(run_folder / 'model.pt2')!r}).module()\n"
        f"print(run(torch.tensor({ids.tolist()}), torch.tensor({keep.tolist()})).tolist())\n"
        "assert not [name for name in sys.modules if name.startswith('stabletx')]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.tensor(json.loads(done.stdout)).allclose(expected)


def test_encoder_gives_hidden_states_in_onnx_runtime(tmp_path):
    model = model_of(Encoder, n_kv_heads=2)
    session = export.onnx_session(export.to_onnx(model, tmp_path / "encoder.onnx"))
    for shape in SHAPES:
        ids, keep = batch(*shape)
        with torch.inference_mode():
            expected = model(ids, keep).last_hidden_state
        actual = run_onnx(session, ids, keep)
        assert (actual - expected).abs().max() <= PARITY * max(1.0, float(expected.abs().max()))
        assert bool((actual[keep == 0] == 0).all())
        assert torch.equal(actual, run_onnx(session, with_garbage(ids, keep), keep))


@pytest.mark.nightly
@pytest.mark.parametrize("kind", [SequenceClassifier, Encoder])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_kind_of_model_goes_out_whole(tmp_path, kind, changes):
    model = model_of(kind, n_layers=2, **changes)
    for path in (tmp_path / "m.onnx", tmp_path / "m.pt2"):
        (export.to_onnx if path.suffix == ".onnx" else export.to_torch)(model, path)
        ids, keep = batch(4, 9)
        with torch.inference_mode():
            largest = float(export.Graph(model)(ids, keep).abs().max())
        assert export.largest_difference(model, path) <= PARITY * max(1.0, largest)


def test_program_keeps_the_dtype_of_a_model_and_leaves_it_as_it_was():
    model = model_of(dropout_p=0.5).double().train()
    program = export.exported_program(model).module()
    assert all(module.training for module in model.modules())
    ids, keep = batch(3, 9)
    with torch.inference_mode():
        actual, expected = program(ids, keep), model.eval()(ids, keep).logits
    assert actual.dtype == torch.float64
    assert (actual - expected).abs().max() <= 1e-12  # what the project promises in float64


def test_windows_and_relative_biases_leave_the_axes_open():
    model = model_of(window=3, relative_buckets=8, n_token_types=2)
    program = export.exported_program(model).module()
    for shape in SHAPES:
        ids, keep = batch(*shape)
        with torch.inference_mode():
            actual, expected = program(ids, keep), model(ids, keep).logits
            again = program(with_garbage(ids, keep), keep)
        assert (actual - expected).abs().max() <= PARITY
        assert torch.equal(actual, again)


def test_exported_attention_is_torchs_own_unless_the_exact_one_is_asked_for():
    class Attend(torch.nn.Module):
        def forward(self, q, k, v, bias, keep):
            mask = Mask.padding(keep)
            auto = attention(q, k, v, mask=mask, bias=bias)
            return auto, attention(q, k, v, mask=mask, bias=bias, method="exact")

    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind()
    keep = torch.ones(2, 5, dtype=torch.bool)
    keep[0, 3:], keep[1] = False, False
    inputs = (q, k, v, torch.randn(1, 4, 5, 5), keep)
    program = torch.export.export(Attend(), inputs)
    names = [node.name for node in program.graph.nodes]
    assert sum(name.startswith("scaled_dot_product") for name in names) == 1
    auto, exact = program.module()(*inputs)
    direct = attention(q, k, v, mask=Mask.padding(keep), bias=inputs[3])
    bound = attention_error_bound(q, k, v, mask=keep[:, None, None], bias=inputs[3])
    for found in (auto, exact):
        assert_within(bound, found, direct)
        assert bool((found[1] == 0).all())


def test_failed_export_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    with pytest.raises(TypeError, match=r"float32.*torch\.bfloat16"):
        export.to_onnx(model_of().bfloat16(), path)
    monkeypatch.setattr(export, "onnx_bytes", lambda model: b"new")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        export.to_onnx(model_of(), path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_other_modules_are_refused():
    with pytest.raises(TypeError, match=r"SequenceClassifier.*Linear"):
        export.exported_program(torch.nn.Linear(2, 2))


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"onnxscript.*stabletx\[export\]"):
        export.onnx_bytes(model_of())


def test_damaged_file_is_named(onnx_file, tmp_path):
    path = tmp_path / "half.onnx"
    path.write_bytes(onnx_file.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"half\.onnx"):
        export.onnx_session(path)


@pytest.mark.parametrize(("format", "name"), [("onnx", "mine.pt2"), ("torch", "mine.onnx")])
def test_a_file_may_have_any_name(run_folder, tmp_path, format, name):
    said = export.export_run(str(run_folder), format, str(tmp_path / name))
    assert "at two shapes that were not traced" in said


def test_a_damaged_program_is_named(run_folder, classifier, program, tmp_path):
    path = tmp_path / "half.pt2"
    path.write_bytes((run_folder / "model.pt2").read_bytes()[:5000])
    with pytest.raises(DataError, match=r"file must be a whole program, got .*half\.pt2"):
        export.largest_difference(classifier, path)


def test_unknown_format_is_refused(run_folder):
    with pytest.raises(ValueError, match=r"format.*'tflite'"):
        export.export_run(str(run_folder), "tflite")


def test_command_refuses_a_folder_without_a_tokenizer(tmp_path, capsys):
    from stabletx.cli import main

    model_of().save_pretrained(tmp_path)
    assert main(["export", str(tmp_path), "--format", "torch"]) == 2
    assert "tokenizer.json" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nowhere"), "--format", "torch"]) == 2
    assert "folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["export", str(tmp_path), "--format", "tflite"])
    assert stop.value.code == 2
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 20)
    assert main(["export", str(tmp_path), "--format", "torch"]) == 2
    assert "model.safetensors" in capsys.readouterr().err
