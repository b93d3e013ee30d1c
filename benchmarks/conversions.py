"""Models as ONNX Runtime and CTranslate2 want them, made from the shared weights."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from benchmarks import weights
from benchmarks.weights import Weights


class _Words:
    """As much of a tokenizer as CTranslate2's converter reads."""

    unk_token = bos_token = eos_token = "w0"

    def __init__(self, n: int) -> None:
        self.n = n

    def get_vocab(self) -> dict[str, int]:
        return {f"w{i}": i for i in range(self.n)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the converters' own messages out of the table of results."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def onnxruntime_bert(own: Weights, n_heads: int, example: Tensor) -> Callable[..., Tensor]:
    """Export BERT, optimise it, and give a call (ids, mask) -> last hidden state, on the CPU.

    Raises:
        ImportError: where onnx, onnxscript or onnxruntime is not installed.
    """
    import onnxruntime
    import onnxscript  # noqa: F401  (the exporter needs it, and says so less clearly)
    from onnxruntime.transformers import optimizer

    model = weights.bert(own, n_heads)

    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = model

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.bert(input_ids=ids, attention_mask=mask).last_hidden_state

    n_features = model.config.hidden_size
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder, "model.onnx")
        b, n = (torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC)
        torch.onnx.export(
            Bare().eval(), (example, torch.ones_like(example)), str(path), dynamo=True,
            input_names=["ids", "mask"], output_names=["out"], verbose=False,
            dynamic_shapes={"ids": {0: b, 1: n}, "mask": {0: b, 1: n}},
        )  # fmt: skip
        better = optimizer.optimize_model(
            str(path), model_type="bert", num_heads=n_heads, hidden_size=n_features
        )
        better.save_model_to_file(str(path))
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = torch.get_num_threads()
        # Its threads spin while it runs, as they like, but not into the next contestant's turn.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )

    def call(ids: Tensor, mask: Tensor) -> Tensor:
        (out,) = session.run(["out"], {"ids": ids.numpy(), "mask": mask.numpy()})
        return torch.from_numpy(out)

    return call


def _convert(model: Any, kind: str, folder: str) -> str:
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        def load_tokenizer(self, *_: Any, **__: Any) -> _Words:
            return _Words(model.config.vocab_size)

        def load_model(self, *_: Any, **__: Any) -> Any:
            return model

    # transformers 5 dropped this field, which the converter still reads.
    model.config.position_embedding_type = "absolute"
    with _quiet():
        model.config.save_pretrained(f"{folder}/model")
        quantization = "int8" if kind == "int8" else None
        Converter(f"{folder}/model").convert(f"{folder}/ct2", quantization=quantization)
    return f"{folder}/ct2"


def ctranslate2_bert(own: Weights, n_heads: int, kind: str, device: str) -> Callable[..., Any]:
    """Convert BERT and give a call (ids, lengths) -> last hidden state, for :func:`as_tensor`.

    Args:
        own: the weights.
        n_heads: of each layer.
        kind: what it computes in: "float32", "int8", "bfloat16", ...
        device: "cpu" or "cuda".

    Raises:
        ImportError: where ctranslate2 is not installed.
    """
    import ctranslate2

    with tempfile.TemporaryDirectory() as folder:
        path = _convert(weights.bert(own, n_heads), kind, folder)
        encoder = ctranslate2.Encoder(
            path, device=device, compute_type=kind, intra_threads=torch.get_num_threads()
        )

    def view(x: Tensor) -> Any:
        return ctranslate2.StorageView.from_array(x.numpy() if device == "cpu" else x)

    def call(ids: Tensor, lengths: Tensor) -> Any:
        return encoder.forward_batch(view(ids), view(lengths)).last_hidden_state

    return call


def as_tensor(out: Any) -> Tensor:
    """Read a result of CTranslate2; leave a tensor as it is."""
    if isinstance(out, Tensor):
        return out
    if hasattr(out, "__cuda_array_interface__"):
        return torch.as_tensor(out, device="cuda")
    return torch.from_numpy(numpy.array(out))


def ctranslate2_gpt2(
    own: Weights, n_heads: int, kind: str, device: str
) -> Callable[[Tensor, int], Tensor]:
    """Convert GPT-2 and give a call (prompts, n_new) -> new tokens, greedy."""
    import ctranslate2

    with tempfile.TemporaryDirectory() as folder:
        path = _convert(weights.gpt2(own, n_heads), kind, folder)
        generator = ctranslate2.Generator(
            path, device=device, compute_type=kind, intra_threads=torch.get_num_threads()
        )

    def call(prompts: Tensor, n_new: int) -> Tensor:
        words = [[f"w{i}" for i in row] for row in prompts.tolist()]
        found = generator.generate_batch(
            words, max_length=n_new, min_length=n_new, beam_size=1, sampling_topk=1,
            include_prompt_in_result=False, end_token=[],
        )  # fmt: skip
        return torch.tensor([row.sequences_ids[0] for row in found])

    return call
