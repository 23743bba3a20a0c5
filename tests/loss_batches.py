"""Sound batches of loss requests for tests to spoil, and what is found wrong with them."""

import math
import struct

from service.losses import request as requests
from service.relay.tensors import Tensor

NAN, INF = math.nan, math.inf
FORMATS = {"F64": "d", "F32": "f", "I64": "q", "I32": "i", "U8": "B", "BOOL": "?"}


def tensor(values, *shape, dtype="F32"):
    packed = struct.pack(f"<{len(values)}{FORMATS[dtype]}", *values)
    return Tensor(dtype, shape or (len(values),), memoryview(packed))


def numbers(tensor):
    return list(struct.unpack(f"<{len(tensor)}{FORMATS[tensor.dtype]}", tensor.data))


def item(**batch):
    """Two sequences of 2 and 3 tokens, under plain GSPO."""
    sound = {
        "log_probs": [[-1.0, -2.0], [-0.5, -1.5, -2.5]],
        "old_log_probs": [[-1.0, -2.0], [-0.5, -1.5, -2.5]],
        "advantages": [1.0, -1.0],
    }
    laid = {name: value for name, value in {**sound, **batch}.items() if value is not ...}
    return {"objective": "gspo", "batch": laid}


def flat(**batch):
    """The same as tensors."""
    sound = {
        "log_probs": tensor([-1.0, -2.0, -0.5, -1.5, -2.5]),
        "old_log_probs": tensor([-1.0, -2.0, -0.5, -1.5, -2.5]),
        "advantages": tensor([1.0, -1.0]),
        "cu_seqlens": tensor([0, 2, 5], dtype="I32"),
    }
    return {name: value for name, value in {**sound, **batch}.items() if value is not ...}


def padded(**batch):
    sound = {
        "log_probs": tensor([-1.0, -2.0, NAN, -0.5, -1.5, -2.5], 2, 3),
        "old_log_probs": tensor([-1.0, -2.0, NAN, -0.5, -1.5, -2.5], 2, 3),
        "response_mask": tensor([1, 1, 0, 1, 1, 1], 2, 3, dtype="U8"),
        "advantages": tensor([1.0, -1.0]),
    }
    return {name: value for name, value in {**sound, **batch}.items() if value is not ...}


def check(*items, **more):
    return requests.check({"items": list(items), **more})


def check_tensors(batch, objective="gspo", **more):
    tensors = {f"0/{name}": value for name, value in batch.items()}
    return requests.check({"items": [{"objective": objective, **more}]}, tensors)


def errors(checked):
    """What is wrong with the only item."""
    (entry,) = checked.items
    assert entry["status"] == "error", entry
    said = entry.get("errors", [entry["error"]])
    assert said[0] == entry["error"]
    assert len(said) == 1 or len(entry["errors"]) > 1
    assert not checked.tensors
    assert [error.pointer for error in checked.errors] == [one["pointer"] for one in said]
    return [(one["pointer"].removeprefix("/items/0"), one["code"], one["detail"]) for one in said]


def error(checked):
    (one,) = errors(checked)
    return one
