"""A ForwardBackwardRequest as what a session logs: flat tensors of all datums, without numpy."""

import re
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Any

from service.errors import FieldError
from service.losses.numbers import tensor
from service.relay.tensors import Tensor
from service.sessions.codec import pack
from service.sessions.tensors import MOST_TARGETS
from service.store.operations import Asked
from service.tinker.messages import BFLOAT16, FLOAT32, INT32, INT64
from service.validation import did_you_mean, escape, invalid

assert sys.byteorder == "little", "the wire's tensors are little-endian, and are taken as they are"

MOST_CELLS = 2**24  # of target_tokens of one request, filled up: a sparse one may be small and its dense form not
MOST_DATUMS = 65_536
ITEM_BYTES = {FLOAT32: 4, INT64: 8, INT32: 4, BFLOAT16: 2}
TYPECODES = {FLOAT32: "f", INT64: "q", INT32: "i"}
WHOLE = (INT64, INT32)

# What a loss takes: the wire's names, ours, and how they are stored.
INPUTS = {
    "target_tokens": ("target_tokens", "q"),
    "weights": ("weights", "f"),
    "logprobs": ("log_probs", "f"),
    "advantages": ("advantages", "f"),
    "sequence_ratio_mask": ("mask", "f"),
    "clip_low_threshold": ("clip_low_threshold", "f"),
    "clip_high_threshold": ("clip_high_threshold", "f"),
}
THEIRS = {ours: theirs for theirs, (ours, _) in INPUTS.items() if ours != theirs}
WIDE = ("target_tokens", "weights")  # may have K columns
STABLE = (
    "stable_reinforce has no public formula, so it is not offered here; use importance_sampling, ppo or cispo "
    "(in the cookbook: loss_fn=importance_sampling)"
)


def in_their_names(text: str) -> str:
    """The words of a worker about tensors of a loss, with the wire's names."""
    return re.sub(rf"\b({'|'.join(THEIRS)})\b", lambda ours: THEIRS[ours[0]], text)


@dataclass(frozen=True)
class _Values:
    """One tensor of one datum: `width` is 0 for [T], K for [T, K]."""

    numbers: "array[Any]"
    width: int


def asked(message: Any) -> Asked:
    """What to log. If not all datums have as many targets a token, its head has `widths`, which the answer's repeats: equal
    neighbours together, [how many datums, how many targets; 0 where target_tokens has one dimension].

    Raises InvalidRequest. Values (tokens outside the vocabulary, NaN) are left to the worker.
    """
    head: dict[str, Any] = {
        "kind": "forward" if message.forward_only else "forward_backward",
        "loss": _loss(message.loss_fn),
        "config": _config(message),
    }
    if not 0 < len(message.data) <= MOST_DATUMS:
        raise _wrong("/data", f"must have 1 to {MOST_DATUMS} datums, got {len(message.data)}")
    tokens = [_tokens(datum.model_input, f"/data/{i}/model_input") for i, datum in enumerate(message.data)]
    lengths = [len(row) // 4 for row in tokens]
    columns = _columns(message.data, lengths)
    widths = [[len(list(group)), width] for width, group in groupby(values.width for values in columns["target_tokens"])]
    tensors = {
        "tokens": Tensor("I32", (sum(lengths),), memoryview(b"".join(tokens))),
        "cu_seqlens": tensor(array("q", accumulate(lengths, initial=0))),
    }
    if len(widths) > 1:
        head["widths"] = widths
        if "weights" not in columns:  # what is filled up must weigh nothing
            columns["weights"] = [_ones(one) for one in columns["target_tokens"]]
    for name, values in columns.items():
        ours, typecode = INPUTS[name]
        wide = name in WIDE and any(width for _, width in widths)
        tensors[ours] = _wide(values, typecode, lengths) if wide else tensor(_joined(typecode, values))
    return Asked(head["kind"], message.seq_id, pack(head, tensors), sum(lengths))


def _ones(targets: _Values) -> _Values:
    """The weights of a datum that has none."""
    return _Values(array("f", [1.0]) * len(targets.numbers), targets.width)


def _loss(name: str) -> str:
    if name == "stable_reinforce":
        raise _wrong("/loss_fn", STABLE, "loss_not_offered")
    if name == "custom":
        raise _wrong(
            "/loss_fn", "losses are not run on the server; forward_backward_custom runs them in the client", "loss_not_offered"
        )
    return name


def _config(message: Any) -> dict[str, float]:
    config = dict(message.loss_fn_config)
    for name, value in message.loss_fn_config_v2.items():
        if value.WhichOneof("value") != "number":
            raise _wrong(f"/loss_fn_config/{escape(name)}", f"must be a number, got {value.text[:100]!r}")
        config[name] = value.number
    return config


def _tokens(chunks: Iterable[Any], pointer: str) -> bytes:
    parts = []
    for i, chunk in enumerate(chunks):
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            raise _wrong(f"{pointer}/{i}", f"must be encoded_text: models read text here, got {kind}", "modality_not_offered")
        parts.append(chunk.encoded_text.tokens)
    tokens = b"".join(parts)
    if not tokens or any(len(part) % 4 for part in parts):
        raise _wrong(pointer, f"must hold one or more tokens of 4 bytes each, got {len(tokens)} bytes")
    return tokens


def _columns(data: Sequence[Any], lengths: list[int]) -> dict[str, list[_Values]]:
    """By input, the values of each datum. Every input is in all datums or in none, except weights, which are 1."""
    names = sorted({name for datum in data for name in datum.loss_fn_inputs})
    columns: dict[str, list[_Values]] = {name: [] for name in names}
    if unknown := [name for name in names if name not in INPUTS]:
        name = unknown[0]
        i = next(i for i, datum in enumerate(data) if name in datum.loss_fn_inputs)
        detail = f"no loss takes it; known are {', '.join(INPUTS)}{did_you_mean(name, list(INPUTS))}"
        raise _wrong(f"/data/{i}/loss_fn_inputs/{escape(name)}", detail, "unknown")
    cells = 0
    for i, (datum, length) in enumerate(zip(data, lengths, strict=True)):
        inputs = datum.loss_fn_inputs
        pointer = f"/data/{i}/loss_fn_inputs"
        if "target_tokens" not in inputs:
            raise _wrong(pointer, "target_tokens is missing", "missing")
        if any(name not in inputs for name in names if name != "weights"):
            raise _wrong(pointer, f"must have the same inputs in all datums: {names}, got {sorted(inputs)}")
        for name in names:
            if name not in inputs:
                columns[name].append(_ones(columns["target_tokens"][-1]))
                continue
            width = _width(inputs[name], name, length, f"{pointer}/{name}")
            cells += length * (width or 1)
            if cells > MOST_CELLS * len(names):
                raise _wrong(pointer, f"a request may have {MOST_CELLS} targets; send fewer datums at once", "too_large")
            columns[name].append(_Values(_numbers(inputs[name], name, length, width, f"{pointer}/{name}"), width))
        if "weights" in columns and columns["weights"][-1].width != columns["target_tokens"][-1].width:
            raise _wrong(f"{pointer}/weights", "must have the shape of target_tokens")
    return columns


def _width(value: Any, name: str, length: int, pointer: str) -> int:
    """K of [T, K], and 0 of [T]. A shape that is not given is [n]."""
    if value.WhichOneof("encoding") is None or value.dtype not in ITEM_BYTES:
        raise _wrong(pointer, f"must be a tensor of float32, bfloat16, int64 or int32, got dtype {value.dtype}")
    items = len(value.dense) // ITEM_BYTES[value.dtype]
    shape = list(value.shape) or [items]
    legal = 1 <= len(shape) <= (2 if name in WIDE else 1) and shape[0] == length
    if not legal or (len(shape) == 2 and not 1 <= shape[1] <= MOST_TARGETS):
        forms = f"[{length}] or [{length}, K] with K up to {MOST_TARGETS}" if name in WIDE else f"[{length}]"
        raise _wrong(pointer, f"must have the shape {forms}: one entry for each token of model_input, got {shape[:8]}")
    return shape[1] if len(shape) == 2 else 0


def _numbers(value: Any, name: str, length: int, width: int, pointer: str) -> "array[Any]":
    """The values as they are stored, in row-major order."""
    _, typecode = INPUTS[name]
    if typecode == "q" and value.dtype not in WHOLE:
        raise _wrong(pointer, "must be int64")
    if value.WhichOneof("encoding") == "sparse_csr":
        return _dense(value, typecode, length, width, pointer)
    numbers = _read(value.dense, value.dtype, typecode, pointer)
    if len(numbers) != length * (width or 1):
        raise _wrong(pointer, f"holds {len(numbers)} numbers, its shape says {length * (width or 1)}")
    return numbers


def _read(raw: bytes, dtype: int, typecode: str, pointer: str) -> "array[Any]":
    if len(raw) % ITEM_BYTES[dtype]:
        raise _wrong(pointer, f"has {len(raw)} bytes, which is no multiple of {ITEM_BYTES[dtype]}")
    if dtype == BFLOAT16:  # the upper half of a float32
        widened = bytearray(2 * len(raw))
        widened[2::4], widened[3::4] = raw[0::2], raw[1::2]
        raw, dtype = bytes(widened), FLOAT32
    numbers = array(TYPECODES[dtype], raw)
    return numbers if numbers.typecode == typecode else array(typecode, numbers)


def _dense(value: Any, typecode: str, length: int, width: int, pointer: str) -> "array[Any]":
    """CSR filled up with zeros."""
    if not width:
        raise _wrong(pointer, "is sparse, so it must have the shape [T, K]")
    csr = value.sparse_csr
    numbers = _read(csr.values, value.dtype, typecode, pointer)
    rows, columns = (_read(raw, INT64, "q", pointer) for raw in (csr.crow_indices, csr.col_indices))
    whole = len(rows) == length + 1 and rows[0] == 0 and rows[-1] == len(numbers) == len(columns)
    if not whole or any(begin > end for begin, end in pairwise(rows)):
        raise _wrong(pointer, f"crow_indices must rise from 0 to the number of values ({len(numbers)}) in {length + 1} steps")
    if columns and not 0 <= min(columns) <= max(columns) < width:
        raise _wrong(pointer, f"col_indices must lie in 0..{width - 1}")
    dense = _zeros(typecode, length * width)
    for row, (begin, end) in enumerate(pairwise(rows)):
        for at in range(begin, end):
            dense[row * width + columns[at]] = numbers[at]
    return dense


def _zeros(typecode: str, count: int) -> "array[Any]":
    return array(typecode, bytes(count * array(typecode).itemsize))


def _joined(typecode: str, values: Iterable[_Values]) -> "array[Any]":
    numbers = array(typecode)
    for one in values:
        numbers.extend(one.numbers)
    return numbers


def _wide(values: list[_Values], typecode: str, lengths: list[int]) -> Tensor:
    """[N, K] for the widest K: narrower datums are filled up with zeros on the right."""
    widest = max(one.width or 1 for one in values)
    if sum(lengths) * widest > MOST_CELLS:
        raise _wrong("/data", f"a request may have {MOST_CELLS} targets; send fewer datums at once", "too_large")
    numbers = array(typecode)
    for one, length in zip(values, lengths, strict=True):
        width = one.width or 1
        if width == widest:
            numbers.extend(one.numbers)
            continue
        filled = _zeros(typecode, length * widest)
        for column in range(width):
            filled[column::widest] = one.numbers[column::width]
        numbers.extend(filled)
    return tensor(numbers, sum(lengths), widest)


def _wrong(pointer: str, detail: str, code: str = "invalid") -> Exception:
    return invalid([FieldError(pointer, detail, code)])
