"""A line: the queue in Redis for requests of one kind, from the API to a worker and back. Its name, bounds and keys.

Its keys, all under `ratchet:{name}:`, are

    {project}:{id}:head      the work order (see `orders`), until its deadline
    {project}:{id}:tensors   the order's second part
    {project}:{id}:state     its deadline (unix seconds); without it the request is unknown, expired, or was flushed away
    {project}:{id}:answer    the worker's answer (bytes), until it expires or was handed over
    {project}:{id}:handed    the answer while it is being handed over
    waiting, bytes           entries "id project size deadline" in order of arrival, and the sum of their sizes
    taken:{worker}           entries that a worker has taken and not answered
    workers                  the workers, scored by the time of their last sign of life
    answers, answer_bytes    kept answers: members "size key" scored by their expiry, and the sum of their sizes
    listening                set while a worker is in its loop and needs no ring
    rung                     set for a moment after a ring
    seen                     a worker was at work within the last minutes
    stop:{worker}            this worker should leave its loop
"""

from dataclasses import dataclass
from typing import NamedTuple

from service.settings import Settings


class RedisKeys(NamedTuple):
    """The keys of one request."""

    head: str
    tensors: str
    state: str
    answer: str
    handed: str


@dataclass(frozen=True)
class Line:
    """`noun` and the codes are for errors. At most `max_bytes` of requests and answers are held; answers are kept `keep_s`."""

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
    """The line of loss requests."""
    return Line(
        name="losses",
        noun="loss requests",
        busy="losses_busy",
        unavailable="loss_queue_unavailable",
        worker_died="loss_worker_died",
        max_bytes=settings.max_waiting_loss_bytes,
        keep_s=settings.loss_result_ttl_s,
    )
