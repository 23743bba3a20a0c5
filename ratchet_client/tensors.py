"""Safetensors for plain lists of numbers, with the standard library alone: 8 bytes with the header's length, the header (JSON),
the numbers. Lists, numpy arrays and torch tensors go in; lists come out."""

import json
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from math import isnan
from typing import Any, NamedTuple

TYPECODES = {"F32": "f", "F64": "d", "I32": "i", "I64": "q"}
METADATA, HEAD = "__metadata__", "head"
# Tensors of an answer with a row for each token of `cu_seqlens`, and for each of `prompt_cu_seqlens`.
BY_ROW = ("tokens", "log_probs", "top_ids", "top_log_probs")
BY_PROMPT = ("prompt_tokens", "prompt_log_probs", "top_prompt_ids", "top_prompt_log_probs", "target_log_probs")


class Tensor(NamedTuple):
    """Numbers, one after the other, and their shape."""

    dtype: str
    shape: tuple[int, ...]
    numbers: "array[Any]"


def plain(value: Any) -> Any:
    """A list of Python numbers from a numpy array or a torch tensor on any device; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def tensor(dtype: str, numbers: Iterable[Any], *inner: int) -> Tensor:
    """`inner`: the sizes of all dimensions but the first."""
    flat = array(TYPECODES[dtype], numbers)
    rows = len(flat)
    for size in inner:
        rows //= size
    return Tensor(dtype, (rows, *inner), flat)


def ragged(name: str, cuts: str, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Tokens of several rows, flat, and where each row begins."""
    flat = tensor("I32", (token for row in rows for token in row))
    return {name: flat, cuts: tensor("I64", accumulate(map(len, rows), initial=0))}


def encode(tensors: Mapping[str, Tensor], head: str) -> bytes:
    """A file with these tensors and this head, JSON. The same arguments give the same bytes."""
    header: dict[str, Any] = {METADATA: {HEAD: head}}
    parts, at = list[bytes](), 0
    for name, value in sorted(tensors.items(), key=lambda entry: (-entry[1].numbers.itemsize, entry[0])):
        parts.append(_little(value.numbers).tobytes())
        header[name] = {"dtype": value.dtype, "shape": value.shape, "data_offsets": [at, at + len(parts[-1])]}
        at += len(parts[-1])
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, *parts))


def decode(raw: bytes) -> dict[str, Any]:
    """An answer as its JSON form has it: the head's entries, and each tensor as a list, ragged ones as a list of rows; where a
    number is NaN stands None. Raises ValueError if the bytes are not such a file."""
    size = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:size])
    answer = json.loads(header.pop(METADATA)[HEAD])
    lists = {name: _nested(entry, raw[size:]) for name, entry in header.items()}
    cuts = {name: lists.pop(name) for name in ("cu_seqlens", "prompt_cu_seqlens") if name in lists}
    for name, values in lists.items():
        cut = cuts.get("prompt_cu_seqlens" if name in BY_PROMPT else "cu_seqlens" if name in BY_ROW else "")
        answer[name] = values if cut is None else [values[start:end] for start, end in pairwise(cut)]
    return answer


def _nested(entry: Mapping[str, Any], data: bytes) -> list[Any]:
    start, end = entry["data_offsets"]
    flat = _little(array(TYPECODES[entry["dtype"]], data[start:end]))
    numbers: list[Any] = flat.tolist()
    if entry["dtype"].startswith("F"):
        numbers = [None if isnan(number) else number for number in numbers]
    for inner in reversed(entry["shape"][1:]):
        numbers = [numbers[at : at + inner] for at in range(0, len(numbers), inner)]
    return numbers


def _little(numbers: "array[Any]") -> "array[Any]":
    if sys.byteorder == "big":
        numbers = numbers[:]
        numbers.byteswap()
    return numbers
