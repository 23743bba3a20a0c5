"""Metrics that can be merged: collected per row, merged by concatenation, read once at the end.

Nothing is copied to the host before `finish` or `split`, so collecting costs a few reductions and no synchronisation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from workers.objectives import kernels


def _unless_infinite(extreme: float) -> float | None:
    return None if math.isinf(extreme) else extreme


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def _effective(total: float, squares: float, count: float) -> float | None:
    return total**2 / (squares * count) if squares and count else None


class _Rule(NamedTuple):
    """How a metric becomes one number: each of its columns is reduced over rows, then the results are combined."""

    over_rows: tuple[np.ufunc, float]  # and its value for no rows
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
    """Parts of (how to reduce, name, columns); a column [B] holds one value per row. `+` merges."""

    parts: list[tuple[str, str, tuple[Tensor, ...]]] = field(default_factory=list)

    def __add__(self, other: "Metrics") -> "Metrics":
        return Metrics(self.parts + other.parts)

    def add(self, how: str, name: str, *columns_B: Tensor) -> None:
        """`how`: sum, min, max of one column; mean of (total, count); effective of (sum w, sum w^2, count). Keeps no graph."""
        self.parts.append((how, name, columns_B))

    def finish(self) -> dict[str, float]:
        """The metrics over everything that was merged; a mean over nothing is left out."""
        host = self._on_host()
        return host.finished(host.numbers, host.sizes)[0]

    def split(self, item_of_row_B: Tensor, items: int) -> list[dict[str, float]]:
        """What `finish` would give for each item's rows alone. `item_of_row_B` holds 0..items-1, in the order of the rows.

        Raises ValueError unless every metric was measured once for each of the B rows, in the order of the rows.
        """
        host, item_of_row = self._on_host(), item_of_row_B.numpy(force=True)
        lengths = sorted(set(host.sizes))
        if lengths and lengths != [len(item_of_row)]:
            raise ValueError(f"metrics of {lengths} rows cannot be split by the items of {len(item_of_row)} rows")
        numbers = host.numbers.reshape(len(host.sizes), len(item_of_row))[:, np.argsort(item_of_row, kind="stable")]
        return host.finished(numbers, np.bincount(item_of_row, minlength=items))

    def _on_host(self) -> "_OnHost":
        merged = self._merged()
        columns, places = kernels.distinct([column for *_, columns in merged for column in columns])  # many share counts
        place = iter(places)
        metrics = [(how, name, [next(place) for _ in columns]) for how, name, columns in merged]
        numbers = torch.cat(columns).double().numpy(force=True) if columns else np.zeros(0)  # one transfer
        return _OnHost(metrics, [column.shape[0] for column in columns], numbers)

    def _merged(self) -> list[tuple[str, str, tuple[Tensor, ...]]]:
        """Each metric once, with the rows of all its parts."""
        parts_of: dict[tuple[str, str], list[tuple[Tensor, ...]]] = {}
        for how, name, columns in self.parts:
            parts_of.setdefault((how, name), []).append(columns)
        if len(parts_of) == len(self.parts):
            return self.parts
        return [(*key, tuple(map(torch.cat, zip(*parts, strict=True)))) for key, parts in parts_of.items()]


@dataclass(frozen=True)
class _OnHost:
    """Metrics (how to reduce, name, places of their columns); the columns are concatenated into one array."""

    metrics: list[tuple[str, str, list[int]]]
    sizes: list[int]
    numbers: _Floats

    @np.errstate(all="ignore")
    def finished(self, numbers: _Floats, sizes: Any) -> list[dict[str, float]]:
        """From columns [N] and their sizes [C]: the metrics of all rows. From [C, B] and the items' sizes [I]: of each item."""
        sizes = np.asarray(sizes, dtype=np.intp)
        starts, full = sizes.cumsum() - sizes, sizes > 0

        def reduced(over_rows: np.ufunc, of_nothing: float) -> list[list[float]]:
            values = np.full((*numbers.shape[:-1], len(sizes)), of_nothing)
            if full.any():
                values[..., full] = over_rows.reduceat(numbers, starts[full], axis=-1)
            return values.reshape(len(self.sizes), -1).T.tolist()

        reductions = {rule: reduced(*rule) for rule in {_RULES[how].over_rows for how, *_ in self.metrics}}
        items = len(sizes) if numbers.ndim == 2 else 1
        return [self._item({rule: columns[item] for rule, columns in reductions.items()}) for item in range(items)]

    def _item(self, columns: dict[tuple[np.ufunc, float], list[float]]) -> dict[str, float]:
        values = {}
        for how, name, places in self.metrics:
            over_rows, together = _RULES[how]
            of_rows = columns[over_rows]
            if (value := together(*[of_rows[place] for place in places])) is not None:
                values[name] = value
        return values
