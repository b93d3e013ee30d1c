"""The masked language model: scores at real tokens, whatever lies around them."""

import pytest
import torch

from stabletx.functional import cross_entropy
from stabletx.layers import _prepacked
from stabletx.layers.heads import LanguageHead
from stabletx.models import Encoder, MaskedLanguageModel, TransformerConfig
from stabletx.packing import Packed

KEEP = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
IDS = torch.randint(30, (4, 5), generator=torch.Generator().manual_seed(0))
TYPES = torch.tensor([[0, 1, 0, 0, 0], [0, 0, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
LABELS = torch.where(IDS % 2 == 0, IDS, -100)


def model(dtype=torch.float64, **options):
    torch.manual_seed(0)
    options = {"n_token_types": 2, "head_activation": "gelu", "head_norm": True, **options}
    made = MaskedLanguageModel(TransformerConfig(30, 16, 2, 4, head_bias=True, **options))
    torch.nn.init.normal_(made.head.bias)
    return made.to(dtype)


def test_packed_scores_are_the_padded_ones_with_their_gradients(same_function, monkeypatch):
    def run(dtype, full_enough):
        monkeypatch.setattr("stabletx.models._inputs.FULL_ENOUGH", full_enough)
        made = model(dtype)
        out = made(IDS, KEEP, labels=LABELS, token_type_ids=TYPES)
        return [out.logits, *torch.autograd.grad(out.loss, list(made.parameters()))]

    same_function(lambda dtype: run(dtype, -1.0), lambda dtype: run(dtype, 0.95))


def test_loss_is_the_cross_entropy_at_labelled_real_tokens():
    out = model()(IDS, KEEP, labels=LABELS)
    assert torch.equal(out.logits[~KEEP], torch.zeros_like(out.logits[~KEEP]))
    expected = cross_entropy(out.logits[KEEP], LABELS[KEEP])
    torch.testing.assert_close(out.loss, expected)


def test_packed_ids_have_the_scores_of_the_padded():
    made = model()
    packed = made(Packed(IDS[KEEP], KEEP.sum(1)), token_type_ids=TYPES[KEEP])
    assert torch.equal(packed.logits, made(IDS, KEEP, token_type_ids=TYPES).logits[KEEP])


def test_types_matter_and_their_absence_is_type_0():
    made = model()
    plain = made(IDS).logits
    assert torch.equal(plain, made(IDS, token_type_ids=torch.zeros_like(IDS)).logits)
    assert not torch.equal(plain, made(IDS, token_type_ids=TYPES).logits)


def test_types_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"token_type_ids must be in \[0, n_token_types=2\), got"):
        model()(IDS, token_type_ids=TYPES + 5)
    with pytest.raises(ValueError, match=r"token_type_ids must be None, got token_type_ids=a tens"):
        model(n_token_types=0)(IDS, token_type_ids=TYPES)
    with pytest.raises(ValueError, match="token_type_ids must have the shape of input_ids"):
        model()(IDS, token_type_ids=TYPES[:2])
    with pytest.raises(ValueError, match="labels must have the shape of input_ids"):
        model()(IDS, labels=LABELS[:2])


def test_a_pooler_reads_the_first_real_token(same_function, monkeypatch):
    config = TransformerConfig(30, 16, 2, 4, has_pooler=True)

    def run(dtype, full_enough):
        monkeypatch.setattr("stabletx.models._inputs.FULL_ENOUGH", full_enough)
        torch.manual_seed(0)
        out = Encoder(config).to(dtype)(IDS, KEEP)
        return [out.last_hidden_state, out.pooler_output]

    same_function(lambda dtype: run(dtype, -1.0), lambda dtype: run(dtype, 0.95))
    made = Encoder(config).double()
    states, pooled = made(IDS, KEEP).to_tuple()
    hidden = made.pooler.hidden.linear
    for i, first in ((0, 0), (1, 1), (3, 0)):
        torch.testing.assert_close(pooled[i], torch.tanh(hidden(states[i, first])))
    assert torch.equal(pooled[2], torch.tanh(hidden.bias))


def test_scores_are_torchs_own_product_where_another_kernel_is_faster(monkeypatch):
    monkeypatch.setattr(_prepacked, "_found", {})
    monkeypatch.setattr(_prepacked, "_fastest", lambda *a: "onednn")
    torch.manual_seed(0)
    head = LanguageHead(256, 600, activation="gelu", norm="layer", has_bias=True).eval()
    x, table = torch.randn(64, 256), torch.nn.Parameter(torch.randn(600, 256))
    with torch.inference_mode():
        own = torch.nn.functional.linear(head.hidden(x), table, head.bias)
        assert torch.equal(head(x, table), own)
