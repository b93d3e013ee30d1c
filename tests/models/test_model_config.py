import json
from dataclasses import FrozenInstanceError

import pytest

from stabletx.models import TransformerConfig

SIZES = {"vocab_size": 30, "d_model": 16, "n_layers": 2, "n_heads": 4}


def test_config_comes_back_from_json():
    config = TransformerConfig(**SIZES, labels=("a", "b"), norm="rms", eos_id=3)
    assert TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.n_classes == 2


def test_config_of_the_first_version_is_read():
    old = {
        "vocab_size": 30, "d_model": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": None,
        "d_ff": None, "max_seq_len": 512, "dropout_p": 0.1, "attention_dropout_p": 0.0,
        "norm_position": "pre", "norm": "layer", "qk_norm": True, "activation": "gelu",
        "use_bias": True, "position": "rotary", "rotary_base": 10000.0, "pooling": "mean",
        "labels": ["a", "b"], "n_classes": 2, "pad_id": 0, "bos_id": None, "eos_id": None,
    }  # fmt: skip
    config = TransformerConfig.from_dict(old)
    assert config == TransformerConfig(**SIZES, dropout_p=0.1, labels=("a", "b"))


def test_windowed_layers_are_those_between_the_ones_that_see_all():
    config = TransformerConfig(**SIZES, window=2, global_every=3)
    assert [config.is_windowed(i) for i in range(5)] == [False, True, True, False, True]
    assert TransformerConfig(**SIZES, window=2).is_windowed(0)
    assert not TransformerConfig(**SIZES).is_windowed(1)


def test_config_cannot_change():
    with pytest.raises(FrozenInstanceError, match=r"cannot assign to field 'd_model'"):
        TransformerConfig(**SIZES).d_model = 8
    with pytest.raises(FrozenInstanceError, match=r"cannot assign to field 'd_modle'"):
        TransformerConfig(**SIZES).d_modle = 8


def test_config_bears_the_note_of_hugging_faces_trainer():
    config = TransformerConfig(**SIZES)
    config.use_cache = False
    assert config == TransformerConfig(**SIZES)
    assert config.to_dict() == TransformerConfig(**SIZES).to_dict()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"vocab_size": 0}, ValueError, "vocab_size must be positive, got vocab_size=0"),
        ({"n_layers": 2.0}, TypeError, r"n_layers must be an int, got n_layers=2\.0"),
        ({"n_heads": 3}, ValueError, "n_heads must divide d_model, got n_heads=3"),
        ({"n_kv_heads": 3}, ValueError, "n_kv_heads must divide n_heads, got n_kv_heads=3"),
        ({"n_heads": 16}, ValueError, "d_model / n_heads must be even"),
        ({"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\), got dropout_p=1\.5"),
        ({"qk_norm": 1}, TypeError, "qk_norm must be True or False, got qk_norm=1"),
        ({"rotary_base": 0.0}, ValueError, r"rotary_base must be positive, got rotary_base=0\.0"),
        ({"norm": "batch"}, ValueError, r"norm must be one of .*, got norm='batch'"),
        ({"pad_id": 30}, ValueError, r"pad_id must be in \[0, vocab_size=30\), got pad_id=30"),
        ({"eos_id": "x"}, TypeError, "eos_id must be an int, got eos_id='x'"),
        ({"d_head": 3}, ValueError, "d_model / n_heads must be even"),
        ({"global_every": 3}, ValueError, "global_every must be None without a window, got .*=3"),
        ({"n_distinct_layers": 3}, ValueError, "n_distinct_layers must divide n_layers, got .*=3"),
        ({"head_activation": "elu"}, ValueError, "head_activation must be one of 'tanh'"),
        ({"embedding_norm": "yes"}, TypeError, "embedding_norm must be True or False"),
        ({"n_token_types": -1}, ValueError, "n_token_types must be at least 0"),
        ({"norm_eps": 0.0}, ValueError, r"norm_eps must be positive, got norm_eps=0\.0"),
        ({"labels": "ab"}, TypeError, "labels must be a tuple of texts, got labels='ab'"),
        ({"labels": ("a", "a")}, ValueError, "labels must differ from each other"),
        ({"labels": ("a",), "n_classes": 2}, ValueError, "number of labels, 1, got n_classes=2"),
    ],
)
def test_config_refuses_what_makes_no_model(options, error, match):
    with pytest.raises(error, match=match):
        TransformerConfig(**{**SIZES, **options})


def test_config_refuses_unknown_and_missing_keys():
    with pytest.raises(ValueError, match=r"config must have no unknown keys, got unknown: d_modle"):
        TransformerConfig.from_dict({**SIZES, "d_modle": 3})
    with pytest.raises(ValueError, match=r"config must have all keys, got missing: d_model, n_"):
        TransformerConfig.from_dict({"vocab_size": 3, "n_layers": 3})
