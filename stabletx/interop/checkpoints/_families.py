"""Which families there are, and which model of ours a checkpoint describes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from stabletx.interop.checkpoints import _messages
from stabletx.interop.checkpoints._bert_like import (
    convert_albert,
    convert_bert,
    convert_distilbert,
    convert_electra,
    convert_mpnet,
    convert_roberta,
)
from stabletx.interop.checkpoints._conversion import Conversion
from stabletx.interop.checkpoints._decoders import convert_gpt2, convert_llama, convert_mistral
from stabletx.interop.checkpoints._encoder_decoders import convert_marian, convert_t5
from stabletx.interop.checkpoints._modernbert import convert_modernbert
from stabletx.models import (
    Decoder,
    Encoder,
    EncoderDecoder,
    MaskedLanguageModel,
    SequenceClassifier,
)
from stabletx.models._storage import StoredModel

Convert = Callable[[Mapping[str, Any], Collection[str], type[StoredModel]], Conversion]


@dataclass(frozen=True)
class Family:
    """How a family is converted, and which class of ours each of its classes becomes."""

    convert: Convert
    models: Mapping[str, type[StoredModel]]


def _encoders(name: str, **more: type[StoredModel]) -> dict[str, type[StoredModel]]:
    return {
        f"{name}ForSequenceClassification": SequenceClassifier,
        f"{name}ForMaskedLM": MaskedLanguageModel,
        f"{name}Model": Encoder,
        **{name + suffix: model for suffix, model in more.items()},
    }


FAMILIES = {
    "bert": Family(convert_bert, _encoders("Bert", ForPreTraining=MaskedLanguageModel)),
    "distilbert": Family(convert_distilbert, _encoders("DistilBert")),
    "roberta": Family(convert_roberta, _encoders("Roberta")),
    "electra": Family(convert_electra, _encoders("Electra", ForPreTraining=Encoder)),
    "albert": Family(convert_albert, _encoders("Albert", ForPreTraining=MaskedLanguageModel)),
    "mpnet": Family(convert_mpnet, _encoders("MPNet")),
    "modernbert": Family(convert_modernbert, _encoders("ModernBert")),
    "gpt2": Family(convert_gpt2, {"GPT2LMHeadModel": Decoder}),
    "llama": Family(convert_llama, {"LlamaForCausalLM": Decoder}),
    "mistral": Family(convert_mistral, {"MistralForCausalLM": Decoder}),
    "t5": Family(convert_t5, {"T5ForConditionalGeneration": EncoderDecoder}),
    "marian": Family(convert_marian, {"MarianMTModel": EncoderDecoder}),
}


def convert(
    config: Mapping[str, Any],
    names: Collection[str],
    *,
    model: type[StoredModel] | None = None,
    family: str | None = None,
) -> Conversion:
    """Say how a checkpoint becomes a model of ours.

    Args:
        config: what ``config.json`` holds.
        names: of the tensors in the file.
        model: the class wanted; None takes what ``architectures`` names, or where there is no such
            key, the first that the names fill.
        family: in place of ``model_type``; without either, the names decide.

    Raises:
        ValueError: for a family, an architecture, a class or a setting that is not supported.
    """
    notes: tuple[str, ...] = ()
    chosen = family or config.get("model_type")
    if chosen is None:
        chosen = next((f for f in FAMILIES if any(x.startswith(f"{f}.") for x in names)), None)
        notes = (f"no model_type: taken for {chosen} by the names of the weights",)
    _messages.check_family(chosen, FAMILIES)
    known = FAMILIES[str(chosen)]
    _messages.check_setting(config, "quantization_config", (None,))
    kinds = tuple(dict.fromkeys(known.models.values()))
    if model is not None:
        if model not in kinds:
            _messages.refuse_model(str(chosen), model, kinds)
        made = known.convert(config, names, model)
    elif config.get("architectures"):
        listed = config["architectures"]
        named = listed[0] if isinstance(listed, list) else listed
        if not isinstance(named, str) or named not in known.models:
            _messages.refuse_architecture(str(chosen), named, tuple(known.models))
        made = known.convert(config, names, known.models[named])
    else:
        tried = [known.convert(config, names, kind) for kind in kinds]
        full = [one for one in tried if _is_filled(one, names)]
        made = (full or tried)[0]
        notes += (f"no architectures: taken for a {made.model.__name__} by the names",)
    return replace(made, notes=(*made.notes, *notes))


def _is_filled(conversion: Conversion, names: Collection[str]) -> bool:
    others: dict[str, set[str]] = {}
    for name, main in conversion.tied.items():
        others.setdefault(main, set()).add(name)
    wanted = (name for piece in conversion.pieces for name in piece.theirs)
    return all(name in names or others.get(name, set()) & set(names) for name in wanted)
