"""A line: requests of one kind on their way from the API to a worker and back. What it is called, what it may hold, its keys.

Under `ratchet:{name}:` stand

    {project}:{id}:head      the work order (see `orders`), until its deadline
    {project}:{id}:tensors   its other part
    {project}:{id}:state     its deadline (unix seconds); without it the request is unknown, expired, or was flushed away
    {project}:{id}:answer    the worker's answer (bytes), until it expires or was handed over
    {project}:{id}:handed    the same for the moment in which it is handed over
    waiting, bytes           entries "id project size deadline" in order of arrival, and the sum of their sizes
    taken:{worker}           entries that a worker has in hand
    workers                  who works here, scored by when they said so last
    answers, answer_bytes    answers that are kept: members "size key" scored by their expiry, and the sum of their sizes
    listening                a worker is in its loop and will look by itself: no ring is needed
    rung                     somebody rang a moment ago
    seen                     a worker was at work within the last minutes
    stop:{worker}            this worker should leave its loop
"""

from dataclasses import dataclass
from typing import NamedTuple

from service.settings import Settings


class RedisKeys(NamedTuple):
    """Of one request."""

    head: str
    tensors: str
    state: str
    answer: str
    handed: str


@dataclass(frozen=True)
class Line:
    """`noun` and the codes are for refusals; at most `max_bytes` of requests and answers are held, answers for `keep_s`."""

    name: str
    noun: str
    busy: str
    unavailable: str
    worker_died: str
    max_bytes: int
    keep_s: float

    def key(self, name: str) -> str:
        return f"ratchet:{self.name}:{name}"

    def of_request(self, project: str, request_id: str) -> RedisKeys:
        return RedisKeys(*(self.key(f"{project}:{request_id}:{part}") for part in RedisKeys._fields))


def losses(settings: Settings) -> Line:
    """Of loss requests."""
    return Line(
        name="losses",
        noun="loss requests",
        busy="losses_busy",
        unavailable="loss_queue_unavailable",
        worker_died="loss_worker_died",
        max_bytes=settings.max_waiting_loss_bytes,
        keep_s=settings.loss_result_ttl_s,
    )
