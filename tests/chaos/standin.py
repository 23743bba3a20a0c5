"""A stand-in for the worker that computes losses: it takes the orders of a real queue and answers them at once."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from service.relay.line import losses
from service.relay.orders import Order, answered
from service.relay.queue import WorkerQueue
from service.settings import Settings

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
