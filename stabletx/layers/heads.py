"""Heads: from tokens to an answer for the whole sequence."""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor, nn

from stabletx import _checks
from stabletx._precision import compute_dtype
from stabletx.functional.softmax import softmax
from stabletx.layers._init import init_linear
from stabletx.packing import Packed, Plan

Pooling = Literal["mean", "first", "attention"]


@final
class ClassificationHead(nn.Module):
    """Pool the tokens of each sequence into one vector and score the classes.

    Args:
        d_model: size of a token.
        n_classes: classes.
        pooling: "mean" of the real tokens; the "first" real token; or "attention", the mean
            under learned weights.
        dropout_p: probability in [0, 1) that an entry of the pooled vector is dropped.

    Numerics: pooled in at least float32. A sequence without tokens pools to 0, so its scores
        are the bias alone.

    >>> head = ClassificationHead(4, 3)
    >>> head(torch.zeros(2, 5, 4), keep=torch.ones(2, 5, dtype=torch.bool)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self, d_model: int, n_classes: int, *, pooling: Pooling = "mean", dropout_p: float = 0.0
    ) -> None:
        super().__init__()
        _checks.check_positive("d_model", d_model)
        _checks.check_positive("n_classes", n_classes)
        _checks.check_one_of("pooling", pooling, ("mean", "first", "attention"))
        _checks.check_probability("dropout_p", dropout_p)
        self.pooling, self.dropout_p = pooling, dropout_p
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
            if keep is None or x.shape[1] == 0:
                return x[:, :1].sum(1)  # 0 where there is no token
            first = keep.to(torch.uint8).argmax(1)  # 0 where there is none: a token put to 0
            return x.take_along_dim(first[:, None, None], dim=1)[:, 0]
        if self.attend is None:
            n_tokens: int | Tensor = max(x.shape[1], 1)
            if keep is not None:
                n_tokens = keep.sum(1).clamp(min=1)[:, None, None]
            return (x / n_tokens).sum(1)  # divided first: the sum of large values may overflow
        scores = nn.functional.linear(x, self.attend.weight.to(x.dtype))[..., 0]
        weights = softmax(scores, allowed=keep)
        return (weights[..., None] * x).sum(1)

    def _scores(self, pooled: Tensor) -> Tensor:
        if self.dropout_p > 0 and self.training:
            pooled = nn.functional.dropout(pooled, self.dropout_p)
        scores: Tensor = self.out(pooled)
        return scores
