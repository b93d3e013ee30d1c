"""Inference of an encoder on ragged batches: everybody's fastest way with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks import conversions, weights
from benchmarks.contest import OURS, Case, Contest, Outcome, Settings, hold, largest, ragged_lengths
from benchmarks.interleave import Call

TORCH, HF, XT = "nn.TransformerEncoder", "Hugging Face sdpa", "x-transformers"
ORT, CT2 = "ONNX Runtime", "CTranslate2"
HF_AUTOCAST, CT2_INT8 = "Hugging Face autocast", "CTranslate2 int8"
# Outputs are layer-normed, so their scale is 1: the largest error that is the right answer still.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.05}
ALLOWED_INT8 = 1.0
FLOAT32 = {CT2: 0.85, TORCH: 0.52, ORT: 0.33, HF: 0.30}


class Work(NamedTuple):
    """One batch for one model."""

    name: str
    sizes: weights.Sizes
    batch: int
    fill: float = 0.4
    dtype: torch.dtype = torch.float32

    @property
    def n(self) -> int:
        """Give the tokens of a padded row."""
        return self.sizes.max_seq_len


def cases(settings: Settings) -> list[Case]:
    """List the workloads."""
    if settings.is_quick:
        tiny = weights.Sizes(32, 1, 4, 16, vocab_size=50)
        works = [(Work("tiny-b2-n16-float32", tiny, 2), FLOAT32)]
        works += [(Work("tiny-b2-n16-bfloat16", tiny, 2, dtype=torch.bfloat16), {})]
    elif settings.device == "cuda":
        works = _cuda_works()
    else:
        works = _cpu_works()
    return [
        Case("encoder", w.name, _names(w, settings.device), partial(run, w), asked)
        for w, asked in works
    ]


def _cpu_works() -> list[tuple[Work, dict[str, float]]]:
    small, wide = weights.Sizes(384, 6, 12, 128), weights.Sizes(768, 2, 12, 512)
    half = torch.bfloat16
    sixteen = {CT2_INT8: 0.95, HF_AUTOCAST: 0.36}
    return [
        (Work("minilm-b8-n128-float32", small, 8), FLOAT32),
        (Work("minilm-b32-n128-float32", small, 32), FLOAT32),
        (
            Work("bert-width-b8-n512-float32", wide, 8),
            {CT2: 0.60, TORCH: 0.45, ORT: 0.33, HF: 0.21},
        ),
        (Work("minilm-b16-n128-full-float32", small, 16, fill=1.0), {"best": 0.80}),
        (Work("minilm-b1-n32-full-float32", small._replace(max_seq_len=32), 1, fill=1.0), {}),
        (Work("minilm-b8-n128-bfloat16", small, 8, dtype=half), sixteen),
        (Work("bert-width-b8-n512-bfloat16", wide, 8, dtype=half), sixteen),
    ]


def _cuda_works() -> list[tuple[Work, dict[str, float]]]:
    base, half = weights.Sizes(768, 12, 12, 512), torch.bfloat16
    return [
        (Work("bert-base-b32-n512-bfloat16", base, 32, dtype=half), {HF: 0.45}),
        (Work("bert-base-b128-n512-bfloat16", base, 128, dtype=half), {HF: 0.45}),
        (Work("bert-base-b128-n512-full-bfloat16", base, 128, fill=1.0, dtype=half), {HF: 1.0}),
    ]


def _names(work: Work, device: str) -> tuple[str, ...]:
    if device == "cuda":
        return (OURS, TORCH, HF, XT, CT2)
    if work.dtype == torch.bfloat16:
        return (OURS, TORCH, HF, HF_AUTOCAST, CT2_INT8)
    return (OURS, TORCH, HF, XT, ORT, CT2)


def run(work: Work, settings: Settings) -> Outcome:
    """Measure one workload."""
    with torch.inference_mode():
        own = build(work, settings.device)
        if settings.device == "cuda":
            own.about["waits for the GPU"] = _waits(own.makers[OURS]())
        return hold(own if settings.is_quick else own.apart("encoder", work.name), settings)


def contest(workload: str, device: str) -> Contest:
    """Build a workload by its name."""
    works = _cuda_works() if device == "cuda" else _cpu_works()
    return build(next(w for w, _ in works if w.name == workload), device)


def _waits(call: Call) -> bool:
    """Tell whether a call makes the processor wait for the GPU."""
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def build(work: Work, device: str) -> Contest:
    """Build a batch, the judge and the contestants."""
    ours = weights.encoder(work.sizes)
    own, n_heads = weights.of(ours), work.sizes.n_heads
    lengths = ragged_lengths(work.batch, work.n, work.fill)
    keep = torch.arange(work.n) < lengths[:, None]
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, work.sizes.vocab_size, keep.shape, generator=generator) * keep
    judge = weights.TorchModel(own, n_heads).to(device, torch.float64)
    expected = judge(ids.to(device), None if work.fill >= 1.0 else ~keep.to(device))

    def error(out: Any) -> float:
        out = conversions.as_tensor(getattr(out, "last_hidden_state", out))
        return largest((out.double() - expected)[keep.to(device)])

    makers = _makers(work, own, ours, ids, keep, lengths, device)
    names = _names(work, device)
    return Contest(
        makers={name: makers[name] for name in names},
        error=error,
        allowed={"": ALLOWED[work.dtype], CT2_INT8: ALLOWED_INT8},
        dtype=work.dtype,
        flops=work.sizes.flops(lengths.tolist()),
        about={"sizes": work.sizes._asdict(), "tokens": int(lengths.sum()), "slots": keep.numel()},
        device=device,
        is_inference=True,
    )


def _makers(
    work: Work, own: weights.Weights, ours: Any, ids: Any, keep: Any, lengths: Any, device: str
) -> dict[str, Callable[[], Call]]:
    n_heads, dtype = work.sizes.n_heads, work.dtype
    on = ids.to(device)
    mask = keep.to(device)

    def stabletx() -> Call:
        model = ours.to(device, dtype)
        return lambda: model(on, keep)  # the mask stays on the CPU: see Encoder.forward

    def torch_encoder() -> Call:
        model = weights.TorchModel(own, n_heads).to(device, dtype)
        padding = None if work.fill >= 1.0 else ~mask
        return lambda: model(on, padding)

    def hugging_face(is_autocast: bool) -> Call:
        model = weights.bert(own, n_heads).to(device, torch.float32 if is_autocast else dtype)
        attention_mask = None if work.fill >= 1.0 else mask.long()
        if not is_autocast:
            return lambda: model(on, attention_mask=attention_mask)

        def call() -> Any:
            with torch.autocast(device, dtype):
                return model(on, attention_mask=attention_mask)

        return call

    def x_transformers() -> Call:
        model = weights.x_transformer(own, n_heads).to(device, dtype)
        given = None if work.fill >= 1.0 else mask
        return lambda: model(on, mask=given, return_embeddings=True)

    def onnxruntime() -> Call:
        return conversions.onnxruntime_bert(own, n_heads, ids, keep.long())

    def ctranslate2(kind: str) -> Call:
        call = conversions.ctranslate2_bert(own, n_heads, kind, device)
        narrow_ids, narrow_lengths = on.int(), lengths.to(device).int()
        return lambda: call(narrow_ids, narrow_lengths)

    kind = str(dtype).removeprefix("torch.")
    return {
        OURS: stabletx,
        TORCH: torch_encoder,
        HF: partial(hugging_face, is_autocast=False),
        HF_AUTOCAST: partial(hugging_face, is_autocast=True),
        XT: x_transformers,
        ORT: onnxruntime,
        CT2: partial(ctranslate2, kind),
        CT2_INT8: partial(ctranslate2, "int8"),
    }
