"""Other people's weights: checkpoints in the form of Hugging Face's ``transformers``.

``load`` reads a folder or a hub id into a model of ours, ``read`` also gives a report on every
tensor, and ``save`` writes a folder that ``transformers`` loads. Which tensor becomes which is said
by one function for each family, such as :func:`convert_bert`. Nothing pickled is run, and a
checkpoint is loaded whole or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from stabletx.interop.checkpoints import _files, _messages
from stabletx.interop.checkpoints._bert_like import (
    convert_albert,
    convert_bert,
    convert_distilbert,
    convert_electra,
    convert_mpnet,
    convert_roberta,
)
from stabletx.interop.checkpoints._conversion import Conversion, Ignored, Piece, Report, carry_out
from stabletx.interop.checkpoints._decoders import convert_gpt2, convert_llama, convert_mistral
from stabletx.interop.checkpoints._encoder_decoders import convert_marian, convert_t5
from stabletx.interop.checkpoints._families import FAMILIES, convert
from stabletx.interop.checkpoints._modernbert import convert_modernbert
from stabletx.interop.checkpoints._save import save
from stabletx.models import SequenceClassifier, _model_checks
from stabletx.models._storage import CONFIG, StoredModel, own_state

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "Conversion",
    "Ignored",
    "Piece",
    "Report",
    "convert",
    "convert_albert",
    "convert_bert",
    "convert_distilbert",
    "convert_electra",
    "convert_gpt2",
    "convert_llama",
    "convert_marian",
    "convert_mistral",
    "convert_modernbert",
    "convert_mpnet",
    "convert_roberta",
    "convert_t5",
    "load",
    "read",
    "save",
]

_OLD_NORM = re.compile(r"(.*LayerNorm)\.(gamma|beta)")


@final
@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model that was read, and what became of every tensor in its file."""

    model: StoredModel
    report: Report


def load(
    source: str | Path,
    *,
    model: type[StoredModel] | None = None,
    labels: Sequence[str] | None = None,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    ignore: Collection[str] = (),
    revision: str | None = None,
) -> StoredModel:
    """Read a Hugging Face checkpoint into a model of ours, on the CPU, in eval mode.

    The arguments, and the errors raised, are those of :func:`read`, which also gives a report.

    Returns:
        An Encoder, SequenceClassifier, MaskedLanguageModel, Decoder or EncoderDecoder.
    """
    return read(
        source, model=model, labels=labels, family=family, dtype=dtype, ignore=ignore,
        revision=revision,
    ).model  # fmt: skip


def read(
    source: str | Path,
    *,
    model: type[StoredModel] | None = None,
    labels: Sequence[str] | None = None,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    ignore: Collection[str] = (),
    revision: str | None = None,
) -> Checkpoint:
    """Read a Hugging Face checkpoint, and report on every tensor in it.

    Args:
        source: a folder with ``config.json`` and the weights (``model.safetensors``, a sharded
            index, or a pickle of tensors alone); or a hub id, where huggingface_hub is installed.
        model: the class wanted; None takes what the checkpoint says it is. Where it is given, a
            head that the file lacks starts anew, to be fine-tuned, and one too many is left out.
        labels: names of the classes, for a SequenceClassifier; a last layer of another size in the
            file is left out and starts anew.
        family: in place of the checkpoint's ``model_type``, which very old ones lack.
        dtype: of the model; None keeps that of the file.
        ignore: names in the file to leave out; any other that nothing is known of is an error.
        revision: of a hub id: a branch, tag or commit.

    Returns:
        The model and the report.

    Raises:
        FileNotFoundError: if the folder, its ``config.json`` or its weights are not there.
        ModuleNotFoundError: for a hub id without huggingface_hub.
        TypeError: for a dtype that is not one of ours, here or in the file, or a mixture of them.
        ValueError: for a family, architecture or setting that is not supported; a damaged file, or
            a pickle of more than tensors; missing or unexpected names; weights that contradict
            the settings. Nothing is loaded then.
    """
    _messages.check_dtype(dtype)
    _messages.check_names("ignore", ignore)
    if labels is not None:
        _messages.check_labels(labels, model, SequenceClassifier)
    folder = _files.find_folder(source, revision)
    config = _files.read_config(folder)
    path, tensors = _files.read_tensors(folder)
    tensors = _with_new_names(tensors)
    if labels is not None:
        config = {**config, "id2label": dict(enumerate(labels)), "num_labels": len(labels)}
        model = SequenceClassifier
    try:
        _messages.check_n_layers(config, len(tensors))
        conversion = convert(config, tensors, model=model, family=family)
    except (ValueError, TypeError) as error:
        raise ValueError(_messages.unsuitable(folder / CONFIG, error)) from error
    if labels is not None:
        conversion = _with_own_classes(conversion, tensors, len(labels))
    read_names = {name for piece in conversion.pieces for name in piece.theirs}
    read_names |= conversion.tied.keys()
    _messages.check_dtypes(path, {k: x for k, x in tensors.items() if k in read_names}, dtype)
    made, report = carry_out(conversion, tensors, ignore=ignore)
    lacking = {piece.ours for piece in conversion.pieces} - made.keys()
    only_heads = all("head." in name for name in lacking)
    if lacking and not (model is not None and only_heads):
        _messages.refuse_missing(path, report.missing, only_heads=only_heads)
    if report.unexpected:
        _messages.refuse_unexpected(path, report.unexpected)
    filled = _filled(conversion, made, path, dtype)
    fresh = tuple(name for name in own_state(filled) if name not in made)
    return Checkpoint(filled, replace(report, fresh=fresh))


def _with_new_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give norms' parameters the names that they have had since 2019, where those are free."""
    renamed = {}
    for name, x in tensors.items():
        old = _OLD_NORM.fullmatch(name)
        new = "" if old is None else f"{old[1]}.{'weight' if old[2] == 'gamma' else 'bias'}"
        renamed[new if new and new not in tensors else name] = x
    return renamed


def _with_own_classes(
    conversion: Conversion, tensors: Mapping[str, Tensor], n_classes: int
) -> Conversion:
    """Let the last layer of a classifier start anew where the file's has other classes."""
    last = [piece for piece in conversion.pieces if piece.ours == "head.out.weight"]
    held = tensors.get(last[0].theirs[0]) if last else None
    if held is None or held.shape[:1] == (n_classes,):
        return conversion
    dropped = [piece for piece in conversion.pieces if piece.ours.startswith("head.out.")]
    kept = tuple(piece for piece in conversion.pieces if piece not in dropped)
    why = f"its {held.shape[0]} classes are not the {n_classes} asked for"
    ignored = tuple(Ignored(re.escape(piece.theirs[0]), why) for piece in dropped)
    return replace(conversion, pieces=kept, ignored=(*ignored, *conversion.ignored))


def _filled(
    conversion: Conversion, made: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None
) -> StoredModel:
    """Build the model and put the tensors in their places; what is not there starts anew."""
    try:
        with torch.device("meta"):
            model = conversion.model(conversion.config)
    except RuntimeError as error:  # more bytes than can be counted
        raise ValueError(_messages.unsuitable(path.parent / CONFIG, error)) from error
    wanted = own_state(model)
    _check_shapes(conversion, made, wanted, path)
    dtype = next(iter(made.values())).dtype if dtype is None else dtype
    if wanted.keys() - made.keys():
        model = conversion.model(conversion.config).to(dtype)
    # Copied out of the file's mapping: aligned memory, so that a reload gives the same bits.
    own = {name: x.to(dtype, copy=True).contiguous() for name, x in made.items()}
    model.load_state_dict(own, assign=True, strict=False)
    return model.eval()


def _check_shapes(
    conversion: Conversion, made: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path
) -> None:
    theirs = {piece.ours: " + ".join(piece.theirs) for piece in conversion.pieces}
    faults = []
    for name, x in made.items():
        assert name in wanted, name
        if x.shape != wanted[name].shape:
            shapes = f"{tuple(x.shape)} instead of {tuple(wanted[name].shape)}"
            faults.append(f"{theirs[name]} of shape {shapes}")
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        again = f"Does {CONFIG} beside it describe these weights?"
        what = "; ".join(faults[:5]) + more
        raise ValueError(_model_checks.bad_file(path, what, again))
