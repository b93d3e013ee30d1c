"""A training step of an encoder: forward, backward and a fused AdamW, ragged batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import weights
from benchmarks.contest import OURS, Case, Contest, Outcome, Settings, hold, largest, ragged_lengths
from benchmarks.encoder import HF, TORCH, XT, Work
from benchmarks.interleave import Call

# Largest error of the gradient of the embeddings, as a share of its largest entry.
ALLOWED = 1e-3


def cases(settings: Settings) -> list[Case]:
    """List the workloads."""
    if settings.is_quick:
        works = [(Work("tiny-b2-n16-float32", weights.Sizes(32, 1, 4, 16, vocab_size=50), 2), {})]
    else:
        works = _works()
    names = (OURS, TORCH, HF, XT)
    return [Case("training", w.name, names, partial(run, w), asked) for w, asked in works]


def _works() -> list[tuple[Work, dict[str, float]]]:
    small, wide = weights.Sizes(384, 3, 12, 128), weights.Sizes(768, 1, 12, 512)
    return [
        (Work("d384-b32-n128-float32", small, 32), {"best": 0.43}),
        (Work("d768-b8-n512-float32", wide, 8), {"best": 0.33}),
    ]


def run(work: Work, settings: Settings) -> Outcome:
    """Measure one workload."""
    own = build(work, settings.device)
    return hold(own if settings.is_quick else own.apart("training", work.name), settings.fewer())


def contest(workload: str, device: str) -> Contest:
    """Build a workload by its name."""
    return build(next(w for w, _ in _works() if w.name == workload), device)


def build(work: Work, device: str) -> Contest:
    """Build a batch, the judge's gradient and the contestants' steps."""
    ours = weights.encoder(work.sizes)
    own, n_heads = weights.of(ours), work.sizes.n_heads
    own = {name: x.clone() for name, x in own.items()}  # ours is about to learn
    lengths = ragged_lengths(work.batch, work.n, work.fill)
    keep = torch.arange(work.n) < lengths[:, None]
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, work.sizes.vocab_size, keep.shape, generator=generator) * keep
    target = torch.randn(*keep.shape, work.sizes.d_model, generator=generator) * keep[..., None]
    on, mask, target = ids.to(device), keep.to(device), target.to(device)

    def loss(out: Any) -> torch.Tensor:
        return (getattr(out, "last_hidden_state", out) * target.to(out[0].dtype)).sum() / 1e3

    judge = weights.TorchModel(own, n_heads).to(device, torch.float64).train()
    loss(judge(on, ~mask)).backward()
    expected = judge.tokens.weight.grad[1:]  # row 0 is padding, which some leave out

    def error(step_result: Any) -> float:
        return largest(step_result[1:].double() - expected) / float(expected.abs().max())

    def stepped(model: Any, table: Any, forward: Call) -> Call:
        model.to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

        def step() -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss(forward()).backward()
            optimizer.step()
            return table.grad

        return step

    def stabletx() -> Call:
        return stepped(ours, ours.stem.embedding.tokens.weight, lambda: ours(on, keep))

    def torch_encoder() -> Call:
        model = weights.TorchModel(own, n_heads)
        return stepped(model, model.tokens.weight, lambda: model(on, ~mask))

    def hugging_face() -> Call:
        model = weights.bert(own, n_heads)
        model.pooler = None  # nobody learns from it
        table, given = model.embeddings.word_embeddings.weight, mask.long()
        return stepped(model, table, lambda: model(on, attention_mask=given))

    def x_transformers() -> Call:
        model = weights.x_transformer(own, n_heads)
        table = model.token_emb.emb.weight
        return stepped(model, table, lambda: model(on, mask=mask, return_embeddings=True))

    makers: dict[str, Callable[[], Call]] = {
        OURS: stabletx, TORCH: torch_encoder, HF: hugging_face, XT: x_transformers
    }  # fmt: skip
    return Contest(
        makers=makers,
        error=error,
        allowed={"": ALLOWED},
        flops=3.0 * work.sizes.flops(lengths.tolist()),
        about={"sizes": work.sizes._asdict(), "tokens": int(lengths.sum()), "slots": keep.numel()},
        device=device,
    )
