"""Transformers in pure PyTorch whose numbers are right, and the kit that proves it.

The public names are loaded when first used, so that the command line can print its help without
waiting for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from stabletx import functional as functional
    from stabletx.functional.attention import (
        AttentionDetails as AttentionDetails,
    )
    from stabletx.functional.attention import (
        attention as attention,
    )
    from stabletx.functional.attention import (
        attention_details as attention_details,
    )
    from stabletx.layers import (
        ClassificationHead as ClassificationHead,
    )
    from stabletx.layers import (
        DecoderBlock as DecoderBlock,
    )
    from stabletx.layers import (
        EncoderBlock as EncoderBlock,
    )
    from stabletx.layers import (
        FeedForward as FeedForward,
    )
    from stabletx.layers import (
        KeyValueCache as KeyValueCache,
    )
    from stabletx.layers import (
        LayerNorm as LayerNorm,
    )
    from stabletx.layers import (
        MultiHeadAttention as MultiHeadAttention,
    )
    from stabletx.layers import (
        RMSNorm as RMSNorm,
    )
    from stabletx.layers import (
        RotaryEmbedding as RotaryEmbedding,
    )
    from stabletx.masks import Mask as Mask
    from stabletx.models import (
        Decoder as Decoder,
    )
    from stabletx.models import (
        Encoder as Encoder,
    )
    from stabletx.models import (
        EncoderDecoder as EncoderDecoder,
    )
    from stabletx.models import (
        MaskedLanguageModel as MaskedLanguageModel,
    )
    from stabletx.models import (
        SequenceClassifier as SequenceClassifier,
    )
    from stabletx.models import (
        TransformerConfig as TransformerConfig,
    )
    from stabletx.packing import Packed as Packed

_HOME = {
    "AttentionDetails": "functional.attention",
    "attention": "functional.attention",
    "attention_details": "functional.attention",
    "ClassificationHead": "layers",
    "DecoderBlock": "layers",
    "EncoderBlock": "layers",
    "FeedForward": "layers",
    "KeyValueCache": "layers",
    "LayerNorm": "layers",
    "MultiHeadAttention": "layers",
    "RMSNorm": "layers",
    "RotaryEmbedding": "layers",
    "Mask": "masks",
    "Decoder": "models",
    "Encoder": "models",
    "EncoderDecoder": "models",
    "MaskedLanguageModel": "models",
    "SequenceClassifier": "models",
    "TransformerConfig": "models",
    "Packed": "packing",
}
_FOLDERS = ("data", "functional", "interop", "layers", "models", "testing", "training")

__all__ = [*_HOME, "__version__", "functional"]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"stabletx.{_HOME[name]}"), name)
    if name in _FOLDERS:
        return import_module(f"stabletx.{name}")
    raise AttributeError(f"module 'stabletx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_FOLDERS])
