"""What a loss was made of, filled in to [B, T] only when it is asked for, and the metrics, measured when they are read."""

from functools import cached_property

import torch
from torch import Tensor

from workers.objectives.metrics import Metrics, Reductions
from workers.objectives.moved import Moved
from workers.objectives.surrogate import Flags, Terms, TokenLoss, seen
from workers.objectives.tensors import neutral


class LossOutputs:
    """All [B, T] and 0 (or False) where a token does not count; `token_loss` carries the graph, the others do not.

    `weights` are the aggregation weights, `loss_B` [B] each row's share of the loss (without a graph), `nonfinite_rows` [B]
    the rows whose share is not finite, `metrics` those of the rows.
    """

    def __init__(
        self,
        token_loss: Tensor,
        bounded: TokenLoss,
        terms: Terms,
        log_ratio: Tensor,
        loss_B: Tensor,
        *,
        moved: Moved,
        lengths_B: Tensor,
        counts_B: Tensor,
        entropy: Tensor | None,
    ) -> None:
        self._token_loss = token_loss
        self._ratio = terms.ratio.detach()
        self._log_ratio = log_ratio
        self._advantages = terms.advantages
        self._low, self._high, self._dual = bounded.low, bounded.high, bounded.dual
        self._moved, self._lengths_B, self._counts_B, self._entropy = moved, lengths_B, counts_B, entropy
        self.weights = terms.weights
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
        return neutral(self._ratio, self._counted)

    @property
    def log_importance_ratio(self) -> Tensor:
        """Its logarithm, before the bound that keeps exp finite; 0 where masked only."""
        return neutral(self._log_ratio, self._moved.mask)

    @property
    def advantages(self) -> Tensor:
        return neutral(self._advantages, self._counted)

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

    def _flag(self, flags: Flags) -> Tensor:
        found = seen(flags)
        return torch.zeros_like(self._moved.mask) if found is None else found.bool() & self._counted

    @cached_property
    @torch.no_grad()
    def metrics(self) -> Metrics:
        """approx_kl is the KL of the old policy to the trained one (tokens come from the old one), kl/ref that of the trained
        one to the reference."""
        moved = self._moved
        measured = Reductions(self.weights, moved.dtype, counts_B=self._counts_B, lengths_B=self._lengths_B)
        metrics = measured.metrics
        metrics.add("sum", "policy/loss", self.loss_B)
        metrics.add("sum", "batch/tokens", measured.tokens_B)
        metrics.add("sum", "batch/sequences", measured.counted_B)
        metrics.add("sum", "batch/nonfinite_rows", self.nonfinite_rows)
        measured.mean("policy/ratio_mean", self._ratio)
        measured.extremes("policy/ratio", self._ratio)
        measured.fraction("policy/clip_fraction_low", seen(self._low))
        measured.fraction("policy/clip_fraction_high", seen(self._high))
        measured.fraction("policy/clip_fraction_dual", seen(self._dual))
        if moved.knows("old_log_probs"):
            measured.kl("policy/approx_kl", moved.value("old_log_probs"), sign=-1)
        if moved.knows("ref_log_probs"):
            measured.kl("kl/ref", moved.value("ref_log_probs"))
        if self._entropy is not None:
            measured.mean("policy/entropy", self._entropy)
        return metrics
