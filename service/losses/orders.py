"""What travels between the API and a worker: the work order, and its answer. Both are safetensors files.

An order has the metadata `order`, JSON:

    {"id", "project", "deadline": unix seconds, "all_or_nothing": bool, "items": [
        {"index", "objective": every axis in full, "dtype": "float64" | "float32" | "bfloat16", "layout": "ragged" | "padded",
         "return": [names], "on_nonfinite": "refuse" | "mask", "on_singleton": "refuse" | "zero", "seed", "warnings": [texts]}
        | {"index", "error": {...}, "errors": [...]}]}            refused already; goes into the answer as it is

and tensors `i/NAME`: flat with `i/cu_seqlens` (int64) where ragged, [B, T] where padded. An answer has the metadata

    "outcome"    ok: items were computed · invalid: nothing can be answered but what is wrong · unavailable: try again
    "response"   {"object": "list", "data": [an item's answer, in order]}      of ok and invalid
    "problem"    {"code", "detail", "retryable": true}                          of unavailable

and tensors `i/NAME` in the layout that was sent; in JSON they are members of their item.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from service.losses.tensors import Tensor, Tensors, decode, encode

Outcome = Literal["ok", "invalid", "unavailable"]


@dataclass(frozen=True)
class Order:
    """A work order, read."""

    id: str
    project: str
    deadline: float
    all_or_nothing: bool
    items: list[dict[str, Any]]
    tensors: Tensors

    def encode(self) -> bytes:
        head = {
            "id": self.id,
            "project": self.project,
            "deadline": self.deadline,
            "all_or_nothing": self.all_or_nothing,
            "items": self.items,
        }
        return encode(self.tensors, {"order": _json(head)})

    @classmethod
    def decode(cls, raw: bytes | memoryview) -> "Order":
        tensors, metadata = decode(raw)
        return cls(**json.loads(metadata["order"]), tensors=tensors)


@dataclass(frozen=True)
class Answer:
    """A worker's answer, read. `raw` is what it was read from."""

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
    """The answer of a worker that could look at every item."""
    return encode(tensors, {"response": _json({"object": "list", "data": data}), "outcome": outcome})


def unavailable(code: str, detail: str) -> bytes:
    """The answer of one that could not."""
    return encode({}, {"problem": _json({"code": code, "detail": detail, "retryable": True}), "outcome": "unavailable"})


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
