"""Models are one graph, and lengths that nobody compiled for do not make another."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from stabletx.models import Decoder, Encoder, SequenceClassifier, TransformerConfig

SHAPES = [(2, 5), (3, 7), (4, 9)]


def some_ids(*shape):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "make",
    [
        Encoder,
        pytest.param(Decoder, marks=pytest.mark.nightly),
        pytest.param(SequenceClassifier, marks=pytest.mark.nightly),
    ],
)
@torch.no_grad()
def test_model_compiles_once_for_any_length(make):
    torch.manual_seed(0)
    made = make(TransformerConfig(50, 16, 1, 4, n_kv_heads=2, n_classes=3)).eval()
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, backend=counter)
    for b, n in SHAPES:
        keep = torch.arange(n) < torch.tensor([n] + [n - 2] * (b - 1))[:, None]
        out = compiled(some_ids(b, n), keep)
        assert out[-1].shape[0] == b
    # The first for its own shape, the second for every other.
    assert counter.frame_count <= 2
