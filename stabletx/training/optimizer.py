"""What a step needs beside the model: an optimizer, a precision, weights of the classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stabletx.training.config import TrainingConfig

_BETAS = (0.9, 0.98)


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only.

    Norms, biases and other vectors are scales and offsets: pulling them towards 0 is no prior.
    """
    own = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in own if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in own if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=_BETAS, eps=1e-8, fused=True)


def autocast_dtype(config: TrainingConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products: bfloat16 where it was asked for or pays."""
    if config.precision == "auto":
        pays = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if pays else torch.float32
    return torch.bfloat16 if config.precision == "bfloat16" else torch.float32


def balanced_weights(labels: Sequence[int], n_classes: int) -> Tensor:  # (c,)
    """Weigh each class by the reverse of its share; one without rows has weight 0.

    >>> balanced_weights([0, 0, 0, 1], 2)
    tensor([0.6667, 2.0000])
    """
    counts = Counter(labels)
    whole = len(labels) / len(counts)
    return torch.tensor([whole / counts[i] if counts[i] else 0.0 for i in range(n_classes)])
