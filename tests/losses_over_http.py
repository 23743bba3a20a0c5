"""What the tests of POST /v1/losses share: how a request is sent, and what its answer must be."""

import json
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import orjson

from service.api.examples import LOSS_REQUEST
from service.relay.tensors import Tensor, encode

JSON, TENSORS, PROBLEM = "application/json", "application/vnd.safetensors", "application/problem+json"
PREFIX = "ratchet:losses:"
WAITING, BYTES, ANSWER_BYTES, LISTENING, RUNG, WORKERS = (
    PREFIX + name for name in ("waiting", "bytes", "answer_bytes", "listening", "rung", "workers")
)
ITEM = LOSS_REQUEST["items"][0]


def post(client: httpx.Client, body: Any = LOSS_REQUEST, *, wait: Any = 10, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    prefer = {} if wait is None else {"Prefer": f"wait={wait}"}
    return client.post("/v1/losses", content=content, headers={"Content-Type": JSON} | prefer | headers)


def floats(*values: float) -> Tensor:
    return Tensor("F32", (len(values),), memoryview(struct.pack(f"<{len(values)}f", *values)))


def in_tensors(request: Any = None, **tensors: Tensor) -> bytes:
    """Two sequences of one and two tokens."""
    sound = {
        "log_probs": floats(-1.0, -2.0, -3.0),
        "old_log_probs": floats(-1.0, -2.0, -3.0),
        "advantages": floats(1.0, -1.0),
        "cu_seqlens": Tensor("I64", (3,), memoryview(struct.pack("<3q", 0, 1, 3))),
    }
    request = {"items": [{"objective": "gspo", "return": ["gradients"]}]} if request is None else request
    return encode({f"0/{name}": one for name, one in {**sound, **tensors}.items()}, {"request": json.dumps(request)})


def refused(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == PROBLEM
    return answer.json()


@contextmanager
def waiting(client: httpx.Client, seconds: int = 25) -> Iterator[Callable[[], httpx.Response]]:
    """A request that waits while the block runs; call what is given for its answer."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(post, client, wait=seconds)
        time.sleep(0.5)
        assert not future.done()
        yield lambda: future.result(timeout=20)


def unavailable_now(answer: httpx.Response) -> str:
    problem = refused(answer, 503)
    assert problem["retryable"] is True
    assert answer.headers["retry-after"] == "5"
    return problem["code"]
