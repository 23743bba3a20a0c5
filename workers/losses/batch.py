"""The tensors of one item: from the bytes of a work order, padded to [B, T], and back into the layout that was sent.

Nothing is copied that need not be: a tensor is a view of the order's bytes, and padded rows, or ragged rows that are all
of one length, stay that view. So they are read-only: nothing in here is written in place.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from service.relay import tensors
from service.spec.tensors import TENSORS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(b"0", dtype=torch.uint8)  # it warns once that such a view must not be written to; ours are not

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What is computed in, and what inputs are rounded to before.
COMPUTED_IN = {
    "float64": (torch.float64, None),
    "float32": (torch.float32, None),
    "bfloat16": (torch.float32, torch.bfloat16),
}


def viewed(raw: tensors.Tensor) -> Tensor:
    """Bytes as a tensor, without a copy where they lie as the dtype wants them."""
    dtype = DTYPES[raw.dtype]
    if not len(raw):
        return torch.empty(raw.shape, dtype=dtype)
    flat = torch.frombuffer(raw.data, dtype=torch.uint8)
    if flat.data_ptr() % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype).view(raw.shape)


def bytes_of(tensor: Tensor) -> tensors.Tensor:
    """The other way, without a copy where the tensor is contiguous."""
    flat = tensor.detach().contiguous().view(-1)
    return tensors.Tensor(NAMES[tensor.dtype], tuple(tensor.shape), flat.view(torch.uint8).numpy().data)


@dataclass(frozen=True)
class Layout:
    """How rows were sent: padded [B, T], or flat [N] with the offsets of the rows [B + 1]."""

    rows: int
    longest: int
    offsets: Tensor | None = None

    @classmethod
    def padded(cls, like: Tensor) -> "Layout":
        return cls(like.shape[0], like.shape[1])

    @classmethod
    def ragged(cls, offsets: Tensor) -> "Layout":
        offsets = offsets.long()
        rows = offsets.numel() - 1
        return cls(rows, int(offsets.diff().max()) if rows else 0, offsets)

    @property
    def cells(self) -> int:
        return self.rows * self.longest

    @cached_property
    def tokens(self) -> int:
        """Of a padded batch: cells, whatever its mask says."""
        return self.cells if self.offsets is None else int(self.offsets[-1])

    @cached_property
    def inside_B_T(self) -> Tensor | None:
        """Cells that lie within their row; None where all do."""
        if self.offsets is None or self.tokens == self.cells:
            return None
        return torch.arange(self.longest) < self.offsets.diff().unsqueeze(1)

    @cached_property
    def _places(self) -> Tensor:
        assert self.inside_B_T is not None
        return self.inside_B_T.flatten().nonzero().squeeze(1)

    def is_per_token(self, values: Tensor) -> bool:
        """Rather than one value a row. One value a row of one token is both, and the same."""
        if self.offsets is None:
            return values.dim() == 2
        return values.shape[0] == self.tokens and values.shape[0] != self.rows

    def pad(self, values: Tensor) -> Tensor:
        """Per-token values as they were sent, to [B, T]; 0 beyond a row's end."""
        if self.inside_B_T is None:
            return values.view(self.rows, self.longest)
        return values.new_zeros(self.rows, self.longest).masked_scatter_(self.inside_B_T, values)

    def as_sent(self, values_B_T: Tensor) -> Tensor:
        """[B, T] back into the layout of the request."""
        if self.inside_B_T is None:
            return values_B_T if self.offsets is None else values_B_T.reshape(-1)
        return values_B_T.reshape(-1).index_select(0, self._places)

    def cells_of(self, flags: Tensor, at_most: int) -> list[tuple[int, int]]:
        """Row and position of the first flagged tokens of a tensor as it was sent."""
        places = flags.flatten().nonzero().squeeze(1)[:at_most]
        if self.offsets is None:
            return [divmod(place, self.longest) for place in places.tolist()]
        rows = torch.searchsorted(self.offsets[1:].contiguous(), places, right=True)
        return list(zip(rows.tolist(), (places - self.offsets[rows]).tolist(), strict=True))


@dataclass(frozen=True)
class Item:
    """One item of a request as the worker reads it. `tensors` are in the layout that was sent, floats in `dtype`."""

    index: int
    axes: Mapping[str, Any]
    dtype: torch.dtype
    layout: Layout
    tensors: Mapping[str, Tensor]
    wanted: frozenset[str] = frozenset()
    mask_nonfinite: bool = False
    zero_singletons: bool = False
    seed: int = 0
    warnings: tuple[str, ...] = field(default=())

    @cached_property
    def objective(self) -> str:
        """The axes as text, which is the same for the same axes."""
        return json.dumps(self.axes, sort_keys=True)

    def pointer(self, name: str) -> str:
        return f"/items/{self.index}/batch/{name}"


def read(entry: Mapping[str, Any], sent: Mapping[str, Tensor]) -> Item:
    """An item of a work order; `sent` are its tensors, by their names in the batch."""
    dtype, rounded = COMPUTED_IN[entry["dtype"]]
    if entry["layout"] == "ragged":
        layout = Layout.ragged(sent["cu_seqlens"])
    else:
        layout = Layout.padded(sent["log_probs"])
    return Item(
        index=entry["index"],
        axes=entry["objective"],
        dtype=dtype,
        layout=layout,
        tensors={name: _cast(name, values, dtype, rounded) for name, values in sent.items() if name != "cu_seqlens"},
        wanted=frozenset(entry["return"]),
        mask_nonfinite=entry["on_nonfinite"] == "mask",
        zero_singletons=entry["on_singleton"] == "zero",
        seed=entry["seed"],
        warnings=tuple(entry.get("warnings", ())),
    )


def _cast(name: str, values: Tensor, dtype: torch.dtype, rounded: torch.dtype | None) -> Tensor:
    known = TENSORS[name]
    if not known.is_float:
        return values
    if rounded is not None and known.of_model:
        values = values.to(rounded)
    return values.to(dtype)
