"""stabletx as the attention of Hugging Face models: one call, and then a name.

transformers asks two functions of a backend: :func:`attend` computes, and :func:`make_mask` says
who may attend to whom. The mask is a plain tensor, which models may slice and move as they like;
a note on it holds the :class:`stabletx.Mask` that it was written from, so that padding and bands
cost less. A tensor without the note, or changed since, is read as it stands.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from stabletx._checks import check_axes, must
from stabletx.functional._sight import values_may_be_read
from stabletx.functional.attention import attention, attention_details
from stabletx.masks import Mask

_NOTE = "_stabletx_mask"
_Rule = Any  # a function of four indices, which transformers types as of ints


def register(name: str = "stabletx") -> None:
    """Make ``attn_implementation=name`` mean this library's attention, in every later model.

    Args:
        name: any identifier that is not a backend of transformers itself.

    Raises:
        ImportError: if transformers is not installed.
        ValueError: for a name that transformers would take for something else.

    Numerics: as :func:`stabletx.attention`. A blocked pair has weight exactly 0, so a row of
        padding alone gives 0, where eager attention gives the mean of the values.

    >>> register()  # then AutoModel.from_pretrained(folder, attn_implementation="stabletx")
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        instead = "Run: pip install 'stabletx[huggingface]'."
        raise ImportError(must("transformers", "be installed", "nothing", instead)) from error
    known = AttentionInterface._global_mapping.get(name)
    if not name.isidentifier() or "flash" in name or name == "eager" or known not in (None, attend):
        rule = "be an identifier without 'flash' that names no backend of transformers"
        raise ValueError(must("name", rule, repr(name), 'Leave it at "stabletx".'))
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, make_mask)


# More than eight arguments: transformers passes them all by name.
def attend(
    module: nn.Module,
    query: Tensor,  # (b, h, t, d)
    key: Tensor,  # (b, g, s, d)
    value: Tensor,  # (b, g, s, e)
    attention_mask: Tensor | None,  # bool, True = may attend; or float, added; (b|1, h|1, t|1, s)
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # (h,)
    position_bias: Tensor | None = None,  # (b|1, h|1, t, s)
    indices: Tensor | None = None,  # (b, t, n), int
    output_attentions: bool = False,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as a backend of transformers.

    Args:
        module: the layer that asks; knows whether it is training.
        query: queries.
        key: keys; grouped heads stay grouped.
        value: values.
        attention_mask: None sees everything, as eager attention has it.
        dropout: probability that a weight is dropped; torch's generator draws.
        scaling: factor on the products.
        is_causal: if given as True beside no mask, query ``i`` sees keys up to ``i``.
        softcap: bounds the scores.
        s_aux: sinks, a score a head that joins each row's denominator.
        position_bias: added to the scaled scores.
        indices: the keys that each query may see, picked by the model.
        output_attentions: return the weights too, those before dropout.
        others: what concerns other backends.

    Returns:
        The output (b, t, h, e), and the weights (b, h, t, s) or None.

    Raises:
        ValueError: for a paged cache or keys picked by blocks, which this backend cannot read.
    """
    for argument in ("cache", "block_indices"):
        if others.get(argument) is not None:
            given = type(others[argument]).__name__
            instead = 'Load the model with attn_implementation="sdpa".'
            raise ValueError(must(argument, "be None in this backend", given, instead))
    q, k, v = _alike(query, key, value)
    mask, bias = _read_mask(attention_mask)
    if mask is None and is_causal and q.shape[2] > 1:
        mask = Mask.causal(offset=0)
    if indices is not None:
        picked = _picked(indices, k.shape[2])
        mask = picked if mask is None else mask & picked
    if position_bias is not None:
        bias = position_bias if bias is None else position_bias + bias
    arguments: dict[str, Any] = {
        "mask": mask, "bias": bias, "scale": scaling, "softcap": softcap, "sinks": s_aux,
        "dropout_p": dropout, "training": module.training,
    }  # fmt: skip
    if output_attentions:
        details = attention_details(q, k, v, weights=True, **arguments)
        return details.out.transpose(1, 2).contiguous(), details.weights
    return attention(q, k, v, **arguments).transpose(1, 2).contiguous(), None


# More than eight arguments: transformers passes them all by name.
def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,  # int, or () with a static cache
    kv_offset: int = 0,
    mask_function: _Rule | None = None,
    attention_mask: Tensor | None = None,  # (b, n) bool
    use_vmap: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    config: Any = None,
    **others: Any,
) -> Tensor:  # (b, 1, t, s)
    """Write the mask of a forward pass, as the mask function of a backend of transformers.

    Args:
        batch_size: rows.
        q_length: tokens that ask.
        kv_length: tokens that are asked, those in a cache included.
        q_offset: position of the first query.
        kv_offset: position of the first key.
        mask_function: transformers' own rule of four indices; None is causal.
        attention_mask: True = a real token.
        use_vmap: whether the rule takes single indices only.
        dtype: of a mask that is a float.
        device: where.
        config: of the model that asks.
        others: what concerns other backends.

    Returns:
        Bool, True = may attend, for models that transformers declares fit for such masks; for
        others float, 0 or the most negative number, so that a layer that computes attention
        itself reads it as it reads eager attention's. Never left out: without a mask, every query
        sees every key.

    Raises:
        ValueError: for a model that would not use this attention at all.
    """
    from transformers import masking_utils

    is_compiling = torch.compiler.is_compiling()
    takes_booleans = not is_compiling and _takes_booleans(type(config).__module__)
    rule = masking_utils.causal_mask_function if mask_function is None else mask_function
    keep = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    keep = None if keep is None else keep[:, kv_offset : kv_offset + kv_length]
    if keep is not None and values_may_be_read(keep) and bool(keep.all()):
        attention_mask = keep = None  # nothing is padding

    def written() -> Tensor:
        # Where padding is all there is, queries are alike and stay one, as a view without memory.
        allowed: Any
        if rule is masking_utils.bidirectional_mask_function:
            seen = torch.ones(1, 1, dtype=torch.bool, device=device) if keep is None else keep
            allowed = seen[:, None, None]
        else:
            allowed = masking_utils.sdpa_mask(
                batch_size, q_length, kv_length, q_offset, kv_offset, rule, attention_mask,
                allow_is_causal_skip=False, use_vmap=use_vmap, device=device,
            )  # fmt: skip
        if not takes_booleans:
            blocked = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=device)
            allowed = torch.where(allowed, torch.zeros_like(blocked), blocked)
        spread: Tensor = allowed.expand(batch_size, 1, q_length, kv_length)
        return spread

    if is_compiling:
        return written()
    with torch.inference_mode(mode=False):  # a tensor made there does not count its changes
        pairs = written()
    mask = _as_mask(rule, q_offset - kv_offset) if isinstance(q_offset, int) else None
    if mask is not None:
        mask = mask if keep is None else mask & Mask.padding(keep)
    elif not takes_booleans:
        mask = Mask.dense(pairs == 0)
    if mask is not None:
        setattr(pairs, _NOTE, (mask, pairs._version))
    return pairs


def _as_mask(rule: _Rule, offset: int) -> Mask | None:
    """Say a rule of transformers as a mask of ours, or None where it has no such form."""
    from transformers import masking_utils

    if rule is masking_utils.bidirectional_mask_function:
        return Mask.everything()
    if rule is masking_utils.causal_mask_function:
        return Mask.causal(offset)
    if rule.__module__ != masking_utils.__name__:
        return None
    # The other rules are closures; their maker and what they enclose say which.
    enclosed = inspect.getclosurevars(rule).nonlocals
    match rule.__qualname__.partition(".")[0]:
        case "sliding_window_overlay":
            return Mask.window(left=enclosed["sliding_window"] - 1, offset=offset)
        case "sliding_window_bidirectional_overlay":
            width = enclosed["sliding_window"]
            return Mask.window(left=width, right=width, offset=offset)
        case "and_masks":
            parts = [_as_mask(part, offset) for part in enclosed["mask_functions"]]
            known = [part for part in parts if part is not None]
            return functools.reduce(Mask.__and__, known) if len(known) == len(parts) else None
    return None


def _read_mask(attention_mask: Tensor | None) -> tuple[Mask | None, Tensor | None]:
    """Split what a model hands on into who may attend and what is added to the scores."""
    if attention_mask is None:
        return None, None
    check_axes("attention_mask", attention_mask, "b h t s", "Pass (b, s) to the model instead.")
    mask, version = getattr(attention_mask, _NOTE, (None, None))
    if mask is not None and attention_mask._version == version:
        return mask, None
    if not attention_mask.is_floating_point():
        return Mask.dense(attention_mask), None
    # Hugging Face blocks with the most negative number of the dtype, and sums of several.
    blocked = attention_mask <= torch.finfo(attention_mask.dtype).min / 2
    return Mask.dense(~blocked), attention_mask.masked_fill(blocked, 0.0)


def _picked(indices: Tensor, n_keys: int) -> Mask:  # (b, t, n)
    none = indices.new_zeros((*indices.shape[:2], n_keys), dtype=torch.bool)
    return Mask.dense(none.scatter(-1, indices.long(), True)[:, None])


def _alike(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give the three one dtype, that of the values under autocast, and one batch size."""
    # Rotary positions may leave queries and keys in float32 where autocast made the values 16-bit.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if query.shape[0] == 1:
        query = query.expand(key.shape[0], -1, -1, -1)
    return query, key, value


@functools.cache
def _takes_booleans(module: str) -> bool:
    """Tell whether transformers declares a model fit for boolean masks, given its configuration's.

    A model that has an attention of its own and asks no backend is refused.
    """
    home = sys.modules.get(module.replace("configuration_", "modeling_"))
    if home is None:
        return False
    classes = [own for own in vars(home).values() if inspect.isclass(own)]
    for own in classes:
        is_layer = issubclass(own, nn.Module) and own.__module__ == home.__name__
        asks = hasattr(home, "ALL_ATTENTION_FUNCTIONS")
        if is_layer and "Attention" in own.__name__ and not asks:
            rule = f"be 'eager' for {own.__name__}, which asks no backend"
            instead = 'Load the model with attn_implementation="eager".'
            raise ValueError(must("attn_implementation", rule, "a backend", instead))
    return any(getattr(own, "_supports_sdpa", False) for own in classes)
