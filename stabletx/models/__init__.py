"""Whole models, their configuration and what they return."""

from stabletx.models.classifier import SequenceClassifier
from stabletx.models.config import TransformerConfig
from stabletx.models.encoder import Encoder
from stabletx.models.outputs import ClassifierOutput, DecoderOutput, EncoderOutput, ModelOutput

__all__ = [
    "ClassifierOutput",
    "DecoderOutput",
    "Encoder",
    "EncoderOutput",
    "ModelOutput",
    "SequenceClassifier",
    "TransformerConfig",
]
