"""Whole models, their configuration and what they return."""

from stabletx.models.classifier import SequenceClassifier
from stabletx.models.config import TransformerConfig
from stabletx.models.decoder import Decoder
from stabletx.models.encoder import Encoder
from stabletx.models.encoder_decoder import EncoderDecoder
from stabletx.models.outputs import ClassifierOutput, DecoderOutput, EncoderOutput, ModelOutput

__all__ = [
    "ClassifierOutput",
    "Decoder",
    "DecoderOutput",
    "Encoder",
    "EncoderDecoder",
    "EncoderOutput",
    "ModelOutput",
    "SequenceClassifier",
    "TransformerConfig",
]
