"""Models as ONNX Runtime and CTranslate2 want them, made from the shared weights."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from benchmarks import weights
from benchmarks.interleave import Call, in_turns
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


class _PlainBert(torch.nn.Module):
    """BERT written out in the products and sums that ONNX Runtime's optimiser knows."""

    def __init__(self, bert: Any, n_heads: int) -> None:
        super().__init__()
        self.bert, self.n_heads = bert, n_heads

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        own = self.bert.embeddings
        x = own.word_embeddings(ids) + own.token_type_embeddings(torch.zeros_like(ids))
        x = own.LayerNorm(x + own.position_embeddings(own.position_ids[:, : ids.shape[1]]))
        lowest = torch.finfo(torch.float32).min
        added = (1.0 - mask[:, None, None, :].to(torch.float32)) * lowest
        for layer in self.bert.encoder.layer:
            x = layer.attention.output.LayerNorm(
                layer.attention.output.dense(self._attend(layer.attention.self, x, added)) + x
            )
            wide = torch.nn.functional.gelu(layer.intermediate.dense(x))
            x = layer.output.LayerNorm(layer.output.dense(wide) + x)
        return x

    def _attend(self, own: Any, x: Tensor, added: Tensor) -> Tensor:
        head_dim = x.shape[-1] // self.n_heads

        def split(t: Tensor) -> Tensor:
            return t.view(t.shape[0], t.shape[1], self.n_heads, head_dim).permute(0, 2, 1, 3)

        q, k, v = (split(part(x)) for part in (own.query, own.key, own.value))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(head_dim) + added
        out = torch.matmul(torch.softmax(scores, -1), v).permute(0, 2, 1, 3).contiguous()
        return out.view(out.shape[0], out.shape[1], self.n_heads * head_dim)


def onnxruntime_bert(own: Weights, n_heads: int, ids: Tensor, mask: Tensor) -> Call:
    """Export BERT and give a call that encodes the batch on the CPU.

    Two graphs are tried on the batch and the faster one is kept: with the fused operators of the
    BERT optimiser, and without, with every optimisation of the session alone.

    Raises:
        ImportError: where onnx or onnxruntime is not installed.
    """
    import onnx  # noqa: F401  (the exporter needs it, and says so less clearly)
    import onnxruntime
    from onnxruntime.transformers import optimizer

    model = weights.bert(own, n_heads, attention="eager")
    axes = {0: "b", 1: "n"}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads spin while it runs, as they like, but not into the next contestant's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder, _quiet():
        plain, fused = (str(Path(folder, name)) for name in ("plain.onnx", "fused.onnx"))
        torch.onnx.export(
            _PlainBert(model, n_heads).eval(), (ids, mask), plain, dynamo=False, opset_version=17,
            input_names=["ids", "mask"], output_names=["out"],
            dynamic_axes={"ids": axes, "mask": axes},
        )  # fmt: skip
        optimizer.optimize_model(
            plain, model_type="bert", num_heads=n_heads, hidden_size=model.config.hidden_size
        ).save_model_to_file(fused)
        sessions = [
            onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            for path in (plain, fused)
        ]

    def make(session: Any) -> Call:
        given = {"ids": ids.numpy(), "mask": mask.numpy()}
        for own_input in session.get_inputs():  # the fused operators take 32-bit integers
            if "int32" in own_input.type:
                given[own_input.name] = given[own_input.name].astype("int32")
        return lambda: torch.from_numpy(session.run(["out"], given)[0])

    calls = {str(i): make(session) for i, session in enumerate(sessions)}
    timings = in_turns(calls, rounds=3, seconds_a_turn=0.0)
    return calls[min(timings, key=lambda name: timings[name].ms)]


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
