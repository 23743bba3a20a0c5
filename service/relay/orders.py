"""The messages between the API and a worker: the work order, and its answer.

An order has two parts, so that a body in safetensors is passed on unchanged. The head is JSON:

    {"id", "project", "deadline": unix seconds, "all_or_nothing": bool, "items": [
        {"index", "objective": every axis in full, "dtype": "float64" | "float32" | "bfloat16", "layout": "ragged" | "padded",
         "return": [names], "on_nonfinite": "refuse" | "mask", "on_singleton": "refuse" | "zero", "seed", "warnings": [texts]}
        | {"index", "error": {...}, "errors": [...]}]}            already refused; copied into the answer

The second part is a safetensors file with the tensors `i/NAME`: flat with `i/cu_seqlens` if ragged, [B, T] if padded. It may
also contain metadata, and tensors of refused items. An answer is one safetensors file with the metadata

    "outcome"    ok: items were computed · invalid: the answer has errors only · unavailable: try again
    "response"   {"object": "list", "data": [an item's answer, in order]}      for ok and invalid
    "problem"    {"code", "detail", "retryable": true}                          for unavailable

and the tensors `i/NAME` in the layout of the request. In a JSON response they are members of their item.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

from service.relay.tensors import Tensor, Tensors, decode, encode

Outcome = Literal["ok", "invalid", "unavailable"]


class Parcel(NamedTuple):
    """An encoded order: its two parts."""

    head: bytes
    tensors: bytes

    @property
    def size(self) -> int:
        return len(self.head) + len(self.tensors)


@dataclass(frozen=True)
class Order:
    """A decoded work order."""

    id: str
    project: str
    deadline: float
    all_or_nothing: bool
    items: list[dict[str, Any]]
    tensors: Tensors
    traceparent: str | None = None  # of the request that it came with, while that is traced

    def encode(self, body: bytes | None = None) -> Parcel:
        """`body`: a safetensors file that already contains the tensors."""
        head = {
            "id": self.id,
            "project": self.project,
            "deadline": self.deadline,
            "all_or_nothing": self.all_or_nothing,
            "items": self.items,
            **({} if self.traceparent is None else {"traceparent": self.traceparent}),
        }
        return Parcel(_json(head).encode(), encode(self.tensors, {}) if body is None else body)

    @classmethod
    def decode(cls, parcel: Parcel) -> "Order":
        tensors, _ = decode(parcel.tensors)
        known = {field.name for field in fields(cls)}
        head = {name: value for name, value in json.loads(parcel.head).items() if name in known}  # a newer API says more
        return cls(**head, tensors=tensors)


@dataclass(frozen=True)
class Answer:
    """A worker's decoded answer. `raw` are its bytes."""

    outcome: Outcome
    data: list[dict[str, Any]]
    tensors: Tensors
    problem: dict[str, Any] | None = None
    raw: bytes = b""

    @classmethod
    def decode(cls, raw: bytes) -> "Answer":
        tensors, metadata = decode(raw)
        if metadata["outcome"] == "unavailable":
            return cls("unavailable", [], {}, json.loads(metadata["problem"]), raw)
        outcome: Outcome = "invalid" if metadata["outcome"] == "invalid" else "ok"
        return cls(outcome, json.loads(metadata["response"])["data"], tensors, None, raw)


def answered(outcome: Literal["ok", "invalid"], data: list[dict[str, Any]], tensors: Mapping[str, Tensor]) -> bytes:
    """The encoded answer of a worker that handled every item."""
    return encode(tensors, {"response": _json({"object": "list", "data": data}), "outcome": outcome})


def unavailable(code: str, detail: str) -> bytes:
    """The encoded answer of a worker that failed; the caller can retry."""
    return encode({}, {"problem": _json({"code": code, "detail": detail, "retryable": True}), "outcome": "unavailable"})


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
