"""One more token for each row: what decoding does most, in as few operations as it takes.

It is the pass of :class:`DecoderStack` for one token a row. There every layer asks of its input
what it must know before the next one starts, and of its weights whether they are still those that
were packed. Here the weights are asked once for a generation, and the inputs once a step, when it
is over: what a kernel may have got wrong shows in a few lengths and moments that are kept on the
way. Where they leave a doubt the step has not happened, and the general way takes it.
"""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from stabletx.functional._sight import values_may_be_read
from stabletx.functional.positions import rotate
from stabletx.layers._as_made import is_as_made
from stabletx.layers._prepacked import FEWEST_ROWS, Ready
from stabletx.layers.attention import MultiHeadAttention, Rotation
from stabletx.layers.blocks import DecoderBlock, Shortcut
from stabletx.layers.cache import KeyValueCache
from stabletx.layers.feed_forward import Activation, FeedForward, bend
from stabletx.layers.heads import LanguageHead
from stabletx.layers.linear import Linear
from stabletx.layers.normalization import LayerNorm, RMSNorm
from stabletx.models._decoder_stack import DecoderStack
from stabletx.models._generation import DecoderCache
from stabletx.models._parts import Places
from stabletx.models._watched import Norm, Watched

_KINDS = (
    DecoderStack, Places, nn.ModuleList, DecoderBlock, Shortcut, MultiHeadAttention, FeedForward,
    Linear, LayerNorm, RMSNorm, LanguageHead,
)  # fmt: skip


class _Branch(NamedTuple):
    """The first and the last linear map of a branch, and the norms around it."""

    norm_in: Norm | None
    first: Ready
    last: Ready
    norm_branch: Norm | None
    norm_out: Norm | None


class _Layer(NamedTuple):
    """A block as it is for one generation."""

    attention: _Branch
    feed_forward: _Branch
    q_norm: Norm | None
    k_norm: Norm | None
    n_heads: int
    n_kv_heads: int
    scale: float
    activation: Activation
    window: int | None
    kept: KeyValueCache


@final
class OneToken:
    """Takes steps of one token a row after those in a cache; made by :meth:`of`.

    It holds for one generation: whoever changes a weight makes another.
    """

    def __init__(self, stack: DecoderStack, cache: DecoderCache, layers: list[_Layer]) -> None:
        self.stack, self.cache, self.layers = stack, cache, layers
        # Rows that oneDNN wants beside a few are added to the stream, not at each product: the same
        # ones again, so that none is unlike the others.
        is_filled = _ways(layers) == {"onednn"}
        self.n_copies = -(-FEWEST_ROWS // cache.batch_size) if is_filled else 1
        self.last_norm = Norm.of(stack.norm)
        self.head: Ready | None = None
        if _is_untouched(stack.head):
            self.head = stack.head.ready(stack.stem.embedding.tokens.weight, cache.batch_size)

    @staticmethod
    def of(stack: DecoderStack, cache: DecoderCache) -> OneToken | None:
        """Make every choice; None where only the general way will do."""
        weight, places = stack.stem.embedding.tokens.weight, stack.places
        if (
            torch.is_grad_enabled()
            or torch.is_autocast_enabled(weight.device.type)
            or not values_may_be_read(weight)
            or weight.dtype not in (torch.float32, torch.float64)
            or places.relative is not None
            or (cache.known(0) is not None and places.window is not None)
            or not _is_as_made(stack)
            or cache.batch_size == 0
        ):
            return None
        layers = _layers(stack, cache, by_onednn=False)
        if "onednn" in _ways(layers) and cache.batch_size < FEWEST_ROWS:
            layers = _layers(stack, cache, by_onednn=True)
        return OneToken(stack, cache, layers)

    def __call__(self, ids: Tensor) -> Tensor | None:  # (b, 1) -> (b, vocab_size)
        """Score what follows ``ids``; None, and nothing has happened, where there is a doubt."""
        self.stack.stem.check_length(self.cache.length + 1)
        positions, keys, _ = self.cache.place(ids, None)
        x = self.stack.stem(ids, positions)[:, 0]  # (b, m)
        b = x.shape[0]
        rotations = self.stack.places.rotations(positions)
        known = self.cache.known(keys.shape[-1])
        added = None
        if known is not None:
            added = x.new_zeros(known.shape).masked_fill_(~known, -torch.inf)[:, None, None]
        watched = Watched()
        x = self._filled(x)
        for layer in self.layers:
            x = self._attended(x, layer, watched, rotations[layer.window is not None], added)
            x = _fed_forward(x, layer, watched)
        x = watched.norm(self.last_norm, x)[:b]
        if watched.needed_no_guard():
            return self.stack.scores(x) if self.head is None else self.head(x)
        for layer in self.layers:
            layer.kept.take_back(layer.kept.length - 1)
        return None

    def _attended(
        self,
        x: Tensor,  # (n, m), of which the first b rows count
        layer: _Layer,
        watched: Watched,
        rotation: Rotation | None,  # each (b, 1, p) or (1, p)
        added: Tensor | None,  # (b, 1, 1, s)
    ) -> Tensor:  # (n, m)
        """Add to each token what its attention finds."""
        b, h, g = self.cache.batch_size, layer.n_heads, layer.n_kv_heads
        qkv = layer.attention.first(watched.norm(layer.attention.norm_in, x))
        heads = qkv[:b].view(b, h + 2 * g, -1)
        if layer.q_norm is not None or rotation is not None:
            q, k, v = torch.split(heads, [h, g, g], 1)
            q, k = watched.norm(layer.q_norm, q), watched.norm(layer.k_norm, k)
            qk = torch.cat([q, k], 1)
            heads = torch.cat([qk if rotation is None else rotate(qk, *rotation), v], 1)
        seen = watched.attend(
            heads, layer.kept, window=layer.window, added=added, scale=layer.scale
        )
        return _joined(x, self._filled(seen), layer.attention, watched)

    def _filled(self, x: Tensor) -> Tensor:  # (b, m) -> (n, m)
        return x if self.n_copies == 1 else x.repeat(self.n_copies, 1)


def _fed_forward(x: Tensor, layer: _Layer, watched: Watched) -> Tensor:  # (n, m) -> (n, m)
    """Add to each token what the feed-forward part makes of it."""
    widen = layer.feed_forward.first
    wide = widen(watched.norm(layer.feed_forward.norm_in, x))
    bent = wide if widen.then_gelu else bend(wide, layer.activation)
    return _joined(x, bent, layer.feed_forward, watched)


def _joined(x: Tensor, y: Tensor, branch: _Branch, watched: Watched) -> Tensor:
    """End a branch with its last linear map, and add it to the stream."""
    if branch.norm_branch is None:
        x = branch.last.plus(y, x)
    else:
        x = x + watched.norm(branch.norm_branch, branch.last(y))
    return watched.norm(branch.norm_out, x)


def _layers(stack: DecoderStack, cache: DecoderCache, *, by_onednn: bool) -> list[_Layer]:
    def branch(shortcut: Shortcut, first: Linear, last: Linear, then_gelu: bool) -> _Branch:
        n = cache.batch_size
        return _Branch(
            Norm.of(shortcut.norm_in),
            first.ready(n, then_gelu=then_gelu, by_onednn=by_onednn),
            last.ready(n, by_onednn=by_onednn),
            Norm.of(shortcut.norm_branch),
            Norm.of(shortcut.norm_out),
        )

    layers = []
    for i, kept in enumerate(cache.layers):
        block = stack.block(i)
        assert isinstance(block, DecoderBlock)
        attention, feed_forward = block.attention, block.feed_forward
        activation = feed_forward.activation
        layers.append(
            _Layer(
                branch(block.attention_shortcut, attention.qkv, attention.out, False),
                branch(
                    block.feed_forward_shortcut, feed_forward.widen, feed_forward.out,
                    activation == "gelu",
                ),
                Norm.of(attention.q_norm),
                Norm.of(attention.k_norm),
                attention.n_heads,
                attention.n_kv_heads,
                attention.head_dim**-0.5 if attention.scale is None else attention.scale,
                activation,
                stack.places.window if stack.is_windowed(i) else None,
                kept,
            )
        )  # fmt: skip
    return layers


def _ways(layers: list[_Layer]) -> set[str]:
    branches = [branch for layer in layers for branch in layer[:2]]
    return {ready.way for branch in branches for ready in (branch.first, branch.last)}


def _is_as_made(stack: DecoderStack) -> bool:
    """Tell whether no part of the stack was replaced, is watched or is being trained."""
    weight = stack.stem.embedding.tokens.weight
    norms = [] if stack.norm is None else [stack.norm]
    modules = (stack, stack.places, *stack.blocks.modules(), *norms)
    return all(map(_is_untouched, modules)) and all(
        type(x) is nn.Parameter and x.dtype == weight.dtype and x.device == weight.device
        for module in modules[2:]
        for x in module.parameters(recurse=False)
    )


def _is_untouched(module: nn.Module) -> bool:
    return (
        is_as_made(module, *_KINDS)
        and not module.training
        and getattr(module, "cross_attention", None) is None
        and getattr(module, "method", "auto") == "auto"
    )
