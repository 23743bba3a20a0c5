"""A worker's answer as JSON: the tensors of an item become its members, with the rows of the request.

Numbers that are not finite are written as the strings "NaN", "Infinity" and "-Infinity". Rows are converted one by one, so that
other threads can run in between.
"""

from collections.abc import Iterator
from itertools import pairwise
from math import isfinite
from typing import Any

import orjson

from service.losses import numbers
from service.relay.orders import Answer
from service.relay.tensors import Tensor, Tensors

FORMATS = {"F64": "d", "F32": "f", "BOOL": "?"}


def as_json(answer: Answer) -> bytes:
    """The whole body of the response."""
    by_item: dict[str, Tensors] = {}
    for name, tensor in answer.tensors.items():
        index, _, name_in_item = name.partition("/")
        by_item.setdefault(index, {})[name_in_item] = tensor
    data = [_with_tensors(item, by_item.get(str(item["index"]), {})) for item in answer.data]
    return orjson.dumps({"object": "list", "data": data})


def _with_tensors(item: dict[str, Any], tensors: Tensors) -> dict[str, Any]:
    offsets = tensors.pop("cu_seqlens", None)
    ends = None if offsets is None else numbers.integers(offsets)
    whole = dict(item)
    for path, tensor in sorted(tensors.items()):
        *folders, name = path.split("/")
        place = whole
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = orjson.Fragment(b"[" + b",".join(_rows(tensor, ends)) + b"]")
    return whole


def _rows(tensor: Tensor, ends: Any) -> Iterator[bytes]:
    if ends is None:
        rows, longest = tensor.shape
        spans = [(row * longest, (row + 1) * longest) for row in range(rows)]
    else:
        spans = list(pairwise(ends))
    values: Any = tensor.data
    if tensor.data:  # an empty memoryview cannot be cast
        values = values.cast(FORMATS[tensor.dtype])
    for begin, end in spans:
        yield orjson.dumps(_written(values[begin:end].tolist()))


def _written(row: list[Any]) -> list[Any]:
    """The row with nonfinite numbers as strings. If the row's sum is finite, so are all its numbers, and it is unchanged."""
    if isfinite(sum(row)):
        return row
    return [value if isfinite(value) else _name(value) for value in row]


def _name(value: float) -> str:
    return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
