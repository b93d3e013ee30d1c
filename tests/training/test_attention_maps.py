import pytest
import torch

from stabletx.models import SequenceClassifier, TransformerConfig
from stabletx.training.attention_maps import last_attention, pick_examples
from tests.training.standins import TinyModel


@pytest.mark.parametrize("n_kv_heads", [None, 1])
@pytest.mark.parametrize("norm_position", ["pre", "post", "peri"])
def test_weights_times_values_are_the_output_of_the_layer(norm_position, n_kv_heads):
    torch.manual_seed(0)
    config = TransformerConfig(
        50, 16, 2, 4, n_kv_heads=n_kv_heads, norm_position=norm_position, labels=("a", "b")
    )
    model = SequenceClassifier(config).double().eval()
    layer, seen = model.encoder.blocks[-1].attention, {}
    layer.register_forward_hook(lambda layer, args, out: seen.update(x=args[0], out=out.clone()))
    weights = last_attention(model, [3, 4, 5, 6, 7])
    assert weights.shape == (4, 5, 5)
    with torch.no_grad():
        v = layer.qkv(seen["x"])[0].split(layer._widths(), dim=-1)[2].view(5, -1, 4)
        v = v.repeat_interleave(4 // v.shape[1], dim=1)
        out = layer.out(torch.einsum("hts,shd->thd", weights, v).reshape(5, 16))
    # Sums of 5 and 16 terms in float64.
    bound = 64 * torch.finfo(torch.float64).eps * (1 + float(out.abs().max()))
    assert float((out - seen["out"][0]).abs().max()) <= bound


def test_last_attention_takes_its_hook_away():
    model = SequenceClassifier(TransformerConfig(50, 16, 2, 4, labels=("a", "b")))
    last_attention(model, [3, 4])
    assert all(not m._forward_pre_hooks for m in model.modules())


def test_last_attention_refuses_a_model_without_attention():
    with pytest.raises(ValueError, match="got TinyModel"):
        last_attention(TinyModel(), [3, 4])


def test_examples_are_short_right_and_of_different_classes():
    probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.6, 0.4], [0.0, 1.0]])
    truth = torch.tensor([0, 0, 1, 1, 1])
    assert pick_examples([10, 10, 10, 10, 90], probabilities, truth) == [0, 2]


@pytest.mark.parametrize("n_rows", [1, 2])
def test_examples_are_picked_from_few_rows_too(n_rows):
    probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2]])[:n_rows]
    assert len(pick_examples([900] * n_rows, probabilities, torch.zeros(n_rows))) == n_rows
