"""Stand-ins for workers: one computes losses, it takes the orders of a real queue and answers them at once; one samples."""

import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from sqlalchemy import select

from service.doorbell import Doorbell
from service.losses.numbers import tensor
from service.relay.line import losses
from service.relay.orders import Order, answered
from service.relay.queue import WorkerQueue
from service.sessions.codec import pack, unpack
from service.settings import Settings
from service.store import clock, operations
from service.store.operations import Answered
from service.store.session import open_store
from service.store.tables import Operation

WORKER = "wrk_standin"


def echo(order: Order) -> bytes:
    """The log-probs as if they were the gradients; their sum is no loss, but a number that can be checked."""
    data, tensors = [], {}
    for entry in order.items:
        index = entry["index"]
        if "error" in entry:
            data.append(entry)
            continue
        data.append({"index": index, "status": "ok", "loss": 0.5, "metrics": {"policy/loss": 0.5}})
        tensors[f"{index}/gradients/log_probs"] = order.tensors[f"{index}/log_probs"]
        if entry["layout"] == "ragged":
            tensors[f"{index}/cu_seqlens"] = order.tensors[f"{index}/cu_seqlens"]
    return answered("ok", data, tensors)


@contextmanager
def worker(settings: Settings, reply: Callable[[Order], bytes | None] = echo) -> Iterator[list[Order]]:
    """Answers what comes; the orders that it saw. None: takes the order and never answers."""
    queue, seen, stop = WorkerQueue(settings, losses(settings)), list[Order](), threading.Event()

    def work() -> None:
        while not stop.is_set():
            for taken in queue.take(WORKER, 0.1, 64):
                order = Order.decode(taken.parcel)
                seen.append(order)
                raw = reply(order)
                if raw is not None:
                    queue.answer(WORKER, [(taken, raw)])

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join(timeout=10)
        queue.leave()
        queue.close()


@contextmanager
def sampler(settings: Settings, reply: Callable[[dict[str, Any]], Answered] | None = None) -> Iterator[list[dict[str, Any]]]:
    """A stand-in for the worker of samplers, in every project: it answers what comes, without a lease. `reply` makes the answer
    from the operation's head, which has `id` and `lane` too; default: "ok" to each prompt. The heads that it saw."""
    store, bell, seen, stop = open_store(settings), Doorbell(settings), list[dict[str, Any]](), threading.Event()
    waits = select(Operation).where(Operation.lane != "", Operation.status == "waiting")

    def work() -> None:
        while not stop.wait(0.02):
            with store.begin() as session:
                rows = [row for row in session.scalars(waits) if row.request is not None]
                for row in rows:
                    head = {"prompts": 1, **unpack(row.request or b"")[0], "id": row.id, "lane": row.lane}
                    seen.append(head)
                    answer = (reply or said)(head)
                    later = clock.now(session) + timedelta(hours=1)
                    operations.answer(session, row.job_id, answer, attempt=1, now=clock.now(session), expires_at=later)
            for row in rows:
                bell.signal(row.job_id, "events")

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join(timeout=10)
        bell.close()
        store.close()


def said(head: dict[str, Any], text: str = "ok", reason: str = "length") -> Answered:
    """Each answer is `text`, one token a character; each prompt is the token of "?"."""
    prompts = len(head.get("texts", [0]))
    count = prompts * head["num_samples"]
    tokens = array("i", [ord(sign) for sign in text] * count)
    tensors = {
        "prompt_tokens": tensor(array("i", [63] * prompts)),
        "prompt_cu_seqlens": tensor(array("q", range(prompts + 1))),
        "tokens": tensor(tokens),
        "cu_seqlens": tensor(array("q", range(0, len(tokens) + 1, len(text)))),
        "log_probs": tensor(array("f", [-0.5] * len(tokens))),
    }
    if head["prompt_log_probs"]:
        tensors["prompt_log_probs"] = tensor(array("f", [float("nan")] * prompts))
    for name, rows in (("", len(tokens)), ("prompt_", prompts)):
        if k := head[f"top_{name}log_probs"]:
            tensors[f"top_{name}ids"] = tensor(array("i", [63] * rows * k), rows, k)
            tensors[f"top_{name}log_probs"] = tensor(array("f", [-0.5] * rows * k), rows, k)
    answer: dict[str, Any] = {"texts": [text] * count, "finish_reasons": [reason] * count}
    if head.get("pieces"):
        answer["pieces"] = {str(token): chr(token) for token in (*tokens, 63)}
        answer |= {
            "text_ends": [list(range(1, len(text) + 1))] * count,
            "prompt_texts": ["?"] * prompts,
            "prompt_ends": [[1]] * prompts,
        }
    return Answered(head["id"], pack(answer, tensors))
