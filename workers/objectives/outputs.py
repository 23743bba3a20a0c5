"""The tensors behind a loss, expanded to [B, T] only on access, and its metrics, measured when they are read."""

from functools import cached_property

import torch
from torch import Tensor

from workers.objectives.kernels import cleared
from workers.objectives.metrics import Metrics
from workers.objectives.reductions import Reductions
from workers.objectives.step import Rows
from workers.objectives.surrogate import Terms, TokenLoss


class LossOutputs:
    """All [B, T] and 0 (or False) where a token does not count; `token_loss` carries the graph, the others do not.

    `weights` are the aggregation weights. `loss_B` [B] is each row's share of the loss (without a graph), `nonfinite_rows` [B]
    marks rows whose share is not finite.
    """

    def __init__(
        self, rows: Rows, terms: Terms, log_ratio: Tensor, bounded: TokenLoss, token_loss: Tensor, loss_B: Tensor
    ) -> None:
        self._rows, self._moved = rows, terms.moved
        self._ratio, self._log_ratio, self._advantages = terms.ratio.detach(), log_ratio.detach(), terms.advantages
        self._low, self._high, self._dual = bounded.low, bounded.high, bounded.dual
        self._token_loss = token_loss
        self.weights = rows.weights
        self.loss_B = loss_B.detach()

    @cached_property
    def nonfinite_rows(self) -> Tensor:
        return self.loss_B * 0 != 0

    @property
    def token_loss(self) -> Tensor:
        return torch.where(self._counted, self._token_loss, 0.0)

    @property
    def ratio(self) -> Tensor:
        """The importance ratio before the surrogate bounds it."""
        return cleared(self._ratio, self._counted)

    @property
    def log_importance_ratio(self) -> Tensor:
        """The logarithm of the ratio, before the bound that keeps exp finite; 0 where masked."""
        return cleared(self._log_ratio, self._rows.mask)

    @property
    def advantages(self) -> Tensor:
        return cleared(self._advantages, self._counted)

    @property
    def clipped_low(self) -> Tensor:
        return self._flag(self._low)

    @property
    def clipped_high(self) -> Tensor:
        return self._flag(self._high)

    @property
    def clipped_dual(self) -> Tensor:
        return self._flag(self._dual)

    @property
    def _counted(self) -> Tensor:
        return self.weights != 0

    def _flag(self, flags: Tensor | None) -> Tensor:
        return torch.zeros_like(self._counted) if flags is None else flags.bool() & self._counted

    @cached_property
    @torch.no_grad()
    def metrics(self) -> Metrics:
        """policy/approx_kl is KL(old || trained), as the old policy sampled the tokens; kl/ref is KL(trained || reference)."""
        rows, moved = self._rows, self._moved
        measured = Reductions(self.weights, moved.dtype, counts_B=rows.counts, lengths_B=rows.lengths)
        metrics = measured.metrics
        metrics.add("sum", "policy/loss", self.loss_B)
        metrics.add("sum", "batch/nonfinite_rows", self.nonfinite_rows)
        measured.mean("policy/ratio_mean", self._ratio)
        measured.extremes("policy/ratio", self._ratio)
        measured.fraction("policy/clip_fraction_low", self._low)
        measured.fraction("policy/clip_fraction_high", self._high)
        measured.fraction("policy/clip_fraction_dual", self._dual)
        if moved.knows("old_log_probs"):
            measured.kl("policy/approx_kl", moved.value("old_log_probs"), sign=-1)
        if moved.knows("ref_log_probs"):
            measured.kl("kl/ref", moved.value("ref_log_probs"))
        if rows.entropy is not None:
            measured.mean("policy/entropy", rows.entropy)
        return metrics
