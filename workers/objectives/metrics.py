"""Metrics that add up: collected a row at a time, merged by concatenation, read once at the end.

Nothing is brought to the host before `finish` or `split`, so collecting costs a few reductions and no synchronisation.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from workers.objectives.tensors import INTEGERS, MAX_LOG_RATIO, blocks, cleared, ones_of, tokens_of


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def _effective(total: float, squares: float, count: float) -> float | None:
    return total**2 / (squares * count) if squares and count else None


def _least(column: Sequence[float]) -> float:
    """NaN if there is one; min alone would give what comes first."""
    return math.nan if math.isnan(sum(column)) else min(column, default=math.inf)


def _greatest(column: Sequence[float]) -> float:
    return math.nan if math.isnan(sum(column)) else max(column, default=-math.inf)


@dataclass(frozen=True)
class _Rule:
    """How a metric becomes one number: each of its columns is reduced over rows, then the columns are put together."""

    over_rows: Callable[[Sequence[float]], float] = sum
    together: Callable[..., float | None] = lambda total: total


def _unless_infinite(extreme: float) -> float | None:
    return None if math.isinf(extreme) else extreme


_RULES: dict[str, _Rule] = {
    "sum": _Rule(),
    "min": _Rule(_least, _unless_infinite),
    "max": _Rule(_greatest, _unless_infinite),
    "mean": _Rule(together=_mean),
    "effective": _Rule(together=_effective),
}
_Columns = dict[tuple[str, str], list[list[float]]]


@dataclass
class Metrics:
    """Parts of (how to reduce, name, columns); a column [B] holds one value a row. `+` merges."""

    parts: list[tuple[str, str, tuple[Tensor, ...]]] = field(default_factory=list)

    def __add__(self, other: "Metrics") -> "Metrics":
        return Metrics(self.parts + other.parts)

    def add(self, how: str, name: str, *columns_B: Tensor) -> None:
        """sum, min, max of one column; mean of (total, count); effective share of (sum w, sum w^2, count). Without a graph."""
        self.parts.append((how, name, columns_B))

    def finish(self) -> dict[str, float]:
        """The metrics over everything that was merged; a mean over nothing is left out."""
        return _finished(self._on_host(), slice(None))

    def split(self, item_of_row_B: Tensor, items: int) -> list[dict[str, float]]:
        """What `finish` would give of each item's rows alone; `item_of_row_B` holds 0..items-1, in the order of the rows.

        Raises ValueError unless every metric was measured once of each of the B rows, in one part or in several in their order.
        """
        found, item_of_row = self._on_host(), item_of_row_B.tolist()
        lengths = sorted({len(column) for columns in found.values() for column in columns})
        if lengths and lengths != [len(item_of_row)]:
            raise ValueError(f"metrics of {lengths} rows cannot be split by the items of {len(item_of_row)} rows")
        order = sorted(range(len(item_of_row)), key=item_of_row.__getitem__)
        by_item = {key: [[column[row] for row in order] for column in columns] for key, columns in found.items()}
        ends = list(accumulate(map(Counter(item_of_row).__getitem__, range(items)), initial=0))
        return [_finished(by_item, slice(*rows)) for rows in pairwise(ends)]

    def _on_host(self) -> _Columns:
        """The columns of each metric over everything that was merged."""
        found: _Columns = {}
        if not self.parts:
            return found
        different = {id(column): column for *_, columns in self.parts for column in columns}  # counts stand in many parts
        numbers = torch.cat([*different.values()]).double().tolist()  # one transfer
        ends = accumulate((column.shape[0] for column in different.values()), initial=0)
        read = {name: numbers[start:end] for name, (start, end) in zip(different, pairwise(ends), strict=True)}
        for how, name, columns in self.parts:
            into = found.setdefault((how, name), [[] for _ in columns])
            for numbers_of, column in zip(into, columns, strict=True):
                numbers_of += read[id(column)]
        return found


def _finished(found: _Columns, rows: slice) -> dict[str, float]:
    values = {
        name: _RULES[how].together(*(_RULES[how].over_rows(column[rows]) for column in columns))
        for (how, name), columns in found.items()
    }
    return {name: value for name, value in values.items() if value is not None}


class Reductions:
    """Sums, extremes and fractions over the counted tokens of each row of a batch, written into Metrics.

    `mask_B_T` is boolean, or weights that are not 0 where a token counts. Values are [B, T], or [B, 1] where a sequence has one
    for all its tokens; not counted ones may be anything. Temporaries have the size of a few blocks of rows.
    """

    def __init__(
        self,
        mask_B_T: Tensor,
        dtype: torch.dtype,
        metrics: Metrics | None = None,
        counts_B: Tensor | None = None,
        lengths_B: Tensor | None = None,
    ) -> None:
        """`counts_B`: the counted tokens of each row, where they are known; `lengths_B`: those at which differences are not 0
        anyway. If they are all counted, `kl` need not look."""
        self.metrics = Metrics() if metrics is None else metrics
        self.mask = mask_B_T
        self.dtype = dtype
        counts_B = tokens_of(mask_B_T != 0) if counts_B is None else counts_B
        self.tokens_B = counts_B.to(dtype)
        self.counted_B = counts_B > 0
        self.nothing_B = torch.zeros_like(self.tokens_B)
        on_host = mask_B_T.device.type == "cpu"  # elsewhere it would have to wait for the device
        self.all_counted = on_host and lengths_B is not None and torch.equal(lengths_B, counts_B)

    @cached_property
    def ones(self) -> Tensor:
        return ones_of(self.mask)

    def mean(self, name: str, values: Tensor) -> None:
        """Over tokens."""
        if values.shape == self.mask.shape:
            total_B = self._sum(values)
        else:
            total_B = torch.where(self.counted_B, values.squeeze(1) * self.tokens_B, 0.0)
        self.metrics.add("mean", name, total_B, self.tokens_B)

    def extremes(self, name: str, values: Tensor) -> None:
        """NAME_min and NAME_max; of nothing they are inf and -inf, which `finish` leaves out."""
        if not self.mask.numel():
            return
        if values.shape == self.mask.shape:
            least_B, greatest_B = self._by_block(_extremes, values.to(self.dtype), self.ones).unbind(1)
        else:
            least_B, greatest_B = (torch.where(self.counted_B, values.squeeze(1), end) for end in (torch.inf, -torch.inf))
        self.metrics.add("min", f"{name}_min", least_B)
        self.metrics.add("max", f"{name}_max", greatest_B)

    def fraction(self, name: str, flags: Tensor | None) -> None:
        """Of tokens, and as NAME_sequence the mean over sequences of their fractions. None: nothing is flagged."""
        count_B = share_B = self.nothing_B
        if flags is not None and flags.shape == self.mask.shape:
            count_B = self._sum(flags)
            share_B = count_B / self.tokens_B.clamp(min=1)
        elif flags is not None:
            count_B, share_B = flags.squeeze(1) * self.tokens_B, flags.squeeze(1) * self.counted_B
        self.metrics.add("mean", name, count_B, self.tokens_B)
        self.metrics.add("mean", f"{name}_sequence", share_B, self.counted_B)

    def kl(self, name: str, difference_B_T: Tensor, sign: int = 1) -> None:
        """NAME (k1) and NAME_k3 from `sign` times log-probs under the sampled policy less those under the other."""
        ones = () if self.all_counted else (self.ones,)
        k1_B, k3_B = self._by_block(partial(_kl, sign=sign), difference_B_T.to(self.dtype), *ones).unbind(1)
        self.metrics.add("mean", name, k1_B, self.tokens_B)
        self.metrics.add("mean", f"{name}_k3", k3_B, self.tokens_B)

    def effective(self, name: str, weights_B_T: Tensor) -> None:
        """(sum w)^2 / (n sum w^2): the share of the tokens that the weights leave in effect."""
        self.metrics.add("effective", name, self._sum(weights_B_T), self._sum(weights_B_T.square()), self.tokens_B)

    def _sum(self, values_B_T: Tensor) -> Tensor:
        """Over the counted tokens of each row."""
        return self._by_block(lambda values, ones: cleared(values, ones).sum(dim=1), values_B_T.to(self.dtype), self.ones)

    def _by_block(self, reduce: Callable[..., Tensor], *tensors_B_T: Tensor) -> Tensor:
        return torch.cat([reduce(*(tensor[rows] for tensor in tensors_B_T)) for rows in blocks(self.mask)])


def _extremes(values: Tensor, ones: Tensor) -> Tensor:
    """[B, 2]"""
    values = cleared(values, ones)
    infinite = _INFINITE[values.dtype]
    beyond = (ones.to(INTEGERS[values.dtype]) - 1).bitwise_and_(infinite).view(values.dtype)  # inf where not counted
    least_B = (values + beyond).amin(dim=1)
    return torch.stack([least_B, values.sub_(beyond).amax(dim=1)], dim=1)


def _kl(difference: Tensor, ones: Tensor | None = None, *, sign: int) -> Tensor:
    """k1 and k3 of sign * difference, [B, 2].

    As a metric k3 may be off by 6e-8 a token, which averages out: exp2 takes a quarter of the time that expm1 does.
    """
    if ones is not None:
        difference = cleared(difference, ones)
    k1_B = sign * difference.sum(dim=1)
    growth = difference.mul(-sign * LOG2_E).clamp_(max=MAX_LOG_RATIO * LOG2_E).exp2_().sub_(1)
    return torch.stack([k1_B, (growth.sum(dim=1) + k1_B).clamp_(min=0)], dim=1)


LOG2_E = math.log2(math.e)
_INFINITE = {torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}  # the bits of infinity
