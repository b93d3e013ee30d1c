"""The classifier and what it returns."""

import pytest
import torch

from stabletx.functional import cross_entropy
from stabletx.models import SequenceClassifier, TransformerConfig
from stabletx.packing import Packed

POOLINGS = ["mean", "first", "attention"]
KEEP = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
IDS = torch.randint(30, (4, 5), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 2, 1, -100])


def model(dtype=torch.float64, **options):
    torch.manual_seed(0)
    options = {"labels": ("a", "b", "c"), **options}
    return SequenceClassifier(TransformerConfig(30, 16, 2, 4, **options)).to(dtype)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_packed_classifier_is_the_padded_one_with_its_gradients(
    same_function, monkeypatch, pooling
):
    def run(dtype, full_enough):
        monkeypatch.setattr("stabletx.models._inputs.FULL_ENOUGH", full_enough)
        made = model(dtype, pooling=pooling)
        out = made(IDS, KEEP, labels=LABELS)
        return [out.logits, *torch.autograd.grad(out.loss, list(made.parameters()))]

    same_function(lambda dtype: run(dtype, -1.0), lambda dtype: run(dtype, 0.95))


def test_a_hidden_layer_bends_the_pooled_vector_before_it_is_scored():
    made = model(pooling="first", head_activation="tanh", head_norm=True)
    hidden = made.head.hidden
    states = made.encoder(IDS, KEEP).last_hidden_state
    first = torch.stack([states[0, 0], states[1, 1], torch.zeros_like(states[0, 0]), states[3, 0]])
    wanted = made.head.out(hidden.norm(torch.tanh(hidden.linear(first))))
    torch.testing.assert_close(made(IDS, KEEP).logits, wanted)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_packed_ids_are_classified_to_the_bits_of_the_padded(pooling):
    made = model(pooling=pooling)
    packed = made(Packed(IDS[KEEP], KEEP.sum(1)), labels=LABELS)
    padded = made(IDS, KEEP, labels=LABELS)
    assert torch.equal(packed.logits, padded.logits)
    assert torch.equal(packed.loss, padded.loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_classifier_is_finite_where_a_row_is_padding_alone(dtype):
    made = model(dtype)
    out = made(IDS, KEEP, labels=LABELS)
    assert out.logits.isfinite().all()
    assert torch.equal(out.logits[2], made.head.out.bias)
    out.loss.backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in made.parameters())


def test_classifier_is_finite_where_every_row_is_padding():
    out = model()(IDS, torch.zeros_like(KEEP), labels=LABELS)
    assert torch.equal(out.logits, torch.zeros(4, 3, dtype=torch.float64))


def test_classifier_loss_is_the_cross_entropy_of_its_logits():
    out = model()(IDS, KEEP, labels=LABELS)
    assert torch.equal(out.loss, cross_entropy(out.logits, LABELS))
    assert model()(IDS, KEEP, labels=torch.full_like(LABELS, -100)).loss == 0


def test_output_is_a_dict_a_tuple_and_has_attributes():
    out = model()(IDS, KEEP, labels=LABELS)
    assert list(out) == ["loss", "logits"]
    assert out["loss"] is out.loss is out[0] is out.to_tuple()[0]
    assert out["logits"] is out.logits is out[1]
    without = model()(IDS, KEEP)
    assert list(without) == ["logits"]
    assert without.loss is None
    assert without[0] is without.logits


def test_classifier_runs_under_autocast():
    made = model(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = made(IDS, KEEP, labels=LABELS)
    assert out.logits.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    out.loss.backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in made.parameters())


def test_classifier_refuses_a_configuration_without_classes():
    with pytest.raises(ValueError, match=r"config.n_classes must be given for a classifier"):
        SequenceClassifier(TransformerConfig(30, 16, 2, 4))
    with pytest.raises(TypeError, match=r"config must be a TransformerConfig, got config=dict"):
        SequenceClassifier({})
