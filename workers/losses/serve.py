"""The loss worker's loop: take all waiting orders, compute them together, answer each as soon as it is done.

A faulty order never affects another. If an order cannot be read, or its computation raises, it is answered as unavailable, so
that its caller can retry. The log names the order and where it failed, but none of its numbers.
"""

import logging
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence, Set
from math import isfinite
from typing import Any, NamedTuple

import redis
import torch

from service import tracing
from service.memory import keep_freed_memory
from service.relay import line
from service.relay.orders import Order, answered, unavailable
from service.relay.queue import Taken, WorkerQueue
from service.relay.tensors import Tensor, Tensors
from service.settings import get_settings
from workers.identity import WORKER_ID
from workers.losses import merge
from workers.losses.batch import Item, bytes_of, read, viewed
from workers.losses.compute import ItemAnswer, ItemRefused, Prepared, prepare

log = logging.getLogger(__name__)

AT_MOST = 64  # orders taken at once: they can be merged, but no other worker gets them
TOGETHER = 512  # small items prepared at once
WAIT_S = 1.0  # between two looks at the stop flag
SHARED_FOR_S = 5.0  # then a worker that also trains takes a job


def run() -> None:
    """Started by a Celery message."""
    settings = get_settings()
    keep_freed_memory()
    torch.set_num_threads(settings.torch_threads)
    queue = WorkerQueue(settings, line.losses(settings))
    try:
        serve(queue, os.environ[WORKER_ID], linger=settings.serves == "losses")
    finally:
        queue.close()


def serve(queue: WorkerQueue, worker_id: str, *, linger: bool, merging: bool = True) -> None:
    """Answer waiting orders. `linger`: continue until told to stop or Redis is down; else until nothing waits.

    `merging` false is for benchmarks that measure what merging gains."""
    until = float("inf") if linger else time.monotonic() + SHARED_FOR_S

    def work(taken: list[Taken]) -> None:
        Round(taken, lambda answers: queue.answer(worker_id, answers), merging=merging).run()

    try:
        while time.monotonic() < until and not queue.is_asked_to_stop(worker_id):
            taken = queue.take(worker_id, WAIT_S if linger else 0.0, AT_MOST)
            if not taken and not linger:
                break
            work(taken)
        queue.leave()
        work(queue.take(worker_id, 0.0, AT_MOST))  # callers that came before `leave` sent no message
    except redis.RedisError as error:  # the next message starts again, and the API tells the callers
        log.warning("no loss requests for now, Redis does not answer: %s", error)


class _Open(NamedTuple):
    """An order that is not answered yet."""

    taken: Taken
    order: Order
    items: dict[int, Item]  # items to compute, by their place in the order
    done: dict[int, ItemAnswer]


class _Work(NamedTuple):
    opened: _Open
    place: int
    item: Item


Answered = Sequence[tuple[Taken, bytes]]


class Round:
    """Orders that were taken together. `answer` is called with orders and their answers as they are done; if it raises, the
    round ends."""

    def __init__(self, taken: Sequence[Taken], answer: Callable[[Answered], None], *, merging: bool = True) -> None:
        self._taken, self._answer, self._merging = list(taken), answer, merging
        self._finished, self._answered = list[tuple[Taken, bytes]](), set[str]()
        self._spans = dict[str, Any]()  # of orders that are not answered yet, each in its caller's trace

    def run(self) -> None:
        """Compute small items first, together; then large ones, one by one."""
        small, large = list[_Work](), list[_Work]()
        for taken in self._taken:
            for work in self._opened(taken):
                (small if work.item.layout.cells <= merge.SMALL_CELLS else large).append(work)
        self._send()
        for start in range(0, len(small), TOGETHER):
            self._compute(small[start : start + TOGETHER])
        for work in large:
            self._compute([work])

    def _opened(self, taken: Taken) -> list[_Work]:
        try:
            opened = open_order(taken)
        except Exception as error:
            self._fail(taken, error)
            return []
        self._spans[taken.id] = tracing.begin("loss request", parent=opened.order.traceparent, loss_id=taken.id)
        self._settle(opened)
        return [_Work(opened, place, item) for place, item in opened.items.items()]

    def _compute(self, works: Sequence[_Work]) -> None:
        ready = list[tuple[_Work, Prepared]]()
        for work in works:
            taken = work.opened.taken
            if taken.id in self._answered:
                continue
            if time.time() > work.opened.order.deadline:
                self._finish(taken, unavailable("loss_timed_out", "its time was over before its turn came"))
                continue
            try:
                ready.append((work, prepare(work.item)))
            except ItemRefused as refused:
                work.opened.done[work.place] = refused_answer(work.item, refused)
                self._settle(work.opened)
            except Exception as error:
                self._fail(taken, error)
        self._send()
        alone = [[place] for place in range(len(ready))]
        for group in merge.groups([prepared for _, prepared in ready]) if self._merging else alone:
            self._compute_merged([ready[place] for place in group])
            self._send()

    def _compute_merged(self, group: Sequence[tuple[_Work, Prepared]]) -> None:
        batch = self._traced_batch({work.opened.taken.id for work, _ in group}, len(group))
        try:
            computed = merge.compute([prepared for _, prepared in group])
        except Exception as error:
            if len(group) == 1:
                self._fail(group[0][0].opened.taken, error)
                return
            computed = None
        finally:
            tracing.end(batch)
        if computed is None:  # one by one: only the faulty item fails. Not in the handler, which keeps the batch alive
            for single in group:
                self._compute_merged([single])
            return
        for (work, _), answer in zip(group, computed, strict=True):
            work.opened.done[work.place] = answer
            self._settle(work.opened)

    def _traced_batch(self, ids: Set[str], items: int) -> Any:
        """A span of its own, since it belongs to several traces; it links the spans of its orders."""
        if not tracing.is_on():
            return None
        spans = [span for id_ in ids if (span := self._spans.get(id_)) is not None]
        return tracing.begin("loss batch", links=map(tracing.of, spans), items=items, requests=len(ids))

    def _settle(self, opened: _Open) -> None:
        """Answer the order if all its items are done."""
        if len(opened.done) < len(opened.order.items):
            return
        try:
            raw = finished(opened.order, [opened.done[place] for place in range(len(opened.done))])
        except Exception as error:
            self._fail(opened.taken, error)
            return
        self._finish(opened.taken, raw)

    def _fail(self, taken: Taken, error: Exception) -> None:
        if taken.id not in self._answered:
            self._finish(taken, refusal(taken.id, error))

    def _finish(self, taken: Taken, raw: bytes) -> None:
        self._answered.add(taken.id)
        tracing.end(self._spans.pop(taken.id, None))
        self._finished.append((taken, raw))

    def _send(self) -> None:
        """Send all answers finished since the last call, in one round trip to Redis."""
        if finished := self._finished:
            self._finished = []
            self._answer(finished)


# ---------------------------------------------------------------- orders to items, answers to bytes


def open_order(taken: Taken) -> _Open:
    """Decode an order. Any exception may come from bad bytes; none is expected, because the API wrote them."""
    order = Order.decode(taken.parcel)
    sent: dict[int, dict[str, Tensor]] = {}
    for name, raw in order.tensors.items():
        index, _, name_in_batch = name.partition("/")
        sent.setdefault(int(index), {})[name_in_batch] = raw
    opened = _Open(taken, order, {}, {})
    for place, entry in enumerate(order.items):
        if "error" in entry:
            opened.done[place] = ItemAnswer({"status": "error", **entry})
        else:
            opened.items[place] = read(entry, {name: viewed(raw) for name, raw in sent[entry["index"]].items()})
    return opened


def refused_answer(item: Item, refused: ItemRefused) -> ItemAnswer:
    errors = [error.as_dict() for error in refused.errors]
    several = {"errors": errors} if len(errors) > 1 else {}
    return ItemAnswer({"index": item.index, "status": "error", "error": errors[0], **several})


def finished(order: Order, items: Sequence[ItemAnswer]) -> bytes:
    """The answer of an order. It has no tensors if all items failed, or if one failed and all_or_nothing is set."""
    data, ok = [item.body for item in items], [item.ok for item in items]
    tensors: Tensors = {}
    refused = not any(ok) or (order.all_or_nothing and not all(ok))
    if not refused:
        for item in items:
            tensors |= {f"{item.body['index']}/{name}": bytes_of(values) for name, values in item.tensors.items()}
    outcome = "invalid" if refused else "ok"
    try:
        return answered(outcome, data, tensors)
    except ValueError:  # some number is not finite, which is rare
        return answered(outcome, _in_json(data), tensors)


def _in_json(value: Any) -> Any:
    """Replace numbers that are not finite, which JSON cannot express, by strings."""
    if isinstance(value, float) and not isfinite(value):
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _in_json(entry) for key, entry in value.items()}
    return [_in_json(entry) for entry in value] if isinstance(value, list) else value


def refusal(order_id: str, error: Exception) -> bytes:
    """The answer to an order that failed with this error, which is also logged."""
    where = "".join(traceback.format_tb(error.__traceback__))  # without the message: it may quote numbers
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        log.error("loss request %s: out of memory\n%s", order_id, where)
        detail = "the worker has not enough memory for it; send fewer or smaller items, with the weights of the whole step"
        return unavailable("loss_out_of_memory", detail)
    log.error("loss request %s: %s\n%s", order_id, type(error).__name__, where)
    return unavailable("loss_internal", "it could not be computed, by a fault of this service; the worker's log has the trace")
