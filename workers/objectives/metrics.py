"""Metrics that add up: collected a row at a time, merged by concatenation, read once at the end.

Nothing is brought to the host before `finish` or `split`, so collecting costs a few reductions and no synchronisation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from workers.objectives.tensors import INTEGERS, MAX_LOG_RATIO, blocks, cleared, ones_of, tokens_of


def _unless_infinite(extreme: float) -> float | None:
    return None if math.isinf(extreme) else extreme


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def _effective(total: float, squares: float, count: float) -> float | None:
    return total**2 / (squares * count) if squares and count else None


class _Rule(NamedTuple):
    """How a metric becomes one number: each of its columns is reduced over rows, then the columns are put together."""

    over_rows: tuple[np.ufunc, float]  # and what that is of no rows
    together: Callable[..., float | None]


_SUM, _LEAST, _GREATEST = (np.add, 0.0), (np.minimum, math.inf), (np.maximum, -math.inf)  # NaN if there is one
_RULES: dict[str, _Rule] = {
    "sum": _Rule(_SUM, lambda total: total),
    "min": _Rule(_LEAST, _unless_infinite),
    "max": _Rule(_GREATEST, _unless_infinite),
    "mean": _Rule(_SUM, _mean),
    "effective": _Rule(_SUM, _effective),
}
_Floats = np.ndarray[Any, np.dtype[np.float64]]


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
        found = self._on_host()
        return found.finished(found.numbers, found.sizes)[0]

    def split(self, item_of_row_B: Tensor, items: int) -> list[dict[str, float]]:
        """What `finish` would give of each item's rows alone; `item_of_row_B` holds 0..items-1, in the order of the rows.

        Raises ValueError unless every metric was measured once of each of the B rows, in one part or in several in their order.
        """
        found, item_of_row = self._on_host(), item_of_row_B.numpy(force=True)
        lengths = sorted(set(found.sizes))
        if lengths and lengths != [len(item_of_row)]:
            raise ValueError(f"metrics of {lengths} rows cannot be split by the items of {len(item_of_row)} rows")
        numbers = found.numbers.reshape(len(found.sizes), len(item_of_row))[:, np.argsort(item_of_row, kind="stable")]
        return found.finished(numbers, np.bincount(item_of_row, minlength=items))

    def _on_host(self) -> "_OnHost":
        places: dict[int, int] = {}
        different: list[Tensor] = []  # counts stand in many metrics
        metrics: list[tuple[str, str, list[int]]] = []
        for how, name, columns in self._merged():
            for column in columns:
                if id(column) not in places:
                    places[id(column)] = len(different)
                    different.append(column)
            metrics.append((how, name, [places[id(column)] for column in columns]))
        numbers = torch.cat(different).double().numpy(force=True) if different else np.zeros(0)  # one transfer
        return _OnHost(metrics, [column.shape[0] for column in different], numbers)

    def _merged(self) -> list[tuple[str, str, tuple[Tensor, ...]]]:
        """Each metric once, over the rows of all its parts."""
        parts_of: dict[tuple[str, str], list[tuple[Tensor, ...]]] = {}
        for how, name, columns in self.parts:
            parts_of.setdefault((how, name), []).append(columns)
        if len(parts_of) == len(self.parts):
            return self.parts
        whole: dict[tuple[int, ...], Tensor] = {}

        def merged(column: tuple[Tensor, ...]) -> Tensor:
            key = tuple(map(id, column))
            if key not in whole:
                whole[key] = torch.cat(column)
            return whole[key]

        return [(*key, tuple(map(merged, zip(*parts, strict=True)))) for key, parts in parts_of.items()]


@dataclass(frozen=True)
class _OnHost:
    """Metrics (how to reduce, name, places of their columns), and the rows of the columns: one column behind the other."""

    metrics: list[tuple[str, str, list[int]]]
    sizes: list[int]
    numbers: _Floats

    @np.errstate(all="ignore")
    def finished(self, numbers: _Floats, sizes: Any) -> list[dict[str, float]]:
        """Of columns [N] and their sizes [C] the metrics of all rows; of [C, B] and the items' sizes [I] those of each item."""
        sizes = np.asarray(sizes, dtype=np.intp)
        starts, full = sizes.cumsum() - sizes, sizes > 0

        def reduced(over_rows: np.ufunc, of_nothing: float) -> list[list[float]]:
            values = np.full((*numbers.shape[:-1], len(sizes)), of_nothing)
            if full.any():
                values[..., full] = over_rows.reduceat(numbers, starts[full], axis=-1)
            return values.reshape(len(self.sizes), -1).T.tolist()

        found = {rule: reduced(*rule) for rule in {_RULES[how].over_rows for how, *_ in self.metrics}}
        items = len(sizes) if numbers.ndim == 2 else 1
        return [self._item({rule: columns[item] for rule, columns in found.items()}) for item in range(items)]

    def _item(self, columns: dict[tuple[np.ufunc, float], list[float]]) -> dict[str, float]:
        values = {}
        for how, name, places in self.metrics:
            over_rows, together = _RULES[how]
            of_rows = columns[over_rows]
            if (value := together(*[of_rows[place] for place in places])) is not None:
                values[name] = value
        return values


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
        self.tokens_B = (tokens_of(mask_B_T != 0) if counts_B is None else counts_B).to(dtype)
        self.counted_B = self.tokens_B > 0
        self.nothing_B = torch.zeros_like(self.tokens_B)
        on_host = mask_B_T.device.type == "cpu"  # elsewhere it would have to wait for the device
        self.all_counted = on_host and lengths_B is not None and torch.equal(lengths_B, self.tokens_B)

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
            flags_B = flags.squeeze(1)
            count_B, share_B = flags_B * self.tokens_B, flags_B * self.counted_B
        self.metrics.add("mean", name, count_B, self.tokens_B)
        self.metrics.add("mean", f"{name}_sequence", share_B, self.counted_B)

    def kl(self, name: str, difference_B_T: Tensor, sign: int = 1) -> None:
        """NAME (k1) and NAME_k3 from `sign` times log-probs under the sampled policy less those under the other."""
        ones = () if self.all_counted else (self.ones,)
        reduce, difference_B_T = partial(_kl, sign=sign), difference_B_T.to(self.dtype)
        k1_B, k3_B = self._by_block(reduce, difference_B_T, *ones, size=2).unbind(1)  # which makes few temporaries
        self.metrics.add("mean", name, k1_B, self.tokens_B)
        self.metrics.add("mean", f"{name}_k3", k3_B, self.tokens_B)

    def effective(self, name: str, weights_B_T: Tensor) -> None:
        """(sum w)^2 / (n sum w^2): the share of the tokens that the weights leave in effect."""
        self.metrics.add("effective", name, self._sum(weights_B_T), self._sum(weights_B_T.square()), self.tokens_B)

    def _sum(self, values_B_T: Tensor) -> Tensor:
        """Over the counted tokens of each row."""
        return self._by_block(lambda values, ones: cleared(values, ones).sum(dim=1), values_B_T.to(self.dtype), self.ones)

    def _by_block(self, reduce: Callable[..., Tensor], *tensors_B_T: Tensor, size: int = 1) -> Tensor:
        cut = blocks(self.mask, size)
        if len(cut) == 1:
            return reduce(*tensors_B_T)
        return torch.cat([reduce(*(tensor[rows] for tensor in tensors_B_T)) for rows in cut])


def _extremes(values: Tensor, ones: Tensor) -> Tensor:
    """[B, 2]"""
    values = cleared(values, ones)
    infinite = _INFINITE[values.dtype]
    beyond = (ones.to(INTEGERS[values.dtype]) - 1).bitwise_and_(infinite).view(values.dtype)  # inf where not counted
    least_B = (values + beyond).amin(dim=1)
    return torch.stack([least_B, values.sub_(beyond).amax(dim=1)], dim=1)


def _kl(difference: Tensor, ones: Tensor | None = None, *, sign: int) -> Tensor:
    """k1 and k3 of sign * difference, [B, 2].

    As a metric k3 may be off by 6e-8 a token, which averages out: exp2 takes a quarter of the time that expm1 does. (exp takes
    less still, but errs to one side.)
    """
    if ones is not None:
        difference = cleared(difference, ones)
    k1_B = difference.sum(dim=1).mul_(sign)
    growth_B = difference.mul(-sign * LOG2_E).clamp_(max=MAX_LOG_RATIO * LOG2_E).exp2_().sub_(1).sum(dim=1)
    return torch.stack([k1_B, growth_B.add_(k1_B).clamp_(min=0)], dim=1)


LOG2_E = math.log2(math.e)
_INFINITE = {torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}  # the bits of infinity
