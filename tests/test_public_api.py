"""What can be imported from the top is what the documentation promises, typed and documented."""

import inspect

import pytest

import stabletx

PROMISED = {
    "AttentionDetails", "ClassificationHead", "Decoder", "DecoderBlock", "Encoder", "EncoderBlock",
    "EncoderDecoder", "FeedForward", "KeyValueCache", "LayerNorm", "Mask", "MaskedLanguageModel",
    "MultiHeadAttention", "Packed", "RMSNorm", "RotaryEmbedding", "SequenceClassifier",
    "TransformerConfig", "attention", "attention_details", "functional", "__version__",
}  # fmt: skip


def test_the_public_names_are_those_promised():
    assert set(stabletx.__all__) == PROMISED
    assert set(dir(stabletx)) > PROMISED


@pytest.mark.parametrize("name", sorted(PROMISED - {"__version__", "functional"}))
def test_public_names_are_documented_with_an_example(name):
    thing = getattr(stabletx, name)
    assert inspect.getdoc(thing)
    if inspect.isfunction(thing):
        parts = ("Args:", "Returns:", "Raises:", "Numerics:", ">>>")
        assert all(part in thing.__doc__ for part in parts)


@pytest.mark.parametrize(
    "name", ["data", "functional", "interop", "layers", "models", "testing", "training"]
)
def test_folders_are_reachable_from_the_top(name):
    assert getattr(stabletx, name).__name__ == f"stabletx.{name}"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'attend'"):
        _ = stabletx.attend
