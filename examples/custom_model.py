"""Attention in a model of your own: a tiny classifier of point clouds, padded to one size.

Run it: ``python examples/custom_model.py``
"""

import torch
from torch import nn

from stabletx import Mask, MultiHeadAttention, attention_details
from stabletx.functional import cross_entropy


class SetClassifier(nn.Module):
    """Tell rings from discs, whatever the number of points."""

    def __init__(self, d_model: int = 32) -> None:
        super().__init__()
        self.lift = nn.Sequential(nn.Linear(2, d_model), nn.GELU())
        self.attention = MultiHeadAttention(d_model, 4)
        self.head = nn.Linear(d_model, 2)

    def forward(self, points: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Map points (b, n, 2) and counts (b,) to logits (b, 2)."""
        x = self.lift(points)
        x = x + self.attention(x, mask=Mask.lengths(counts))
        real = torch.arange(points.shape[1]) < counts[:, None]
        mean = torch.where(real[..., None], x, 0.0).sum(1) / counts[:, None]
        return self.head(mean)


def clouds(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw rings and discs of 6 to 24 points; what lies behind the last is padding."""
    labels = torch.randint(0, 2, (n,), generator=generator)
    angle = 6.283 * torch.rand(n, 24, generator=generator)
    radius = torch.rand(n, 24, generator=generator).sqrt()
    radius = torch.where(labels[:, None] == 1, radius, 1.0)
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    counts = torch.randint(6, 25, (n,), generator=generator)
    points[torch.arange(24) >= counts[:, None]] = 0.0
    return points, counts, labels


def main() -> None:
    """Train for a few seconds and say how it went."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = SetClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(150):
        points, counts, labels = clouds(64, generator)
        loss = cross_entropy(model(points, counts), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    points, counts, labels = clouds(512, generator)
    accuracy = (model(points, counts).argmax(-1) == labels).double().mean()
    print(f"accuracy on new clouds: {accuracy:.3f}")

    q = torch.randn(1, 4, 6, 8)
    details = attention_details(q, q, q, mask=Mask.causal(-1))
    print(f"method {details.method}: {details.reason}")
    print(f"queries that see nothing, per head: {details.empty_rows.tolist()}")


if __name__ == "__main__":
    main()
