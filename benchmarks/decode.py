"""Writing tokens one at a time, greedily: a model of GPT-2's form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import conversions, weights
from benchmarks.contest import OURS, Case, Contest, Outcome, Settings, hold
from benchmarks.encoder import CT2, CT2_INT8, XT
from benchmarks.interleave import Call

HF, HF_STATIC = "Hugging Face generate", "Hugging Face static cache"
# How much less a written token may score than the best one after the same text, in float64; the
# scores' standard deviation is about 1.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 0.25}
ALLOWED_INT8 = 0.5


class Work(NamedTuple):
    """Prompts of one batch, and how much is written after them."""

    name: str
    sizes: weights.Sizes
    batch: int
    prompt: int
    n_new: int
    dtype: torch.dtype = torch.float32


def cases(settings: Settings) -> list[Case]:
    """List the workloads; on CUDA in bfloat16."""
    asked: list[dict[str, float]] = [{HF: 0.68, CT2: 1.05}, {HF: 0.48}]
    works = _works(settings.device)
    if settings.is_quick:
        tiny = weights.Sizes(32, 1, 4, 32, vocab_size=50)
        works = [Work("tiny-b2-float32", tiny, 2, 4, 4)]
        asked = [{}]
    elif settings.device == "cuda":
        asked = [{HF: 0.4}, {HF: 0.4}]
    return [
        Case("decode", w.name, names(settings), partial(run, w), own)
        for w, own in zip(works, asked, strict=True)
    ]


def _works(device: str) -> list[Work]:
    if device == "cuda":
        base, half = weights.Sizes(768, 12, 12, 512), torch.bfloat16
        return [Work(f"gpt2-b{b}-bfloat16", base, b, 32, 128, dtype=half) for b in (1, 8)]
    sizes = weights.Sizes(384, 6, 6, 256)
    return [Work(f"d384-b{b}-float32", sizes, b, 32, 128) for b in (1, 8)]


def names(settings: Settings) -> tuple[str, ...]:
    """Name the contestants; on a CPU an uncompiled static cache is slower than a growing one."""
    return (OURS, HF, HF_STATIC, XT) if settings.device == "cuda" else (OURS, HF, XT, CT2, CT2_INT8)


def run(work: Work, settings: Settings) -> Outcome:
    """Measure one workload."""
    with torch.inference_mode():
        own = build(work, settings.device)
        own.makers = {name: own.makers[name] for name in names(settings)}
        return hold(own if settings.is_quick else own.apart("decode", work.name), settings.fewer())


def contest(workload: str, device: str) -> Contest:
    """Build a workload by its name."""
    return build(next(w for w in _works(device) if w.name == workload), device)


def build(work: Work, device: str) -> Contest:
    """Build prompts, the judge and the contestants."""
    ours = weights.decoder(work.sizes)
    own, n_heads = weights.of(ours), work.sizes.n_heads
    generator = torch.Generator().manual_seed(2)
    shape = (work.batch, work.prompt)
    prompts = torch.randint(1, work.sizes.vocab_size, shape, generator=generator).to(device)
    judge = weights.TorchModel(own, n_heads).to(device, torch.float64)

    def error(written: Any) -> float:
        """Score each written token after all before it: near-ties may fall either way."""
        written = written.to(device)
        if written.shape != (work.batch, work.n_new):
            return float("inf")
        scores = judge(torch.cat([prompts, written], 1))[:, work.prompt - 1 : -1]
        return float((scores.amax(-1) - scores.gather(-1, written[..., None])[..., 0]).max())

    def stabletx() -> Call:
        model = ours.to(device, work.dtype)
        return lambda: model.generate(prompts, max_new_tokens=work.n_new)

    def hugging_face(**options: Any) -> Call:
        model = weights.gpt2(own, n_heads).to(device, work.dtype)
        mask = torch.ones_like(prompts)

        def call() -> Tensor:
            n = work.n_new
            out = model.generate(
                prompts, attention_mask=mask, max_new_tokens=n, min_new_tokens=n, do_sample=False,
                **options,
            )  # fmt: skip
            return out[:, work.prompt :]

        return call

    def x_transformers() -> Call:
        import x_transformers

        model = weights.x_transformer(own, n_heads).to(device, work.dtype)
        writer = x_transformers.AutoregressiveWrapper(model).eval()
        return lambda: writer.generate(prompts, work.n_new, temperature=0.0, cache_kv=True)

    def ctranslate2(kind: str) -> Call:
        call = conversions.ctranslate2_gpt2(own, n_heads, kind, device)
        return lambda: call(prompts, work.n_new)

    makers: dict[str, Callable[[], Call]] = {
        OURS: stabletx,
        HF: hugging_face,
        HF_STATIC: partial(hugging_face, cache_implementation="static"),
        XT: x_transformers,
        CT2: partial(ctranslate2, "float32"),
        CT2_INT8: partial(ctranslate2, "int8"),
    }
    size = work.dtype.itemsize
    d, layers = work.sizes.d_model, work.sizes.n_layers
    n_weights = layers * work.sizes.weights_of_a_layer + work.sizes.vocab_size * d
    return Contest(
        makers=makers,
        error=error,
        allowed={"": ALLOWED[work.dtype], CT2_INT8: ALLOWED_INT8},
        dtype=work.dtype,
        n_bytes=float(size * n_weights * work.n_new),
        about={"sizes": work.sizes._asdict(), "prompt": work.prompt, "new tokens": work.n_new},
        device=device,
        is_inference=True,
    )
