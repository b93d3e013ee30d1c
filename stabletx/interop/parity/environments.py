"""The ways in which a classifier may be run, each with the same two questions to answer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stabletx._checks import must
from stabletx.data import DataError
from stabletx.interop import export
from stabletx.interop.parity.stages import (
    Call,
    ProgramStages,
    Staged,
    as_shipped,
    of_real_tokens,
    onnx_with_stages,
    packed,
    padded,
)
from stabletx.models import SequenceClassifier

BASE, EXACT = "float32", "float64"


class NotHere(DataError):
    """An environment that this machine lacks what it needs for."""


@dataclass(frozen=True, eq=False)
class Environment:
    """One way to run a classifier.

    Attributes:
        name: as on the command line.
        about: what is different from "float32".
        dtype: what it rounds to.
        logits: from (b, n) ids and (b, n) bool, True = a real token, to (b, c) on the CPU.
        stages: from the same to every stage in float64; an empty list where it cannot be seen.
    """

    name: str
    about: str
    dtype: torch.dtype
    logits: Callable[[Tensor, Tensor], Tensor]
    stages: Callable[[Tensor, Tensor], list[Tensor]]


@dataclass(frozen=True)
class Subject:
    """What is run: the model, and the ONNX file that is deployed, where there is one."""

    model: SequenceClassifier
    onnx: Path | None = None

    def copy(self, dtype: torch.dtype, device: str = "cpu") -> SequenceClassifier:
        """Give a copy of the model, in eval mode."""
        return copy.deepcopy(self.model).to(device, dtype).eval()


Builder = Callable[[Subject], tuple[Callable[..., Tensor], Callable[..., list[Tensor]]]]


def build(name: str, subject: Subject) -> Environment:
    """Build an environment; the subject's model is copied, never changed.

    Raises:
        NotHere: if the machine has no CUDA device.
        ImportError: if "onnx" lacks a package.
        DataError: if the deployed ONNX file is damaged.
    """
    about, dtype, builder = _KNOWN[name]
    logits, stages = builder(subject)
    return Environment(name, about, dtype, logits, stages)


def names(*, defaults: bool = False) -> list[str]:
    """List the environments; those that ``defaults`` leaves out are slow to prepare."""
    return [name for name in _KNOWN if not (defaults and name == "inductor")]


def _eager(
    subject: Subject, call: Call, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Any:
    if device == "cuda" and not torch.cuda.is_available():
        raise NotHere(must("environments", "have their device", "cuda without a CUDA device"))
    model = subject.copy(dtype, device)

    def logits(ids: Tensor, keep: Tensor) -> Tensor:
        # The mask stays on the CPU, as in ``stabletx evaluate``: there it can be read.
        return call(model, ids.to(device), keep).cpu()

    def stages(ids: Tensor, keep: Tensor) -> list[Tensor]:
        return of_real_tokens(Staged(copy.deepcopy(model), call)(ids.to(device), keep), keep)

    return logits, stages


def _one_by_one(subject: Subject) -> Any:
    logits, stages = _eager(subject, as_shipped)

    def each(run: Callable[..., Any], ids: Tensor, keep: Tensor) -> list[Any]:
        rows = (ids[row, own][None] for row, own in enumerate(keep))
        return [run(row, torch.ones_like(row, dtype=torch.bool)) for row in rows]

    def stages_of_all(ids: Tensor, keep: Tensor) -> list[Tensor]:
        return [torch.cat(parts) for parts in zip(*each(stages, ids, keep), strict=True)]

    return lambda ids, keep: torch.cat(each(logits, ids, keep)), stages_of_all


def _compiled(subject: Subject, backend: str) -> Any:
    # One compilation serves both questions: it is what costs.
    run = torch.compile(Staged(subject.copy(torch.float32)), backend=backend, dynamic=True)
    return (
        lambda ids, keep: run(ids, keep)[-1],
        lambda ids, keep: of_real_tokens(run(ids, keep), keep),
    )


def _exported(subject: Subject) -> Any:
    model = subject.copy(torch.float32)
    program = export.exported_program(model)
    run = program.module()
    return (
        lambda ids, keep: run(ids, keep.long()),
        lambda ids, keep: ProgramStages(program, model).stages(ids, keep.long()),
    )


def _onnx(subject: Subject) -> Any:
    model = subject.copy(torch.float32)
    export.extra("onnxruntime")
    data = subject.onnx.read_bytes() if subject.onnx else export.onnx_bytes(model)
    session = export.onnx_session(data)

    def run(session: Any, outputs: Sequence[str], ids: Tensor, keep: Tensor) -> list[Tensor]:
        feeds = dict(zip(export.INPUTS, (ids.numpy(), keep.long().numpy()), strict=True))
        return [torch.from_numpy(x) for x in session.run(outputs, feeds)]

    def stages(ids: Tensor, keep: Tensor) -> list[Tensor]:
        opened, found = onnx_with_stages(data, model)
        if not found:
            return []
        outputs = run(export.onnx_session(opened), [*found, "logits"], ids, keep)
        return of_real_tokens(outputs, keep)

    return lambda ids, keep: run(session, ["logits"], ids, keep)[0], stages


_KNOWN: dict[str, tuple[str, torch.dtype, Any]] = {
    BASE: ("as `stabletx evaluate` runs it", torch.float32, partial(_eager, call=as_shipped)),
    EXACT: (
        "all arithmetic in float64",
        torch.float64,
        partial(_eager, call=as_shipped, dtype=torch.float64),
    ),
    "bfloat16": (
        "weights and activations in bfloat16",
        torch.bfloat16,
        partial(_eager, call=as_shipped, dtype=torch.bfloat16),
    ),
    "single": ("batches of one text", torch.float32, _one_by_one),
    "padded": ("padding computed too", torch.float32, partial(_eager, call=padded)),
    "packed": ("real tokens alone", torch.float32, partial(_eager, call=packed)),
    "compiled": (
        "torch.compile, aot_eager",
        torch.float32,
        partial(_compiled, backend="aot_eager"),
    ),
    "inductor": ("torch.compile, inductor", torch.float32, partial(_compiled, backend="inductor")),
    "exported": ("torch.export", torch.float32, _exported),
    "onnx": ("ONNX Runtime on the CPU", torch.float32, _onnx),
    "cuda": ("on the GPU", torch.float32, partial(_eager, call=as_shipped, device="cuda")),
    "cuda-bfloat16": (
        "on the GPU in bfloat16",
        torch.bfloat16,
        partial(_eager, call=as_shipped, dtype=torch.bfloat16, device="cuda"),
    ),
}
