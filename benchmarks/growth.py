"""Time per token from 128 tokens a sequence to 8,192, at a fixed width and number of tokens.

A layer's linear maps cost the same for every token; attention costs in proportion to the length.
What is expected at a length is therefore the time at the shortest, with the shortest's attention
taken out and the length's own put in: torch's kernel alone, timed in the same rounds.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import weights
from benchmarks.contest import OURS, Case, Outcome, Row, Settings
from benchmarks.encoder import HF, TORCH
from benchmarks.interleave import Call, in_turns

EXPECTED, KERNEL = "expected", "attention alone (torch)"
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)


def cases(settings: Settings) -> list[Case]:
    """List the one workload."""
    lengths = (16, 32) if settings.is_quick else LENGTHS
    names = (OURS, EXPECTED, KERNEL, TORCH, HF)
    return [Case("growth", "time-per-token", names, partial(run, lengths), unit="us a token")]


def run(lengths: tuple[int, ...], settings: Settings) -> Outcome:
    """Time one layer of width 384 on max(lengths) tokens, cut into sequences of each length."""
    device = settings.device
    n_tokens = max(lengths)
    width, n_heads = (32, 4) if settings.is_quick else (384, 6)
    sizes = weights.Sizes(width, 1, n_heads, n_tokens, vocab_size=100)
    ours = weights.encoder(sizes)
    own = weights.of(ours)
    models: dict[str, Any] = {OURS: ours.to(device)}
    rows = {name: Row() for name in (OURS, EXPECTED, KERNEL, TORCH, HF)}
    models[TORCH] = weights.TorchModel(own, n_heads).to(device)
    try:
        models[HF] = weights.bert(own, n_heads).to(device)
    except ImportError:
        rows[HF].reason = "transformers is not installed"
    for n in lengths:
        for name, us in _one_length(models, n, n_tokens // n, sizes, settings.fewer()).items():
            rows[name].points[str(n)] = us
    shortest = str(min(lengths))
    for n in map(str, lengths):
        added = rows[KERNEL].points[n] - rows[KERNEL].points[shortest]
        rows[EXPECTED].points[n] = rows[OURS].points[shortest] + added
    over = [rows[OURS].points[n] / rows[EXPECTED].points[n] for n in map(str, lengths)]
    about = {"sizes": sizes._asdict(), "tokens": n_tokens, "largest_over_expected": max(over)}
    return Outcome(rows, about)


def _one_length(
    models: dict[str, Any], n: int, batch: int, sizes: weights.Sizes, settings: Settings
) -> dict[str, float]:
    device = settings.device
    ids = torch.randint(1, sizes.vocab_size, (batch, n), device=device)
    head_dim = sizes.d_model // sizes.n_heads
    q, k, v = (torch.randn(batch, sizes.n_heads, n, head_dim, device=device) for _ in range(3))
    calls: dict[str, Call] = {name: partial(model, ids) for name, model in models.items()}
    calls[KERNEL] = lambda: F.scaled_dot_product_attention(q, k, v)
    with torch.inference_mode():
        found = in_turns(calls, rounds=settings.rounds, device=device)
    return {name: 1e6 * statistics.median(t.rounds) / (batch * n) for name, t in found.items()}
