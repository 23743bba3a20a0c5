"""What a loss was made of, filled in to [B, T] only when it is asked for, and the metrics that are always on."""

from collections.abc import Mapping

import torch
from torch import Tensor

from workers.objectives.metrics import Metrics, Reductions
from workers.objectives.surrogate import Terms, TokenLoss
from workers.objectives.tensors import neutral


class LossOutputs:
    """All [B, T] and 0 (or False) where a token does not count; `token_loss` carries the graph, the others do not.

    `weights` are the aggregation weights, `nonfinite_rows` [B] the rows whose loss is not finite, `metrics` those of the rows.
    """

    def __init__(
        self,
        token_loss: Tensor,
        terms: Terms,
        log_ratio: Tensor,
        bounded: TokenLoss,
        mask: Tensor,
        weights: Tensor,
        nonfinite_rows: Tensor,
    ) -> None:
        self._token_loss = token_loss
        self._terms = terms
        self._log_ratio = log_ratio
        self._bounded = bounded
        self._mask = mask
        self.weights = weights
        self.nonfinite_rows = nonfinite_rows
        self.metrics = Metrics()

    @property
    def token_loss(self) -> Tensor:
        return self._filled(self._token_loss)

    @property
    def ratio(self) -> Tensor:
        """The importance ratio before the surrogate bounds it."""
        return self._filled(self._terms.ratio.detach())

    @property
    def log_importance_ratio(self) -> Tensor:
        """Its logarithm, before the bound that keeps exp finite; 0 where masked only."""
        return neutral(self._log_ratio, self._mask)

    @property
    def advantages(self) -> Tensor:
        return self._filled(self._terms.advantages)

    @property
    def clipped_low(self) -> Tensor:
        return self._flag(self._bounded.low)

    @property
    def clipped_high(self) -> Tensor:
        return self._flag(self._bounded.high)

    @property
    def clipped_dual(self) -> Tensor:
        return self._flag(self._bounded.dual)

    def _filled(self, values: Tensor) -> Tensor:
        return neutral(values, self._terms.mask)

    def _flag(self, flags: Tensor | None) -> Tensor:
        return torch.zeros_like(self._terms.mask) if flags is None else flags & self._terms.mask

    @torch.no_grad()
    def measure(self, loss: Tensor, known: Mapping[str, Tensor], entropy: Tensor | None) -> None:
        """Fill `metrics`. approx_kl is the KL of the old policy to the trained one (tokens come from the old one), kl/ref that
        of the trained one to the reference."""
        terms, bounded = self._terms, self._bounded
        measured = Reductions(terms.mask, loss.dtype)
        self.metrics = measured.metrics
        self.metrics.add("sum", "policy/loss", loss)
        self.metrics.add("sum", "batch/tokens", measured.tokens)
        self.metrics.add("sum", "batch/sequences", measured.rows)
        self.metrics.add("sum", "batch/nonfinite_rows", self.nonfinite_rows.sum())
        measured.mean("policy/ratio_mean", terms.ratio)
        measured.extremes("policy/ratio", terms.ratio)
        measured.fraction("policy/clip_fraction_low", bounded.low)
        measured.fraction("policy/clip_fraction_high", bounded.high)
        measured.fraction("policy/clip_fraction_dual", bounded.dual)
        if "old_log_probs" in known:
            measured.kl("policy/approx_kl", known["old_log_probs"] - terms.log_probs)
        if "ref_log_probs" in known:
            measured.kl("kl/ref", terms.log_probs - known["ref_log_probs"])
        if entropy is not None:
            measured.mean("policy/entropy", entropy)
