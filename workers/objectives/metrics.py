"""Metrics that add up: collected a micro-batch at a time, merged by concatenation, read once at the end.

Nothing is brought to the host before `finish`, so collecting costs a few reductions and no synchronisation.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workers.objectives.kl import k3
from workers.objectives.tensors import bits_of, neutral

Columns = list[tuple[float, ...]]  # one column a collected tensor: its values over everything that was merged


def _mean(columns: Columns) -> float | None:
    total, count = map(sum, columns)
    return total / count if count else None


def _unless_empty(extreme: float, empty: float) -> float | None:
    return None if extreme == empty else extreme


def _effective(columns: Columns) -> float | None:
    total, squares, count = map(sum, columns)
    return total**2 / (squares * count) if squares and count else None


_REDUCE: dict[str, Callable[[Columns], float | None]] = {
    "sum": lambda columns: sum(columns[0]),
    "min": lambda columns: _unless_empty(min(columns[0]), torch.inf),
    "max": lambda columns: _unless_empty(max(columns[0]), -torch.inf),
    "mean": _mean,
    "effective": _effective,
}


@dataclass
class Metrics:
    """Rows of (how to reduce, name, scalar tensors); `+` merges."""

    parts: list[tuple[str, str, tuple[Tensor, ...]]] = field(default_factory=list)

    def __add__(self, other: "Metrics") -> "Metrics":
        return Metrics(self.parts + other.parts)

    def add(self, how: str, name: str, *values: Tensor) -> None:
        """sum, min, max of one value; mean of (total, count); effective share of (sum w, sum w^2, count)."""
        self.parts.append((how, name, values))

    def finish(self) -> dict[str, float]:
        """The metrics over everything that was merged; a mean over nothing is left out."""
        if not self.parts:
            return {}
        numbers = iter(torch.stack([value.detach().double() for *_, values in self.parts for value in values]).tolist())
        rows: dict[tuple[str, str], list[tuple[float, ...]]] = {}
        for how, name, values in self.parts:
            rows.setdefault((how, name), []).append(tuple(next(numbers) for _ in values))
        reduced = {name: _REDUCE[how](list(zip(*entries, strict=True))) for (how, name), entries in rows.items()}
        return {name: value for name, value in reduced.items() if value is not None}


class Reductions:
    """Sums, extremes and fractions over the counted tokens of one batch, written into Metrics.

    Values are [B, T], or [B, 1] where a sequence has one for all its tokens; not counted ones may be anything.
    """

    def __init__(self, mask_B_T: Tensor, dtype: torch.dtype, metrics: Metrics | None = None) -> None:
        self.metrics = Metrics() if metrics is None else metrics
        self.mask = mask_B_T
        self.bits = bits_of(mask_B_T, dtype)
        self.lengths_B_1 = mask_B_T.sum(dim=1, keepdim=True).to(dtype)
        self.tokens = self.lengths_B_1.sum()
        self.rows = (self.lengths_B_1 > 0).sum().to(dtype)

    def _sum(self, values: Tensor) -> Tensor:
        """Over tokens."""
        if values.shape == self.mask.shape:
            return neutral(values.to(self.lengths_B_1.dtype), self.mask, self.bits).sum()
        return torch.where(self.lengths_B_1 > 0, values * self.lengths_B_1, 0.0).sum()

    def mean(self, name: str, values: Tensor) -> None:
        """Over tokens."""
        self.metrics.add("mean", name, self._sum(values), self.tokens)

    def extremes(self, name: str, values: Tensor) -> None:
        """NAME_min and NAME_max; of nothing they are inf and -inf, which `finish` leaves out."""
        if self.mask.numel():
            counted = self.mask if values.shape == self.mask.shape else self.lengths_B_1 > 0
            one_of_them = values.take(counted.flatten().byte().argmax())
            least, greatest = torch.where(counted, values, one_of_them).aminmax()
            self.metrics.add("min", f"{name}_min", torch.where(self.tokens > 0, least, torch.inf))
            self.metrics.add("max", f"{name}_max", torch.where(self.tokens > 0, greatest, -torch.inf))

    def fraction(self, name: str, flags: Tensor | None) -> None:
        """Of tokens, and as NAME_sequence the mean over sequences of their fractions. None: nothing is flagged."""
        share_B_1 = torch.zeros_like(self.lengths_B_1)
        if flags is not None and flags.shape == self.mask.shape:
            share_B_1 = (flags & self.mask).sum(dim=1, keepdim=True) / self.lengths_B_1.clamp(min=1)
        elif flags is not None:
            share_B_1 = (flags & (self.lengths_B_1 > 0)).to(share_B_1.dtype)
        self.metrics.add("mean", name, (share_B_1 * self.lengths_B_1).sum(), self.tokens)
        self.metrics.add("mean", f"{name}_sequence", share_B_1.sum(), self.rows)

    def kl(self, name: str, difference_B_T: Tensor) -> None:
        """NAME (k1) and NAME_k3 from log-probs under the sampled policy less those under the other."""
        difference = neutral(difference_B_T, self.mask, self.bits)
        self.metrics.add("mean", name, difference.sum(), self.tokens)
        self.metrics.add("mean", f"{name}_k3", k3(difference).sum(), self.tokens)

    def effective(self, name: str, weights_B_T: Tensor) -> None:
        """(sum w)^2 / (n sum w^2): the share of the tokens that the weights leave in effect."""
        weights = neutral(weights_B_T, self.mask, self.bits)
        self.metrics.add("effective", name, weights.sum(), weights.square().sum(), self.tokens)
