"""What models return: named tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class ModelOutput(dict[str, Tensor]):
    """Hold the tensors that there are, by name.

    A dict, so that trainers which look for ``output["loss"]`` find it; the subclasses name each
    field as an attribute, which is None where the tensor is not there.
    """

    def __init__(self, **tensors: Tensor | None) -> None:
        super().__init__({name: x for name, x in tensors.items() if x is not None})

    def __getitem__(self, key: Any) -> Tensor:
        """Give a tensor by its name, or by its place in :meth:`to_tuple`."""
        return self.to_tuple()[key] if isinstance(key, int) else super().__getitem__(key)

    def to_tuple(self) -> tuple[Tensor, ...]:
        """Give the tensors that there are, in order: the loss first."""
        return tuple(self.values())


class EncoderOutput(ModelOutput):
    """What an :class:`Encoder` returns."""

    @property
    def last_hidden_state(self) -> Tensor:
        """Give (b, n, m), 0 at padding; (n_tokens, m) for a packed batch."""
        return self["last_hidden_state"]

    @property
    def pooler_output(self) -> Tensor | None:
        """Give (b, m), one vector for each sequence, or None without a pooler."""
        return self.get("pooler_output")


class ScoredOutput(ModelOutput):
    """Scores, and how far they are from what was asked for."""

    @property
    def loss(self) -> Tensor | None:
        """Give the mean cross-entropy of what has a label, or None without labels."""
        return self.get("loss")

    @property
    def logits(self) -> Tensor:
        """Give the scores; the subclasses say of what."""
        return self["logits"]


class ClassifierOutput(ScoredOutput):
    """What a :class:`SequenceClassifier` returns: scores of the classes (b, c)."""


class DecoderOutput(ScoredOutput):
    """What a :class:`Decoder` and an :class:`EncoderDecoder` return: scores of the next token.

    They are (b, n, vocab_size), or (n_tokens, vocab_size) if packed.
    """


class MaskedLanguageOutput(ScoredOutput):
    """What a :class:`MaskedLanguageModel` returns: scores of each token.

    They are (b, n, vocab_size), or (n_tokens, vocab_size) if packed.
    """
