"""Statistics of each row of a batch, written into Metrics."""

from functools import cached_property

import torch
from torch import Tensor

from workers.objectives import kernels
from workers.objectives.metrics import Metrics


class Reductions:
    """Sums, extremes and fractions over the counted tokens of each row of a batch, written into Metrics.

    `mask_B_T` is boolean, or weights that are not 0 where a token counts. Values are [B, T], or [B, 1] if all tokens of a
    sequence share one; tokens that do not count may have any value. Temporaries have the size of a few blocks of rows.
    """

    def __init__(
        self,
        mask_B_T: Tensor,
        dtype: torch.dtype,
        metrics: Metrics | None = None,
        counts_B: Tensor | None = None,
        lengths_B: Tensor | None = None,
    ) -> None:
        """`counts_B`: the number of counted tokens of each row, if known. `lengths_B`: the number of tokens whose differences
        may be other than 0. If the two are equal, `kl` needs no mask."""
        self.metrics = Metrics() if metrics is None else metrics
        self._mask, self.dtype = mask_B_T, dtype
        self.tokens_B = (kernels.tokens_of(self.mask) if counts_B is None else counts_B).to(dtype)
        self.counted_B = self.tokens_B > 0
        self.nothing_B = torch.zeros_like(self.tokens_B)
        self.all_counted = lengths_B is not None and kernels.surely_equal(lengths_B, self.tokens_B)

    @cached_property
    def mask(self) -> Tensor:
        return kernels.as_mask(self._mask, self.dtype)

    def mean(self, name: str, values: Tensor) -> None:
        """The mean over tokens."""
        if values.shape == self._mask.shape:
            total_B = self._sums(values)
        else:
            total_B = torch.where(self.counted_B, values.squeeze(1) * self.tokens_B, 0.0)
        self.metrics.add("mean", name, total_B, self.tokens_B)

    def extremes(self, name: str, values: Tensor) -> None:
        """NAME_min and NAME_max; without tokens inf and -inf, which `finish` leaves out."""
        if not self._mask.numel():
            return
        if values.shape == self._mask.shape:
            least_B, greatest_B = kernels.row_extremes(values.to(self.dtype), self.mask)
        else:
            least_B, greatest_B = (torch.where(self.counted_B, values.squeeze(1), end) for end in (torch.inf, -torch.inf))
        self.metrics.add("min", f"{name}_min", least_B)
        self.metrics.add("max", f"{name}_max", greatest_B)

    def fraction(self, name: str, flags: Tensor | None) -> None:
        """NAME: the fraction of tokens. NAME_sequence: the mean over sequences of their fractions. None: nothing is flagged."""
        count_B = share_B = self.nothing_B
        if flags is not None and flags.shape == self._mask.shape:
            count_B = self._sums(flags)
            share_B = count_B / self.tokens_B.clamp(min=1)
        elif flags is not None:
            flags_B = flags.squeeze(1)
            count_B, share_B = flags_B * self.tokens_B, flags_B * self.counted_B
        self.metrics.add("mean", name, count_B, self.tokens_B)
        self.metrics.add("mean", f"{name}_sequence", share_B, self.counted_B)

    def kl(self, name: str, difference_B_T: Tensor, sign: int = 1) -> None:
        """NAME (k1) and NAME_k3 from `sign` times the difference: log-probs of the policy that sampled minus the other's."""
        mask = None if self.all_counted else self.mask
        k1_B, k3_B = kernels.row_kl(difference_B_T.to(self.dtype), mask, sign)
        self.metrics.add("mean", name, k1_B, self.tokens_B)
        self.metrics.add("mean", f"{name}_k3", k3_B, self.tokens_B)

    def effective(self, name: str, weights_B_T: Tensor) -> None:
        """(sum w)^2 / (n sum w^2): the effective sample size, as a share of the tokens."""
        self.metrics.add("effective", name, self._sums(weights_B_T), self._sums(weights_B_T.square()), self.tokens_B)

    def _sums(self, values_B_T: Tensor) -> Tensor:
        """The sum over the counted tokens of each row."""
        return kernels.row_sums(values_B_T.to(self.dtype), self.mask)
