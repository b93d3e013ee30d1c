"""Heads: from tokens to an answer for the whole sequence."""

from __future__ import annotations

from typing import Any, Literal, final, get_args

import torch
from torch import Tensor, nn

from stabletx import _checks
from stabletx._precision import compute_dtype
from stabletx.functional.activations import gelu
from stabletx.functional.softmax import softmax
from stabletx.layers._init import init_linear
from stabletx.layers._prepacked import Prepacked, Ready
from stabletx.layers.normalization import NormKind, NormSettings, make_norm
from stabletx.packing import Packed, Plan

Pooling = Literal["mean", "first", "attention"]
HeadActivation = Literal["tanh", "relu", "gelu", "gelu_tanh", "silu"]


@final
class Hidden(nn.Module):
    """Map vectors once more before they are scored: linear, bent, normed.

    Args:
        d_in: size of a vector.
        d_out: size of the result.
        activation: "tanh", "relu", "gelu", "gelu_tanh" or "silu"; None: the map is linear.
        norm: of the result; None: none.
        use_bias: whether the linear map has one.

    >>> Hidden(4, 6, activation="tanh")(torch.zeros(2, 4)).shape
    torch.Size([2, 6])
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        activation: HeadActivation | None,
        norm: NormKind | NormSettings | None = None,
        use_bias: bool = True,
    ) -> None:
        super().__init__()
        if activation is not None:
            _checks.check_one_of("activation", activation, get_args(HeadActivation))
        self.activation = activation
        self.linear = nn.Linear(d_in, d_out, use_bias)
        self.norm = None if norm is None else make_norm(norm, d_out)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        init_linear(self.linear, self.linear.in_features)

    def forward(self, x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        """Map each vector."""
        x = self.linear(x)
        if self.activation in ("gelu", "gelu_tanh"):
            x = gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        elif self.activation is not None:
            bend = {"tanh": torch.tanh, "relu": torch.relu, "silu": nn.functional.silu}
            x = bend[self.activation](x)
        return x if self.norm is None else self.norm(x)


@final
class ClassificationHead(nn.Module):
    """Pool the tokens of each sequence into one vector and score the classes.

    Args:
        d_model: size of a token.
        n_classes: classes.
        pooling: "mean" of the real tokens; the "first" real token; or "attention", the mean
            under learned weights.
        activation: of a hidden layer between the pooled vector and the scores, with ``norm`` and
            ``use_bias``; None: there is no such layer. See :class:`Hidden`.
        norm: of the hidden layer.
        use_bias: of the hidden layer's linear map.
        dropout_p: probability in [0, 1) that an entry of the vector that is scored is dropped.

    Numerics: pooled in at least float32. A sequence without tokens pools to 0, so its scores
        are the bias alone.

    >>> head = ClassificationHead(4, 3)
    >>> head(torch.zeros(2, 5, 4), keep=torch.ones(2, 5, dtype=torch.bool)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        d_model: int,
        n_classes: int,
        *,
        pooling: Pooling = "mean",
        activation: HeadActivation | None = None,
        norm: NormKind | NormSettings | None = None,
        use_bias: bool = True,
        dropout_p: float = 0.0,
    ) -> None:
        super().__init__()
        _checks.check_positive("d_model", d_model)
        _checks.check_positive("n_classes", n_classes)
        _checks.check_one_of("pooling", pooling, ("mean", "first", "attention"))
        _checks.check_probability("dropout_p", dropout_p)
        self.pooling, self.dropout_p = pooling, dropout_p
        self.hidden = (
            None
            if activation is None
            else Hidden(d_model, d_model, activation=activation, norm=norm, use_bias=use_bias)
        )
        self.attend = nn.Linear(d_model, 1, bias=False) if pooling == "attention" else None
        self.out = nn.Linear(d_model, n_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew; attention starts as the mean."""
        init_linear(self.out, self.out.in_features)
        if self.attend is not None:
            nn.init.zeros_(self.attend.weight)

    def forward(
        self,
        x: Tensor | Packed,  # (b, t, m)
        *,
        keep: Tensor | None = None,  # (b, t) bool, True = a real token
    ) -> Tensor:  # (b, c)
        """Score the classes of each sequence.

        Raises:
            TypeError: if ``keep`` is not boolean.
            ValueError: for a wrong shape, or ``keep`` beside a packed batch.
        """
        if isinstance(x, Packed):
            _checks.check_all_none({"keep": keep}, "x packed", "Its lengths say it.")
            _checks.check_lengths(x.lengths, x.tokens)  # may have been written to
            plan = Plan.of_lengths(x.lengths, x.tokens.device)
            return self.of_plan(plan.pack(x.tokens), plan)
        _checks.check_axes("x", x, "b t m")
        if keep is not None:
            _checks.check_bool("keep", keep)
            _checks.check_same("shape", "keep", tuple(keep.shape), "x", tuple(x.shape[:2]))
        return self._scores(self._pooled(x, keep))

    def of_plan(self, tokens: Tensor, plan: Plan) -> Tensor:  # (n_tokens, m) -> (b, c)
        """Score the classes of a batch whose tokens stand in the plan's order."""
        pooled = []
        for start, n_rows, length in plan.runs:
            run = tokens[start : start + n_rows * length]
            pooled.append(self._pooled(run.view(n_rows, length, tokens.shape[1]), None))
        together = torch.cat(pooled) if pooled else tokens.new_zeros(0, tokens.shape[1])
        return self._scores(together.index_select(0, plan.rank))

    def _pooled(self, x: Tensor, keep: Tensor | None) -> Tensor:  # (b, t, m) -> (b, m)
        work = x.to(compute_dtype(x.dtype))
        if keep is not None:
            # What lies at padding is left out by selection: it may be anything, NaN too.
            work = torch.where(keep[..., None], work, 0.0)
        return self._weighted(work, keep).to(x.dtype)

    def _weighted(self, x: Tensor, keep: Tensor | None) -> Tensor:
        if self.pooling == "first":
            return _first(x, keep)
        if self.attend is None:
            n_tokens: int | Tensor = max(x.shape[1], 1)
            if keep is not None:
                n_tokens = keep.sum(1).clamp(min=1)[:, None, None]
            return (x / n_tokens).sum(1)  # divided first: the sum of large values may overflow
        scores = nn.functional.linear(x, self.attend.weight.to(x.dtype))[..., 0]
        weights = softmax(scores, allowed=keep)
        return (weights[..., None] * x).sum(1)

    def _scores(self, pooled: Tensor) -> Tensor:
        if self.hidden is not None:
            pooled = self.hidden(pooled)
        if self.dropout_p > 0 and self.training:
            pooled = nn.functional.dropout(pooled, self.dropout_p)
        scores: Tensor = self.out(pooled)
        return scores


@final
class Pooler(nn.Module):
    """Make one vector of each sequence from its first real token, as BERT does.

    Args:
        d_model: size of a token.
        activation: of the map that follows.

    >>> Pooler(4)(torch.zeros(2, 5, 4)).shape
    torch.Size([2, 4])
    """

    def __init__(self, d_model: int, *, activation: HeadActivation = "tanh") -> None:
        super().__init__()
        self.hidden = Hidden(d_model, d_model, activation=activation)

    def forward(self, x: Tensor, *, keep: Tensor | None = None) -> Tensor:  # (b, t, m) -> (b, m)
        """Pool; ``keep`` (b, t) is True at real tokens."""
        if keep is not None:
            x = torch.where(keep[..., None], x, 0.0)
        pooled: Tensor = self.hidden(_first(x, keep))
        return pooled

    def of_plan(self, tokens: Tensor, plan: Plan) -> Tensor:  # (n_tokens, m) -> (b, m)
        """Pool a batch whose tokens stand in the plan's order."""
        rows = [
            _first(tokens[start : start + n * length].view(n, length, tokens.shape[1]), None)
            for start, n, length in plan.runs
        ]
        together = torch.cat(rows) if rows else tokens.new_zeros(0, tokens.shape[1])
        pooled: Tensor = self.hidden(together.index_select(0, plan.rank))
        return pooled


@final
class LanguageHead(nn.Module):
    """Score the vocabulary for each token.

    Without options it holds no weight: the scores are products with the embedding table.

    Args:
        d_model: size of a token.
        vocab_size: scores per token.
        d_embedding: width of the table, where it is not ``d_model``; a linear map leads there.
        activation: makes that map a hidden layer, with ``norm`` and ``use_bias``.
        norm: of the hidden layer.
        use_bias: of the hidden layer's linear map.
        is_tied: score with the embedding table, not with a table of its own.
        has_bias: add a learned offset to each score.
        scale: factor on the scores, before the offset.

    >>> LanguageHead(4, 9)(torch.zeros(2, 4), torch.zeros(9, 4)).shape
    torch.Size([2, 9])
    """

    # More than eight arguments: a head is where a model's choices meet.
    def __init__(
        self,
        d_model: int,
        vocab_size: int,
        *,
        d_embedding: int | None = None,
        activation: HeadActivation | None = None,
        norm: NormKind | NormSettings | None = None,
        use_bias: bool = True,
        is_tied: bool = True,
        has_bias: bool = False,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        width = d_model if d_embedding is None else d_embedding
        needs_hidden = activation is not None or d_embedding is not None
        self.hidden = (
            Hidden(d_model, width, activation=activation, norm=norm, use_bias=use_bias)
            if needs_hidden
            else None
        )
        self.weight = None if is_tied else nn.Parameter(torch.empty(vocab_size, width))
        self.bias = nn.Parameter(torch.empty(vocab_size)) if has_bias else None
        self.scale = scale
        self._prepacked = Prepacked()  # as for Linear
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        if self.weight is not None:
            nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:  # (..., m), (v, m) -> (..., v)
        """Score each token; ``table`` is that of the embeddings, which a tied head reads."""
        if self.hidden is not None:
            x = self.hidden(x)
        if self.scale != 1.0:
            x = x * self.scale
        weight = self._table(table)
        # Behind a hidden layer scores are results, as of masked tokens, and oneDNN's sums round up
        # to 1.7 times as coarsely as torch's; a decoder only takes the largest, once a token.
        is_quick = self.hidden is None and not self.training
        out = self._prepacked.apply(x, weight, self.bias) if is_quick else None
        return nn.functional.linear(x, weight, self.bias) if out is None else out

    def ready(self, table: Tensor, n_rows: int) -> Ready | None:
        """Choose how so many rows are scored; None where the scores are more than products."""
        if self.training or self.hidden is not None or self.scale != 1.0:
            return None
        weight = self._table(table)
        return self._prepacked.ready(weight[:1].expand(n_rows, -1), weight, self.bias)

    def _table(self, table: Tensor) -> Tensor:
        return table if self.weight is None else self.weight

    def _load_from_state_dict(self, *args: Any) -> None:
        self._prepacked.forget()
        super()._load_from_state_dict(*args)


def _first(x: Tensor, keep: Tensor | None) -> Tensor:  # (b, t, m) -> (b, m)
    if keep is None or x.shape[1] == 0:
        return x[:, :1].sum(1)  # 0 where there is no token
    first = keep.to(torch.uint8).argmax(1)  # 0 where there is none: a token put to 0
    index = first[:, None, None].expand(-1, -1, x.shape[2])
    return x.gather(1, index)[:, 0]  # take_along_dim cannot be exported with open axes
