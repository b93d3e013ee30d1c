"""Attentions with a ready name, loaded when asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from stabletx.testing.adapters import Adapted, huggingface, joined_mask, mha, sdpa_style


class Unavailable(Exception):
    """An attention is not there to be asked; the message says why."""


def _sdpa(backend: str | None, name: str) -> Adapted:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    plain = torch.nn.functional.scaled_dot_product_attention

    def call(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if backend is None:
            return plain(q, k, v, **options)
        mask = options.get("attn_mask")
        if backend != "MATH" and mask is not None and mask.requires_grad:
            raise NotImplementedError("this kernel has no gradient for its mask")
        try:
            with sdpa_kernel([getattr(SDPBackend, backend)]):
                return plain(q, k, v, **options)
        except RuntimeError as error:
            if "No available kernel" in str(error):
                raise NotImplementedError("no such kernel for these inputs") from error
            raise

    return sdpa_style(call, name)


def _flex() -> Adapted:
    from torch.nn.attention.flex_attention import flex_attention

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        scale: float | None = None,
    ) -> Any:
        shape = (*q.shape[:3], k.shape[2])
        added = joined_mask(mask, bias)
        full = None if added is None else added.expand(shape)

        def modify(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            assert full is not None
            value = full[b, h, i, j]
            if full.dtype == torch.bool:
                return torch.where(value, score, -torch.inf)
            return score + value

        grouped = q.shape[1] != k.shape[1]
        return flex_attention(
            q, k, v, score_mod=None if full is None else modify, scale=scale, enable_gqa=grouped
        )

    return Adapted(call, "torch:flex", ("bias",))


def _huggingface(kind: str) -> Adapted:
    if kind == "eager":
        module = _load("transformers.models.llama.modeling_llama", "transformers")
        return huggingface(module.eager_attention_forward, additive=True)
    module = _load("transformers.integrations.sdpa_attention", "transformers")
    return huggingface(module.sdpa_attention_forward)


def _x_transformers() -> Adapted:
    attend = _load("x_transformers.attend", "x-transformers").Attend

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Any:
        own = scale if scale is not None else q.shape[3] ** -0.5
        layer = attend(heads=q.shape[1], scale=own)
        given = None if mask is None else mask.expand(q.shape[0], -1, -1, -1)
        return layer(q, k, v, mask=given)[0]

    return Adapted(call, "x-transformers")


def _stabletx() -> Adapted:
    module = _load("stabletx", "stabletx")

    def call(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, **options: Any) -> Any:
        if not return_lse:
            return module.attention(q, k, v, **options)
        details = module.attention_details(q, k, v, **options)
        return details.out, details.lse

    supports = ("bias", "softcap", "sinks", "lse", "cache", "training", "higher")
    return Adapted(call, "stabletx", supports)


_MAKERS: dict[str, Callable[[], Adapted]] = {
    "torch:sdpa": lambda: _sdpa(None, "torch:sdpa"),
    "torch:sdpa-math": lambda: _sdpa("MATH", "torch:sdpa-math"),
    "torch:sdpa-flash": lambda: _sdpa("FLASH_ATTENTION", "torch:sdpa-flash"),
    "torch:mha": mha,
    "torch:flex": _flex,
    "huggingface:eager": lambda: _huggingface("eager"),
    "huggingface:sdpa": lambda: _huggingface("sdpa"),
    "x-transformers": _x_transformers,
    "stabletx": _stabletx,
}
KNOWN = tuple(_MAKERS)


def known_attention(name: str) -> Callable[..., object]:
    """Return an attention by its ready name, or by ``package.module:function``.

    Args:
        name: one of :data:`KNOWN`, or where to import a callable from.

    Returns:
        A callable that :func:`check_attention` can ask.

    Raises:
        Unavailable: what it needs is not installed, or there is nothing of that name.

    >>> known_attention("torch:sdpa").name
    'torch:sdpa'
    """
    if name in _MAKERS:
        made = _MAKERS[name]()
        return Adapted(made.call, name, made.supports, made.lacks, known_as=name)
    module, _, function = name.partition(":")
    if not function:
        listed = ", ".join(KNOWN)
        raise Unavailable(f"{name} is neither package.module:function nor one of {listed}.")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"{name} cannot be imported: {error}.") from error
    if not callable(found):
        raise Unavailable(f"{name} is not callable.")
    return found  # type: ignore[no-any-return]


def _load(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise Unavailable(f"{package} is not installed ({error}).") from error
