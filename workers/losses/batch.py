"""The tensors of one item: from the bytes of a work order to padded [B, T], and back into the layout of the request.

Copies are avoided. A tensor is a view of the order's bytes, and padded rows, or ragged rows of equal length, stay that view.
The tensors are therefore read-only, and nothing here writes in place.
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
    torch.frombuffer(b"0", dtype=torch.uint8)  # it warns once that such views are read-only; we never write to them

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
# For each dtype of a request: the dtype to compute in, and the dtype to round the inputs to first.
COMPUTED_IN = {
    "float64": (torch.float64, None),
    "float32": (torch.float32, None),
    "bfloat16": (torch.float32, torch.bfloat16),
}


def viewed(raw: tensors.Tensor) -> Tensor:
    """Bytes as a tensor, without a copy if they are aligned for the dtype."""
    dtype = DTYPES[raw.dtype]
    if not len(raw):
        return torch.empty(raw.shape, dtype=dtype)
    flat = torch.frombuffer(raw.data, dtype=torch.uint8)
    if flat.data_ptr() % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype).view(raw.shape)


def bytes_of(tensor: Tensor) -> tensors.Tensor:
    """A tensor as bytes, without a copy if the tensor is contiguous."""
    flat = tensor.detach().contiguous().view(-1)
    return tensors.Tensor(NAMES[tensor.dtype], tuple(tensor.shape), flat.view(torch.uint8).numpy().data)


@dataclass(frozen=True)
class Layout:
    """The layout of the request: padded [B, T], or flat [N] with the offsets of the rows [B + 1]."""

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
        """Tokens of a ragged batch; all cells of a padded batch, even masked ones."""
        return self.cells if self.offsets is None else int(self.offsets[-1])

    @cached_property
    def inside_B_T(self) -> Tensor | None:
        """Which cells lie within their row; None if all do."""
        if self.offsets is None or self.tokens == self.cells:
            return None
        return torch.arange(self.longest) < self.offsets.diff().unsqueeze(1)

    @cached_property
    def _places(self) -> Tensor:
        assert self.inside_B_T is not None
        return self.inside_B_T.flatten().nonzero().squeeze(1)

    def is_per_token(self, values: Tensor) -> bool:
        """Whether there is one value per token, and not one per row. If every row has one token, both are the same."""
        if self.offsets is None:
            return values.dim() == 2
        return values.shape[0] == self.tokens and values.shape[0] != self.rows

    def pad(self, values: Tensor) -> Tensor:
        """Per-token values from the layout of the request to [B, T]; 0 beyond a row's end."""
        if self.inside_B_T is None:
            return values.view(self.rows, self.longest)
        return values.new_zeros(self.rows, self.longest).masked_scatter_(self.inside_B_T, values)

    def as_sent(self, values_B_T: Tensor) -> Tensor:
        """[B, T] to the layout of the request."""
        if self.inside_B_T is None:
            return values_B_T if self.offsets is None else values_B_T.reshape(-1)
        return values_B_T.reshape(-1).index_select(0, self._places)

    def cells_of(self, flags: Tensor, at_most: int) -> list[tuple[int, int]]:
        """Row and position of the first `at_most` flagged tokens; `flags` are in the layout of the request."""
        places = flags.flatten().nonzero().squeeze(1)[:at_most]
        if self.offsets is None:
            return [divmod(place, self.longest) for place in places.tolist()]
        rows = torch.searchsorted(self.offsets[1:].contiguous(), places, right=True)
        return list(zip(rows.tolist(), (places - self.offsets[rows]).tolist(), strict=True))


@dataclass(frozen=True)
class Item:
    """One item of a request. `tensors` are in the layout of the request, floats in `dtype`."""

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
        """The axes as text; equal axes give equal text."""
        return json.dumps(self.axes, sort_keys=True)

    def pointer(self, name: str) -> str:
        return f"/items/{self.index}/batch/{name}"


def read(entry: Mapping[str, Any], sent: Mapping[str, Tensor]) -> Item:
    """Read an item of a work order. `sent` are its tensors, by their names in the batch."""
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
