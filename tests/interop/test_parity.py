"""Parity tells what rounding makes from what a mistake makes, and where that began."""

import io
import json
from functools import partial

import pytest
import torch

from stabletx.cli import main
from stabletx.data import Tokenizer
from stabletx.interop import export
from stabletx.interop.parity import NotHere, Subject, compare, environments
from stabletx.interop.parity.compare import Comparison
from stabletx.interop.parity.show import cells, print_table
from stabletx.interop.parity.stages import as_shipped
from stabletx.models import SequenceClassifier, TransformerConfig

TEXTS = ["a good film", "a bad film", "no film at all", "good, bad and ugly", "film", "a a a a"]
EAGER = ("float32", "float64", "bfloat16", "single", "padded", "packed")


def model_of(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 40}
    return SequenceClassifier(TransformerConfig(**{**sizes, "labels": ("no", "yes"), **changes}))


def rows(n=20):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (n,), generator=generator).tolist()
    return [torch.randint(100, (own,), generator=generator).tolist() for own in lengths]


def found_in(monkeypatch, call, **settings) -> Comparison:
    """Compare with an environment that runs the model in a way of its own."""
    known = dict(environments._KNOWN)
    known["mine"] = ("", torch.float32, partial(environments._eager, call=call))
    monkeypatch.setattr(environments, "_KNOWN", known)
    return compare(Subject(model_of(**settings)), rows(), environments=["mine"])


@pytest.fixture(scope="module")
def eager():
    return compare(Subject(model_of().eval()), rows(), environments=EAGER, batch=8)


def test_right_environments_differ_by_rounding_alone(eager):
    for finding in eager.findings:
        assert finding.diverges_at == "", finding
        assert max(finding.ratios) <= 1
        assert finding.ignores_padding
        assert finding.empty_is_finite
        assert finding.mean_change <= finding.largest_change
    by_name = {finding.name: finding for finding in eager.findings}
    assert by_name["float32"].largest_change == 0
    assert max(by_name["float64"].distances) == 0
    assert by_name["bfloat16"].largest_change > by_name["float64"].largest_change > 0


def test_stages_go_from_the_embeddings_to_the_logits(eager):
    assert eager.stages == ["embeddings", "layer 1", "layer 2", "layer 3", "logits"]
    assert all(len(finding.distances) == 5 for finding in eager.findings)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_a_weight_off_by_a_thousandth_is_found_in_its_layer(monkeypatch, layer):
    def wrong(model, ids, keep):
        weight = model.encoder.blocks[layer - 1].attention.out.weight
        original = weight.data
        weight.data = original * (1 + 1e-3)
        try:
            return as_shipped(model, ids, keep)
        finally:
            weight.data = original

    (finding,) = found_in(monkeypatch, wrong).findings
    assert finding.diverges_at == f"layer {layer}"
    assert finding.ratios[layer] > 1
    assert f"layer {layer}" in cells(finding)[4]


def test_layers_that_share_a_block_are_told_apart(monkeypatch):
    found = found_in(monkeypatch, as_shipped, n_distinct_layers=1)
    assert len(found.findings[0].distances) == len(found.stages) == 5


def test_padding_that_counts_is_found(monkeypatch):
    found = found_in(monkeypatch, lambda model, ids, keep: model(ids).logits)
    assert not found.findings[0].ignores_padding
    assert not found.findings[0].passes(threshold=1.0)


def test_nan_never_passes(monkeypatch):
    found = found_in(monkeypatch, lambda model, ids, keep: model(ids, keep).logits * torch.nan)
    (finding,) = found.findings
    assert not finding.passes(threshold=1.0)
    assert finding.diverges_at == "logits"
    assert not finding.empty_is_finite
    assert "NaN" not in json.dumps(found.to_dict())


def test_changed_labels_are_counted(monkeypatch):
    found = found_in(monkeypatch, lambda model, ids, keep: -model(ids, keep).logits)
    assert found.findings[0].changed_labels == 1.0


def test_the_model_itself_is_left_alone():
    model = model_of().train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    compare(Subject(model), rows(4), environments=["bfloat16"])
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_dropout_is_off(monkeypatch):
    found = found_in(monkeypatch, as_shipped, dropout_p=0.5)
    assert found.findings[0].largest_change == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a CUDA device")
def test_a_missing_device_is_left_out_unless_it_was_named(monkeypatch):
    known = {name: environments._KNOWN[name] for name in ("padded", "cuda")}
    with pytest.raises(NotHere, match="cuda"):
        compare(Subject(model_of()), rows(4), environments=["cuda"])
    known = {**known, **{name: environments._KNOWN[name] for name in ("float32", "float64")}}
    monkeypatch.setattr(environments, "_KNOWN", known)
    found = compare(Subject(model_of()), rows(4))
    assert list(found.left_out) == ["cuda"]
    assert len(found.findings) == 3


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"environments.*'float8'"):
        compare(Subject(model_of()), rows(4), environments=["float8"])
    with pytest.raises(ValueError, match=r"rows.*none"):
        compare(Subject(model_of()), [])


def test_table_says_what_happened(eager):
    stream = io.StringIO()
    print_table(eager, stream)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("environment")
    assert [line.split()[0] for line in lines[1:]] == list(EAGER)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A folder like those of ``stabletx train``, and texts beside it."""
    folder = tmp_path_factory.mktemp("parity")
    tokenizer = Tokenizer.train(TEXTS)
    model_of(vocab_size=tokenizer.vocab_size).save_pretrained(folder / "run")
    tokenizer.save(folder / "run")
    (folder / "lines.txt").write_text("\n".join(TEXTS))
    (folder / "table.csv").write_text("review\n" + "\n".join(f'"{text}"' for text in TEXTS))
    return folder


def parity(folder, *options):
    return main(["parity", str(folder / "run"), str(folder / "lines.txt"), *options])


def test_command_leaves_figures_and_a_picture(run_folder, capsys):
    pytest.importorskip("matplotlib", reason="needs the train extra")
    assert parity(run_folder, "--only", "float64,packed", "--rows", "5") == 0
    out = capsys.readouterr().out
    assert "float64" in out
    assert "parity.png" in out
    figures = json.loads((run_folder / "run" / "parity.json").read_text())
    assert figures["n_rows"] == 5
    assert [own["name"] for own in figures["findings"]] == ["float64", "packed"]
    assert (run_folder / "run" / "parity.png").read_bytes().startswith(b"\x89PNG")


def test_command_fails_beyond_the_threshold(run_folder, capsys, tmp_path):
    options = ("--only", "bfloat16,packed", "--out", str(tmp_path / "here"), "--json")
    assert parity(run_folder, *options, "--threshold", "0.5") == 0
    assert json.loads(capsys.readouterr().out)["n_rows"] == len(TEXTS)
    assert parity(run_folder, *options, "--threshold", "1e-9") == 1
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].endswith("touched by padding: bfloat16")
    assert (tmp_path / "here" / "parity.json").exists()


def test_command_reads_a_column(run_folder, capsys):
    table = str(run_folder / "table.csv")
    run = str(run_folder / "run")
    assert main(["parity", run, table, "--text", "review", "--only", "packed"]) == 0
    assert main(["parity", run, table, "--only", "packed"]) == 2
    assert "'text'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--only", "float8"), "only must name some of"),
        (("--rows", "0"), "rows must be at least 1"),
        (("--batch", "0"), "batch must be at least 1"),
        (("--threshold", "-1"), "threshold must be at least 0, got threshold=-1.0"),
        (("--threshold", "nan"), "threshold must be at least 0, got threshold=nan"),
    ],
)
def test_command_refuses_wrong_options(run_folder, capsys, options, said):
    assert parity(run_folder, *options) == 2
    assert said in capsys.readouterr().err


def test_command_finds_no_folder_for_its_files_before_it_compares(run_folder, capsys):
    assert parity(run_folder, "--only", "packed", "--out", str(run_folder / "lines.txt")) != 0
    said = capsys.readouterr().err
    assert "lines.txt" in said
    assert "running" not in said


def test_command_refuses_what_it_cannot_read(run_folder, capsys, tmp_path):
    missing = str(tmp_path / "nothing.txt")
    assert main(["parity", str(run_folder / "run"), missing, "--only", "packed"]) == 2
    assert "nothing.txt" in capsys.readouterr().err
    lines = str(run_folder / "lines.txt")
    assert main(["parity", missing, lines]) == 2
    (tmp_path / "empty.txt").write_text("")
    assert main(["parity", str(run_folder / "run"), str(tmp_path / "empty.txt")]) == 2
    assert "at least one text" in capsys.readouterr().err


def test_a_damaged_deployed_file_is_named(run_folder, capsys):
    pytest.importorskip("onnxruntime", reason="needs the export extra")
    path = run_folder / "run" / "model.onnx"
    path.write_bytes(b"not a model")
    try:
        assert parity(run_folder, "--only", "onnx") == 2
    finally:
        path.unlink()
    assert "whole ONNX file" in capsys.readouterr().err


@pytest.mark.nightly
def test_every_environment_of_this_machine_differs_by_rounding_alone():
    pytest.importorskip("onnxscript", reason="needs the export extra")
    found = compare(Subject(model_of()), rows())
    assert {own.name for own in found.findings} >= {*EAGER, "compiled", "exported", "onnx"}
    for finding in found.findings:
        assert len(finding.ratios) == 5
        assert finding.diverges_at == "", finding
        assert finding.passes(threshold=1e-2)


@pytest.mark.nightly
def test_a_stale_deployed_file_is_found_in_its_layer(tmp_path):
    pytest.importorskip("onnxscript", reason="needs the export extra")
    stale = model_of()
    with torch.no_grad():
        stale.encoder.blocks[1].feed_forward.out.weight.mul_(1 + 1e-3)
    path = export.to_onnx(stale, tmp_path / "model.onnx")
    found = compare(Subject(model_of(), path), rows(), environments=["exported", "onnx"])
    assert [own.diverges_at for own in found.findings] == ["", "layer 2"]
