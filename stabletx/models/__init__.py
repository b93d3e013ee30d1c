"""Whole models, their configuration and what they return."""

from stabletx.models.classifier import SequenceClassifier
from stabletx.models.config import TransformerConfig
from stabletx.models.decoder import Decoder
from stabletx.models.encoder import Encoder
from stabletx.models.encoder_decoder import EncoderDecoder
from stabletx.models.masked_language import MaskedLanguageModel
from stabletx.models.outputs import (
    ClassifierOutput,
    DecoderOutput,
    EncoderOutput,
    MaskedLanguageOutput,
    ModelOutput,
)

__all__ = [
    "ClassifierOutput",
    "Decoder",
    "DecoderOutput",
    "Encoder",
    "EncoderDecoder",
    "EncoderOutput",
    "MaskedLanguageModel",
    "MaskedLanguageOutput",
    "ModelOutput",
    "SequenceClassifier",
    "TransformerConfig",
]
