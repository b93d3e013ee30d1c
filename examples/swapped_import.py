"""A model written for torch.nn, and what one import changes: an empty text no longer ruins it.

Run it: ``python examples/swapped_import.py``
"""

from types import ModuleType

import torch
from torch import nn

from stabletx.interop import torch as stabletx_nn


class Classifier(nn.Module):
    """Tell whether a text holds tokens 3 or 4; ``layers`` is torch.nn or its stand-in."""

    def __init__(self, layers: ModuleType, d_model: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, d_model)
        layer = layers.TransformerEncoderLayer(d_model, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = layers.TransformerEncoder(layer, 1)
        self.pool = layers.MultiheadAttention(d_model, 4, batch_first=True)
        self.question = nn.Parameter(torch.randn(1, 1, d_model) * 0.1)
        self.head = nn.Linear(d_model, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map ids (b, n), 0 = padding, to logits (b, 2)."""
        padding = ids == 0
        x = self.encoder(self.embedding(ids), src_key_padding_mask=padding)
        asked = self.question.expand(len(ids), -1, -1)
        pooled, _ = self.pool(asked, x, x, key_padding_mask=padding)
        return self.head(pooled[:, 0])


def texts(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw texts of 4 to 8 tokens; about one in a hundred is empty."""
    ids = torch.randint(1, 20, (n, 8), generator=generator)
    lengths = torch.randint(4, 9, (n, 1), generator=generator)
    lengths[torch.rand(n, 1, generator=generator) < 0.01] = 0
    ids = ids.masked_fill(torch.arange(8) >= lengths, 0)
    return ids, ((ids == 3) | (ids == 4)).any(1).long()


def train(model: nn.Module, n_steps: int = 120) -> float:
    """Train, and give the accuracy on new texts."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(n_steps):
        ids, labels = texts(64, generator)
        loss = nn.functional.cross_entropy(model(ids), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids, labels = texts(1000, generator)
    return float((model.eval()(ids).argmax(-1) == labels).double().mean())


def main() -> None:
    """Train the same model, from the same weights, with both."""
    for name, layers in (("torch.nn", nn), ("stabletx.interop.torch", stabletx_nn)):
        torch.manual_seed(0)
        model = Classifier(layers)
        accuracy = train(model)
        n_nan = sum(int(x.isnan().sum()) for x in model.parameters())
        print(f"{name}: accuracy {accuracy:.3f}, {n_nan} weights are NaN")


if __name__ == "__main__":
    main()
