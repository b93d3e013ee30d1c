"""Models for other runtimes: ``torch.export`` programs and ONNX files.

Batch and length stay open. What leaves is a graph that takes ``input_ids`` and ``attention_mask``
and gives ``logits`` (or ``last_hidden_state``); the contract of padding and of empty rows leaves
with it.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

import stabletx
from stabletx._checks import check_one_of, must
from stabletx.data import DataError
from stabletx.models import Encoder, SequenceClassifier
from stabletx.training.checkpoint import write_atomically
from stabletx.training.evaluate import eval_mode
from stabletx.training.runs import load_model

if TYPE_CHECKING:
    from torch.export import ExportedProgram

INPUTS = ("input_ids", "attention_mask")
FORMATS = {"onnx": "model.onnx", "torch": "model.pt2"}  # and the file that each writes
_MOST_BYTES = 2**31  # of one ONNX file: it is a protocol buffer
# Any batch will do, if no axis has size 1, for which a tracer makes special cases. It must hold a
# row with padding and one without a token.
_TRACED = ((1, 1, 1, 1, 1), (1, 1, 1, 0, 0), (0, 0, 0, 0, 0))

Model = Encoder | SequenceClassifier


@final
class Graph(nn.Module):
    """Give a model the signature of a graph: tensors in, one tensor out."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.output = "logits" if isinstance(model, SequenceClassifier) else "last_hidden_state"

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Run the model on (b, n) ids and an integer mask, 1 = a real token."""
        output = self.model(input_ids, attention_mask)
        tensor: Tensor = output[self.output]
        return tensor


def to_torch(model: Model, path: str | Path) -> Path:
    """Write a model as a ``torch.export`` program, which runs without stabletx.

    Args:
        model: an :class:`Encoder` or a :class:`SequenceClassifier` of any dtype.
        path: of the file, such as ``model.pt2``; written beside, then renamed over an old one.

    Returns:
        The path. ``torch.export.load(path).module()(input_ids, attention_mask)`` gives the logits
        (b, c), or the hidden states (b, n, m); both inputs are (b, n) int64. Load no such file
        that a stranger wrote: its format may hold pickles. ``model.json`` in the archive names
        the labels.

    Raises:
        TypeError: for another kind of model.
        OSError: if the file cannot be written.

    Numerics: as the model, with attention by torch's own function in float32 at least. An empty
        row gives the same finite logits; ids at padding change no bit.
    """
    buffer = io.BytesIO()
    about = json.dumps(describe(model), ensure_ascii=False)
    torch.export.save(exported_program(model), buffer, extra_files={"model.json": about})
    return _written(Path(path), buffer.getvalue())


def to_onnx(model: Model, path: str | Path) -> Path:
    """Write a model as an ONNX file.

    Args:
        model: an :class:`Encoder` or a :class:`SequenceClassifier` in float32.
        path: of the file, such as ``model.onnx``; written beside, then renamed over an old one.

    Returns:
        The path. The file's inputs are ``input_ids`` and ``attention_mask``, (batch, length) int64;
        its output is ``logits`` or ``last_hidden_state``. Its metadata names the labels.

    Raises:
        ImportError: if onnx or onnxscript is not installed.
        TypeError: for another kind of model or another dtype, which runtimes lack kernels for.
        DataError: if the weights exceed 2 GiB, the most that one file holds.
        OSError: if the file cannot be written.

    Numerics: as :func:`to_torch`.
    """
    return _written(Path(path), onnx_bytes(model))


def exported_program(model: Model) -> ExportedProgram:
    """Trace a model with open batch and length.

    Raises:
        TypeError: for another kind of model.
    """
    _check_model(model)
    keep = torch.tensor(_TRACED, device=_device(model))
    with eval_mode(model), torch.no_grad(), _quiet():
        graph = Graph(model).eval()
        inputs = (torch.zeros_like(keep), keep)
        program = torch.export.export(graph, inputs, dynamic_shapes=_open_axes(model))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # the paths of this machine are nobody's concern
    return program


def onnx_bytes(model: Model) -> bytes:
    """Give what :func:`to_onnx` writes.

    Raises:
        As :func:`to_onnx`.
    """
    _check_model(model)
    for package in ("onnx", "onnxscript"):
        extra(package)
    dtypes = {str(p.dtype) for p in model.parameters()}
    if dtypes != {"torch.float32"}:
        instead = "Export model.float(), and let the runtime lower the precision."
        raise TypeError(must("model", "be in float32", ", ".join(sorted(dtypes)), instead))
    n_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    if n_bytes >= _MOST_BYTES:
        instead = "Use to_torch."
        raise DataError(must("model", "have less than 2 GiB of weights", n_bytes, instead))
    program = exported_program(model)
    with _quiet():
        made = torch.onnx.export(
            program, dynamo=True, dynamic_shapes=_open_axes(model), input_names=INPUTS,
            output_names=[Graph(model).output], verbose=False,
        )  # fmt: skip
    assert made is not None
    proto = made.model_proto
    for name, value in describe(model).items():
        proto.metadata_props.add(key=name, value=json.dumps(value, ensure_ascii=False))
    return bytes(proto.SerializeToString())


def onnx_session(file: bytes | Path) -> Any:
    """Open an ONNX file, or its bytes, in ONNX Runtime on the CPU, with torch's thread count.

    Raises:
        ImportError: if onnxruntime is not installed.
        DataError: if the file is damaged.
    """
    runtime = extra("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    source = file if isinstance(file, bytes) else str(file)
    try:
        return runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's own classes, which share no public base
        what = "the bytes" if isinstance(file, bytes) else file
        got = f"{what} ({' '.join(str(error).split())})"
        raise DataError(must("file", "be a whole ONNX file", got, "Export it again.")) from error


def export_run(folder: str, format: str, out: str | None = None) -> str:
    """Export a trained model, try the file, and say what came of it: ``stabletx export``.

    Args:
        folder: of the run.
        format: "onnx" or "torch".
        out: the file; None writes ``model.onnx`` or ``model.pt2`` into the folder.

    Raises:
        DataError: if the folder cannot be used, or its model not be exported.
        ImportError: if a package of the ``export`` extra is missing.
        OSError: if the file cannot be written.
    """
    check_one_of("format", format, tuple(FORMATS))
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            extra(package)
    model, _ = load_model(folder)
    model = model.float()
    path = Path(folder) / FORMATS[format] if out is None else Path(out)
    (to_onnx if format == "onnx" else to_torch)(model, path)
    difference = largest_difference(model, path)
    return (
        f"{path}: {path.stat().st_size / 1e6:.1f} MB\n"
        f"within {difference:.1e} of the model's logits at two shapes that were not traced"
    )


def largest_difference(model: Model, path: str | Path) -> float:
    """Run an exported file at two shapes that were not traced, and hold it against its model.

    Args:
        model: in float32, on the CPU.
        path: an ONNX file, or a program that :func:`to_torch` wrote; of a stranger's program, see
            there.

    Returns:
        The largest difference of an output.

    Raises:
        ImportError: if the file is an ONNX file and onnxruntime is not installed.
        DataError: if the file is damaged.
    """
    graph = Graph(model)
    run = _runner(Path(path))
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for b, n in ((1, min(7, model.config.max_seq_len)), (4, min(33, model.config.max_seq_len))):
        ids = torch.randint(model.config.vocab_size, (b, n), generator=generator)
        keep = (torch.arange(n) < torch.randint(n + 1, (b, 1), generator=generator)).long()
        with eval_mode(model), torch.inference_mode():
            difference = (run(ids, keep) - graph(ids, keep)).abs().max()
        largest = max(largest, float(difference.nan_to_num(nan=torch.inf)))
    return largest


def _runner(path: Path) -> Callable[[Tensor, Tensor], Tensor]:
    with path.open("rb") as file:
        is_archive = file.read(2) == b"PK"  # whatever its name is
    if is_archive:
        try:
            program: Callable[[Tensor, Tensor], Tensor] = torch.export.load(path).module()
        except Exception as error:  # of the archive, of what is in it, of the graph
            got = f"{path} ({' '.join(str(error).split())})"
            raise DataError(must("file", "be a whole program", got, "Export it again.")) from error
        return program
    session = onnx_session(path)

    def run(ids: Tensor, keep: Tensor) -> Tensor:
        feeds = dict(zip(INPUTS, (ids.numpy(), keep.numpy()), strict=True))
        return torch.from_numpy(session.run(None, feeds)[0])

    return run


def describe(model: Model) -> Mapping[str, Any]:
    """Say what a user of the file must know: the classes, the longest input, the padding."""
    config = model.config
    return {
        "labels": list(config.labels),
        "max_seq_len": config.max_seq_len,
        "pad_id": config.pad_id,
        "stabletx_version": stabletx.__version__,
    }


def extra(package: str) -> Any:
    """Import a package of the ``export`` extra, or say how to get it.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        instead = 'Install it with: pip install "stabletx[export]".'
        got = f"no such package ({error})"
        raise ImportError(must(package, "be installed", got, instead)) from error


def _check_model(model: object) -> None:
    if not isinstance(model, Encoder | SequenceClassifier):
        rule = "be an Encoder or a SequenceClassifier"
        raise TypeError(must("model", rule, type(model).__name__))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _open_axes(model: Model) -> tuple[dict[int, Any], dict[int, Any]]:
    """Name the axes of both inputs that stay open; learned positions end somewhere."""
    longest = model.config.max_seq_len if model.config.position == "learned" else None
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=longest)}
    return axes, axes


def _written(path: Path, data: bytes) -> Path:
    write_atomically(path, data)
    return path


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' notes on their own insides to themselves."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
