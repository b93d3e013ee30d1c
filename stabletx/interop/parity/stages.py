"""What each layer of a classifier passes on, in whatever way the classifier runs.

A stage is a tensor of the real tokens in the caller's order, (n_tokens, m): the embeddings, then
the output of each layer. The logits (b, c) are the last stage.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from stabletx.models import SequenceClassifier
from stabletx.models._inputs import read_inputs
from stabletx.models.outputs import ClassifierOutput
from stabletx.packing import Packed, Plan

Call = Callable[[SequenceClassifier, Tensor, Tensor], Tensor]  # model, ids, keep -> logits


def stage_names(model: SequenceClassifier) -> list[str]:
    """Name the stages, in order."""
    layers = [f"layer {i + 1}" for i in range(model.config.n_layers)]
    return ["embeddings", *layers, "logits"]


def as_shipped(model: SequenceClassifier, ids: Tensor, keep: Tensor) -> Tensor:
    """Run a model the way ``stabletx evaluate`` does: without the padding where that saves work."""
    output: ClassifierOutput = model(ids, keep)
    return output.logits


def padded(model: SequenceClassifier, ids: Tensor, keep: Tensor) -> Tensor:
    """Run a model on every slot, padding too."""
    inputs = read_inputs(ids, keep, may_pack=False)
    logits: Tensor = model.head(model.encoder.encode(inputs), keep=inputs.keep)
    return logits


def packed(model: SequenceClassifier, ids: Tensor, keep: Tensor) -> Tensor:
    """Run a model on nothing but the real tokens."""
    output: ClassifierOutput = model(Packed(ids[keep.to(ids.device)], keep.sum(1).cpu()))
    return output.logits


@final
class Staged(nn.Module):
    """Run a classifier and give every stage.

    Args:
        model: gets hooks, so it must be a copy of its own.
        call: how to run it.
    """

    def __init__(self, model: SequenceClassifier, call: Call = as_shipped) -> None:
        super().__init__()
        self.model, self._call = model, call
        self._seen: list[Tensor] = []
        for i, block in enumerate(model.encoder.blocks):
            if i == 0:
                block.register_forward_pre_hook(self._enter, with_kwargs=True)
            block.register_forward_hook(self._leave, with_kwargs=True)

    def _enter(self, block: nn.Module, args: tuple[Tensor], given: dict[str, Any]) -> None:
        if not self._seen:  # a block may serve as several layers
            self._see(args[0], given.get("plan"))

    def _leave(
        self, block: nn.Module, args: tuple[Tensor], given: dict[str, Any], out: Tensor
    ) -> None:
        self._see(out, given.get("plan"))

    def _see(self, x: Tensor, plan: Plan | None) -> None:
        # Cloned: a shortcut may add to its input in place.
        self._seen.append(x.clone() if plan is None else plan.unpack(x))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Give the stages as they lie, (b, n, m) or (n_tokens, m), and the logits."""
        logits = self._call(self.model, input_ids, attention_mask)
        stages = (*self._seen, logits)
        self._seen.clear()  # as at the start, or a compiler would compile again
        return stages


def of_real_tokens(stages: Sequence[Tensor], keep: Tensor) -> list[Tensor]:
    """Bring stages to the CPU in float64, without padding."""
    return [
        (x[keep.to(x.device)] if x.ndim == 3 else x).detach().to("cpu", torch.float64)
        for x in stages
    ]


class ProgramStages(torch.fx.Interpreter):
    """Run an exported program node by node, and keep what its stages are."""

    def __init__(self, program: torch.export.ExportedProgram, model: SequenceClassifier) -> None:
        graph: Any = program.module()
        super().__init__(graph)
        last: dict[str, str] = {}
        for node in graph.graph.nodes:
            for path, _ in (node.meta.get("nn_module_stack") or {}).values():
                last[path] = node.name
        self._wanted = [last[scope] for scope in _scopes(model)]
        self._kept: dict[str, Tensor] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        """Run a node, and keep its value where it ends a stage."""
        value = super().run_node(n)
        if n.name in self._wanted:
            self._kept[n.name] = value.clone()
        return value

    def stages(self, ids: Tensor, keep: Tensor) -> list[Tensor]:
        """Give every stage of a batch; nothing where layers share a block."""
        if not self._wanted:
            return []
        logits = self.run(ids, keep)
        stages = [*(self._kept.pop(name) for name in self._wanted), logits]
        return of_real_tokens(stages, keep.bool())


def onnx_with_stages(data: bytes, model: SequenceClassifier) -> tuple[bytes, list[str]]:
    """Give an ONNX file the stages as further outputs, and say their names.

    The nodes stay as they are, so that the very graph is looked into that is deployed. An empty
    list where the file does not say which layer a node belongs to, or layers share a block.
    """
    import onnx

    proto = onnx.load_from_string(data)
    last: dict[str, str] = {}
    for node in proto.graph.node:
        written = next(
            (p.value for p in node.metadata_props if p.key.endswith("name_scopes")), "[]"
        )
        for scope in ast.literal_eval(written):
            last[scope] = node.output[0]
    wanted = _scopes(model)
    if not wanted or not last.keys() >= set(wanted):
        return data, []
    names = [last[scope] for scope in wanted]
    for name in names:
        proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return bytes(proto.SerializeToString()), names


def _scopes(model: SequenceClassifier) -> list[str]:
    """Name the modules whose last node gives a stage, as exporters write them.

    A block that serves as several layers has one name and many ends: nothing is seen of it.
    """
    n_blocks = len(model.encoder.blocks)
    if n_blocks != model.config.n_layers:
        return []
    return ["model.encoder.stem", *(f"model.encoder.blocks.{i}" for i in range(n_blocks))]
