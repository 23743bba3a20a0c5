"""Safetensors without torch: bytes to named tensors, which are views of those bytes, and back.

The format: 8 bytes with the header's length N (little-endian), N bytes of JSON, then the data. The JSON gives each tensor's
`dtype`, `shape` and `data_offsets` [begin, end) in the data, and texts under `__metadata__`. The whole header is checked: the
tensors must cover the data exactly, each byte once. The library `safetensors` accepts everything that is accepted here, and a
few oddities that are refused here (duplicate names, unknown keys).
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

from service.errors import Malformed
from service.validation import did_you_mean, shown
from service.validation.strict_json import LONE_SURROGATE, BadJson, has_lone_surrogate, no_constant, no_key_twice, read

ITEM_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8"), 1),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F64", "I64", "U64"), 8),
}
MAX_HEADER_BYTES = 4 * 2**20
MAX_DIMENSIONS = 8
MAX_SIZE = 2**60  # product of a shape's nonzero sizes: larger than any file, and times an item's bytes it still fits 64 bits
LENGTH_BYTES = 8
METADATA = "__metadata__"
KEYS = frozenset({"dtype", "shape", "data_offsets"})
WRONG_JSON = {
    "encoding": "is not UTF-8: byte 0x{what} at {at}",
    "syntax": "is not JSON: {what} at {at}",
    "too_deep": "is nested too deep",
    "key_twice": "has the key {what!r} twice in one object",
    "constant": "is not JSON: {what}",
}


class BadTensors(Malformed):
    """The bytes are not a safetensors file, or its header is false. `tensor`: the name of the tensor at fault."""

    code = "malformed_safetensors"

    def __init__(self, detail: str, tensor: str | None = None) -> None:
        about = "" if tensor is None else f"the tensor {shown(tensor)!r} "
        super().__init__(f"{about}{detail}")
        self.tensor = tensor


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """Numbers in row-major order, little-endian. `data` is a view, which keeps the whole underlying bytes in memory."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    def __len__(self) -> int:
        """The number of elements."""
        return prod(self.shape)


Tensors = dict[str, Tensor]


# ---------------------------------------------------------------- reading


def decode(raw: bytes | memoryview) -> tuple[Tensors, dict[str, str]]:
    """The tensors, in the order of their data, and the metadata. Raises only BadTensors."""
    view = memoryview(raw)
    if len(view) < LENGTH_BYTES:
        raise BadTensors(f"a safetensors file begins with 8 bytes that hold its header's length; {len(view)} bytes came")
    length = int.from_bytes(view[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise BadTensors(f"the header may have at most {MAX_HEADER_BYTES} bytes, its first 8 bytes say {length}")
    if length > len(view) - LENGTH_BYTES:
        raise BadTensors(f"the header's length is given as {length} bytes, but only {len(view) - LENGTH_BYTES} follow")
    header = _header(bytes(view[LENGTH_BYTES : LENGTH_BYTES + length]))
    metadata = _metadata(header.pop(METADATA, {}))
    return _tensors(header, view[LENGTH_BYTES + length :]), metadata


def _header(raw: bytes) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise BadTensors("the header must be a JSON object and begin with {")
    try:
        return read(raw, partial(json.loads, object_pairs_hook=no_key_twice, parse_int=_count, parse_constant=no_constant))
    except BadJson as error:
        words = WRONG_JSON[error.reason].format(what=shown(error.what), at=error.at)
        raise BadTensors(f"the header {words}") from None


def _count(text: str) -> int | float:
    """Parse a size or an offset: at most 64 bits, and not -0."""
    return int(text) if text.isdecimal() and len(text) < 20 else float("nan")


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise BadTensors(f"the header's {METADATA} must be an object whose values are texts")
    for text in (*value, *value.values()):
        _whole_characters(text, METADATA)
    return value


def _whole_characters(text: str, where: str) -> None:
    if has_lone_surrogate(text):
        raise BadTensors(f"the header holds {LONE_SURROGATE} in {where}")


def _tensors(header: dict[str, Any], data: memoryview) -> Tensors:
    """Cut the data as the header says. Raises BadTensors if bytes are left out or used twice."""
    spans = sorted((_span(name, entry), name) for name, entry in header.items())
    tensors: Tensors = {}
    at = 0
    for (begin, end), name in spans:
        if begin != at:
            what = f"leaves a hole behind byte {at}" if begin > at else f"overlaps the one before it, which ends at {at}"
            raise BadTensors(f"begins at byte {begin} of the data and {what}", name)
        if end > len(data):
            raise BadTensors(f"ends at byte {end} of the data, which has {len(data)}", name)
        entry = header[name]
        tensors[name] = Tensor(entry["dtype"], tuple(entry["shape"]), data[begin:end])
        at = end
    if at != len(data):
        raise BadTensors(f"{len(data) - at} bytes follow behind the last tensor, which ends at {at}")
    return tensors


def _span(name: str, entry: Any) -> tuple[int, int]:
    """Where one tensor begins and ends. Raises BadTensors unless its dtype and shape are valid and need that many bytes."""
    _whole_characters(name, "a name")
    if not isinstance(entry, dict) or entry.keys() != KEYS:
        raise BadTensors(f"must be an object with exactly {', '.join(sorted(KEYS))}", name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        meant = did_you_mean(dtype, list(ITEM_BYTES)) if isinstance(dtype, str) else ""
        raise BadTensors(f"has the dtype {shown(dtype)!r}; known are {', '.join(ITEM_BYTES)}{meant}", name)
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise BadTensors(f"must have a shape of at most {MAX_DIMENSIONS} whole numbers, none negative", name)
    if not _are_counts(offsets) or len(offsets) != 2:
        raise BadTensors("must have two data_offsets, whole numbers, none negative", name)
    (begin, end), needed = offsets, prod(shape) * ITEM_BYTES[dtype]
    if begin > end:
        raise BadTensors(f"ends at byte {end}, before it begins at {begin}", name)
    if prod(size or 1 for size in shape) > MAX_SIZE:
        raise BadTensors(f"has the shape {shape}, which is more than can be", name)
    if end - begin != needed:
        raise BadTensors(f"has {end - begin} bytes of data, but {dtype} of shape {shape} takes {needed}", name)
    return begin, end


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


# ---------------------------------------------------------------- writing


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Encode like the library: the widest dtypes first and the data aligned to 8 bytes, so that every tensor is aligned."""
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    at = 0
    names = sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name].dtype], name))
    for name in names:
        tensor = tensors[name]
        end = at + tensor.data.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (at, end)}
        at = end
    return _joined(header, (tensors[name].data for name in names))


def _joined(header: dict[str, Any], data: Iterable[memoryview]) -> bytes:
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return b"".join((len(text).to_bytes(LENGTH_BYTES, "little"), text, *data))
