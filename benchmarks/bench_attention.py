"""Attention against torch's own function, called its fastest way, turn by turn."""

import pytest
import torch

from benchmarks.interleave import interleaved, machine
from benchmarks.workloads import attention_workloads, build
from stabletx.testing import attention_error_bound, reference_attention


def check(ours) -> None:
    """Refuse to time a wrong answer, on a small problem of the same dtype."""
    dtype = ours.dtype
    q, k, v = (torch.randn(1, 2, 33, 16).to(dtype) for _ in range(3))
    from stabletx import attention

    error = (attention(q, k, v).double() - reference_attention(q, k, v).out).abs()
    assert bool((error <= attention_error_bound(q, k, v).out).all())


@pytest.mark.parametrize("work", attention_workloads(), ids=lambda work: f"cpu-{work.name}")
def bench_attention(benchmark, work):
    ours, theirs = build(work)
    check(ours()[0])
    benchmark.group = work.name
    found = interleaved(ours, theirs, rounds=5)
    benchmark.extra_info.update(found._asdict(), machine=machine())
    benchmark.pedantic(ours, rounds=3, warmup_rounds=1)
