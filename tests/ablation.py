"""Take away one guard at a time and count what goes wrong: every guard is needed.

``python -m tests.ablation`` prints the table of docs/numerics.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from stabletx import Mask
from stabletx.functional import _extended, _guards, attention, fused
from stabletx.functional._sight import Sight
from tests.hard_cases import DTYPES, IMPLEMENTATIONS, SITUATIONS, verdict
from tests.ways import METHODS


def _none_hot(problem: _guards.Problem, *_: object) -> Tensor:
    return torch.zeros(problem.q.shape[:3], dtype=torch.bool)


def _beyond_kernel_only(problem: _guards.Problem, sight: Sight, limit: float) -> Tensor:
    if limit == _extended.ROOM:
        return _none_hot(problem)
    return _rows_beyond(problem, sight, limit)


_rows_beyond = _guards.rows_beyond

# guard -> (what is patched, by what)
GUARDS: dict[str, list[tuple[object, str, object]]] = {
    "the first look at the magnitudes": [(_guards, "within_limits", lambda problem: True)],
    "0 where no query looks": [(Sight, "keys_with_a_row", lambda self: None)],
    "NaN put back where it was attended": [(_guards.Poison, "apply", lambda self, out, p: out)],
    "hot rows in float64": [(_guards, "hot_rows", _none_hot)],
    "scaled exponents for float64": [(_guards, "rows_beyond", _beyond_kernel_only)],
    "large keys kept from cool rows": [(_guards, "cooled", lambda problem, hot, limit: problem)],
    "the last select of empty rows": [(Sight, "rows_with_a_key", lambda self: None)],
    "16-bit inputs computed in float32": [
        (fused, "compute_dtype", lambda dtype: dtype),
        (attention, "compute_dtype", lambda dtype: dtype),
    ],
}


@contextmanager
def without(guard: str) -> Iterator[None]:
    """Run without one guard."""
    with ExitStack() as stack:
        for owner, name, other in GUARDS[guard]:
            stack.enter_context(patch.object(owner, name, other))
        yield


def wrong(method: str = "auto") -> list[tuple[str, str]]:
    """List the hard cases that come out wrong, as (situation, dtype)."""
    run: Callable[..., Tensor] = IMPLEMENTATIONS[f"stabletx {method}"]
    return [
        (name, str(dtype).removeprefix("torch."))
        for name in SITUATIONS
        for dtype in DTYPES
        if verdict(run, name, dtype)
    ]


def _seen_parts(
    method: str, q: Tensor, k: Tensor, v: Tensor, mask: Mask, rows: int
) -> list[Tensor]:
    """Give the output and the gradient of q in the first rows, and those of k and v if all."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = IMPLEMENTATIONS[f"stabletx {method}"](*leaves, mask, None, 0.25)
    grads = torch.autograd.grad(out, leaves, out.detach().sign())
    parts = [out.detach()[:, :, :rows], grads[0][:, :, :rows]]
    return parts if rows < q.shape[2] else [*parts, *grads[1:]]


def moved_bits() -> list[tuple[str, str]]:
    """List the places whose content moves a bit although nobody, or no earlier row, looks."""
    found = []
    for dtype in DTYPES:
        largest = torch.finfo(dtype).max
        q, k, v = (x.to(dtype) for x in torch.randn(3, 1, 2, 24, 16, dtype=torch.float64))
        hidden = Mask.padding((torch.arange(24) < 20)[None])
        causal = Mask.causal()
        for name, mask, rows in (("behind the mask", hidden, 24), ("the future", causal, 20)):
            for method in METHODS:
                k2, v2 = k.clone(), v.clone()
                k2[:, :, 20:], v2[:, :, 20:] = largest, -largest
                clean = _seen_parts(method, q, k, v, mask, rows)
                other = _seen_parts(method, q, k2, v2, mask, rows)
                if not all(map(torch.equal, clean, other)):
                    where = f"{dtype}, {method}".removeprefix("torch.")
                    found.append((f"{name} moves a bit", where))
    return found


def main() -> None:
    """Print the table."""
    print("| without | wrong of 88 | bits moved, of 32 | for example |")
    print("|---|---|---|---|")
    print(f"| nothing | {len(wrong())} | {len(moved_bits())} | |")
    for guard in GUARDS:
        with without(guard):
            cases, bits = wrong(), moved_bits()
        print(f"| {guard} | {len(cases)} | {len(bits)} | {', '.join((cases + bits)[0])} |")


if __name__ == "__main__":
    main()
