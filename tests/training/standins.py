"""A tiny model and tiny data, so that the loop is tested and not the models."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import torch
from torch import nn

from stabletx.data import Batch, collate


class TinyModel(nn.Module):
    """Mean of embeddings, dropout, and a linear map to two classes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(50, 8)
            self.dropout = nn.Dropout(0.2)
            self.out = nn.Linear(8, 2)

    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids) * attention_mask[..., None]
        x = x.sum(1) / attention_mask.sum(1, keepdim=True)
        return SimpleNamespace(logits=self.out(self.dropout(x)))


class TinyRows:
    """Rows of token ids; those of class 1 hold more large ids."""

    def __init__(self, n_rows: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = array("i", [i % 2 for i in range(n_rows)])
        lengths = torch.randint(2, 9, (n_rows,), generator=generator).tolist()
        self.rows = []
        for label, n in zip(self.labels, lengths, strict=True):
            low, high = (20, 50) if label else (3, 30)
            self.rows.append(torch.randint(low, high, (n,), generator=generator).tolist())
        self.lengths = [len(row) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows, *, pad_id: int = 0) -> Batch:
        return collate([self.rows[i] for i in rows], [self.labels[i] for i in rows], pad_id=pad_id)


def losses(history) -> list[tuple[int, float]]:
    """Give the loss of each step and each validation."""
    return [(e["step"], e["loss"]) for e in history if e["event"] in ("step", "validation")]
