"""Modules: parameters and shapes. The mathematics is in ``stabletx.functional``."""

from stabletx.layers.attention import MultiHeadAttention
from stabletx.layers.blocks import DecoderBlock, EncoderBlock
from stabletx.layers.cache import KeyValueCache
from stabletx.layers.embeddings import RotaryEmbedding
from stabletx.layers.feed_forward import FeedForward
from stabletx.layers.heads import ClassificationHead
from stabletx.layers.normalization import LayerNorm, RMSNorm

__all__ = [
    "ClassificationHead",
    "DecoderBlock",
    "EncoderBlock",
    "FeedForward",
    "KeyValueCache",
    "LayerNorm",
    "MultiHeadAttention",
    "RMSNorm",
    "RotaryEmbedding",
]
