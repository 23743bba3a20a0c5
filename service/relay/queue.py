"""The queue of requests from the API to a worker and back, kept in Redis for a limited time. `line` names the keys.

The API's half is asynchronous, the worker's is not. If a request is lost, its caller gets an error and can retry.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.retry import Retry

from service.doorbell import TIMEOUT_S, channel_name, redis_py_url
from service.errors import Busy, Unavailable
from service.relay import scripts
from service.relay.line import Line
from service.relay.orders import Parcel, unavailable
from service.settings import Settings

BLOCK_S = 5.0  # the longest that `take` waits
LISTENS_FOR_S = 10.0  # longer than BLOCK_S, and than most batches take
SEEN_FOR_S = 600
ALIVE_FOR_S = 25  # a worker gives a sign of life every ten seconds; after this long without one it is dead
STOP_FOR_S = 3600
RING_AGAIN_S = 2.0
HANDED_MS = 10_000  # for a caller whose connection broke while fetching
TRANSFER_TIMEOUT_S = 5.0  # for one call to Redis, even with the largest request
CONNECTIONS = 32  # of one API process
SIGNAL = "answer"


def _options(settings: Settings, timeout_s: float) -> dict[str, Any]:
    """Options for redis-py, without automatic retries."""
    return {
        "url": redis_py_url(settings.redis_url.get_secret_value()),
        "socket_timeout": timeout_s,
        "socket_connect_timeout": TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),
    }


# ---------------------------------------------------------------- the API's half


class Standing(NamedTuple):
    """The state of a request: answered, waiting until its deadline, or (neither) unknown."""

    answer: bytes | None
    deadline: float | None


def _standing(values: list[Any]) -> Standing:
    answer, deadline = values
    return Standing(answer, None if deadline is None else float(deadline))


class RequestQueue:
    """The API's half. Every method raises Unavailable if Redis does not answer."""

    def __init__(self, settings: Settings, line: Line) -> None:
        self._line, self._key = line, line.key
        # Without a timeout of the client's, because `_answering` has one, and this one would make a task for each command.
        options = {**_options(settings, TRANSFER_TIMEOUT_S), "socket_timeout": None, "max_connections": CONNECTIONS}
        self._redis = redis.asyncio.Redis.from_url(**options)
        # First come, first served, without a time limit for a connection: each use of a connection is bounded in time.
        self._turns = asyncio.Semaphore(CONNECTIONS)

    async def push(self, project: str, request_id: str, parcel: Parcel, deadline: float) -> bool:
        """Put a work order into the queue. Returns whether a worker must be rung. Raises Busy if too many bytes wait."""
        keys, now = self._line.of_request(project, request_id), time.time()
        left_ms = max(1, int((deadline - now) * 1000))
        names = (
            self._key("waiting"),
            self._key("bytes"),
            self._key("answers"),
            self._key("answer_bytes"),
            self._key("listening"),
            self._key("rung"),
            keys.head,
            keys.tensors,
            keys.state,
        )
        arguments = (
            f"{request_id} {project} {parcel.size} {deadline}",
            parcel.size,
            self._line.max_bytes,
            now,
            left_ms + int(self._line.keep_s * 1000),
            deadline,
            int(RING_AGAIN_S * 1000),
        )
        async with self._turns, self._answering(), self._redis.pipeline(transaction=False) as pipe:
            pipe.set(keys.tensors, parcel.tensors, px=left_ms)
            pipe.set(keys.head, parcel.head, px=left_ms)
            pipe.eval(scripts.ADMIT, len(names), *names, *arguments)
            *_, (admitted, number) = await pipe.execute()
        if not admitted:
            raise Busy(
                f"{number} bytes of {self._line.noun} and answers are held already; at most {self._line.max_bytes} may be",
                code=self._line.busy,
                hint="send it again in a moment; a request that holds its answer (Prefer: wait) leaves nothing behind",
            )
        return bool(number)

    async def standing(self, project: str, request_id: str) -> Standing:
        """The request's state. Changes nothing."""
        keys = self._line.of_request(project, request_id)
        async with self._turns, self._answering():
            values: list[Any] = await self._redis.mget(keys.answer, keys.state)
        return _standing(values)

    async def collect(self, project: str, request_id: str) -> Standing:
        """The request's state. If it is answered, the answer is removed from Redis."""
        keys = self._line.of_request(project, request_id)
        names = (self._key("answers"), self._key("answer_bytes"), keys.answer, keys.state, keys.handed)
        async with self._turns, self._answering(), self._redis.pipeline(transaction=False) as pipe:
            pipe.eval(scripts.COLLECT, len(names), *names, HANDED_MS)
            pipe.getdel(keys.handed)  # not in the script: large values are slow in Lua
            deadline, answer = await pipe.execute()
        return _standing([answer, deadline])

    async def must_ring(self) -> bool:
        """Whether requests wait, no worker is in its loop, and nobody has just rung."""
        async with self._turns, self._answering():
            return bool(
                await self._redis.eval(
                    scripts.RING, 3, self._key("waiting"), self._key("listening"), self._key("rung"), int(RING_AGAIN_S * 1000)
                )
            )

    async def worker_was_seen(self) -> bool:
        async with self._turns, self._answering():
            return bool(await self._redis.exists(self._key("seen")))

    async def close(self) -> None:
        await self._redis.aclose()

    @asynccontextmanager
    async def _answering(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(TRANSFER_TIMEOUT_S):
                yield
        except (redis.RedisError, OSError) as error:  # a TimeoutError is an OSError
            noun, code = self._line.noun, self._line.unavailable
            detail = f"the queue of {noun} does not answer just now; nothing was computed"
            raise Unavailable(detail, code=code) from error


# ---------------------------------------------------------------- the worker's half


class Taken(NamedTuple):
    """An order that a worker has taken."""

    id: str
    project: str
    parcel: Parcel
    entry: bytes


def _whose(entry: bytes) -> tuple[str, str]:
    """Id and project of an entry."""
    request_id, project, _, _ = entry.decode().split(" ")
    return request_id, project


class WorkerQueue:
    """The worker's half, for one thread at a time. Every method raises redis.RedisError if Redis does not answer."""

    def __init__(self, settings: Settings, line: Line) -> None:
        self._line, self._key = line, line.key
        self._redis = redis.Redis.from_url(**_options(settings, BLOCK_S + TRANSFER_TIMEOUT_S))

    def take(self, worker_id: str, timeout_s: float, at_most: int) -> list[Taken]:
        """Wait for orders and take up to `at_most`; none after `timeout_s` (0: do not wait).

        Orders that this worker took earlier and did not answer, because its connection broke, come first. Orders past their
        deadline are dropped. A worker that leaves its loop calls `leave`, then takes once more with timeout 0.
        """
        taken = self._key(f"taken:{worker_id}")
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.set(self._key("seen"), 1, ex=SEEN_FOR_S)
            if timeout_s > 0:
                pipe.set(self._key("listening"), 1, px=int(LISTENS_FOR_S * 1000))
            pipe.lrange(taken, 0, -1)
            entries: list[bytes] = pipe.execute()[-1]
        if entries:
            return self._found(taken, entries, self._fetched(entries))
        return self._moved(taken, min(timeout_s, BLOCK_S), at_most)

    def _moved(self, taken: str, timeout_s: float, at_most: int) -> list[Taken]:
        """Move waiting orders to this worker."""
        if timeout_s <= 0:
            moved: Any = self._redis.eval(scripts.TAKE, 3, self._key("waiting"), self._key("bytes"), taken, at_most)
            return self._found(taken, moved, self._fetched(moved))
        first: Any = self._redis.execute_command("BLMOVE", self._key("waiting"), taken, "LEFT", "RIGHT", timeout_s)
        if first is None:
            return []
        with self._redis.pipeline(transaction=False) as pipe:  # most often there is only one order
            pipe.eval(scripts.TAKE, 3, self._key("waiting"), self._key("bytes"), taken, at_most - 1, first)
            pipe.mget(self._parts(first))
            moved, parts = pipe.execute()
        return self._found(taken, moved, [*parts, *self._fetched(moved[1:])])

    def _fetched(self, entries: list[bytes]) -> list[bytes | None]:
        """The two parts of each order, in one list."""
        parts: Any = self._redis.mget([key for entry in entries for key in self._parts(entry)]) if entries else []
        return parts

    def _parts(self, entry: bytes) -> tuple[str, str]:
        """The keys of the order's two parts."""
        request_id, project = _whose(entry)
        keys = self._line.of_request(project, request_id)
        return keys.head, keys.tensors

    def _found(self, taken: str, entries: list[bytes], parts: list[bytes | None]) -> list[Taken]:
        """The orders, without expired ones, which are removed from this worker's list."""
        parcels = [
            None if head is None or tensors is None else Parcel(head, tensors)
            for head, tensors in zip(parts[::2], parts[1::2], strict=True)
        ]
        gone = [entry.decode() for entry, parcel in zip(entries, parcels, strict=True) if parcel is None]
        if gone:
            with self._redis.pipeline(transaction=False) as pipe:
                for entry in gone:
                    pipe.lrem(taken, 1, entry)
                pipe.execute()
        pairs = zip(entries, parcels, strict=True)
        return [Taken(*_whose(entry), parcel, entry) for entry, parcel in pairs if parcel is not None]

    def answer(self, worker_id: str, answers: Sequence[tuple[Taken, bytes]]) -> None:
        """Store the answers (see `orders`), and wake the API processes that wait for them."""
        with self._redis.pipeline(transaction=True) as pipe:
            for order, raw in answers:
                keys = self._line.of_request(order.project, order.id)
                pipe.set(keys.answer, raw, px=int(self._line.keep_s * 1000))
                pipe.zadd(self._key("answers"), {f"{len(raw)} {keys.answer}": time.time() + self._line.keep_s})
                pipe.incrby(self._key("answer_bytes"), len(raw))
                pipe.unlink(keys.head, keys.tensors)
                pipe.lrem(self._key(f"taken:{worker_id}"), 1, order.entry.decode())
                pipe.publish(channel_name(order.id), SIGNAL)
            pipe.execute()

    def give_up(self, worker_id: str) -> int:
        """Answer all orders that a dead worker had taken with a retryable error. Returns how many."""
        entries: Any = self._redis.lrange(self._key(f"taken:{worker_id}"), 0, -1)
        refusal = unavailable(self._line.worker_died, "the worker that computed this died; send the request again")
        self.answer(worker_id, [(Taken(*_whose(entry), Parcel(b"", b""), entry), refusal) for entry in entries])
        return len(entries)

    def alive(self, worker_id: str) -> int:
        """Give this worker's sign of life; call it every ten seconds. Orders taken by workers without a recent sign of life go
        back into the queue. Returns how many. So if a worker dies with its parent, its callers wait longer but get answers.
        """
        names = (self._key("waiting"), self._key("bytes"), self._key("workers"))
        return int(self._redis.eval(scripts.ALIVE, len(names), *names, worker_id, ALIVE_FOR_S, self._key("taken:")))  # pyright: ignore[reportArgumentType]

    def goodbye(self, worker_id: str) -> None:
        """Sign this worker off. If it still has orders, another worker's next `alive` puts them back."""
        self._redis.zadd(self._key("workers"), {worker_id: 0})

    def leave(self) -> None:
        """Say that rings are needed from now on. Another worker still in its loop revokes this at its next `take`."""
        self._redis.delete(self._key("listening"), self._key("rung"))

    def ask_to_stop(self, worker_id: str) -> None:
        self._redis.set(self._key(f"stop:{worker_id}"), 1, ex=STOP_FOR_S)

    def is_asked_to_stop(self, worker_id: str) -> bool:
        return bool(self._redis.exists(self._key(f"stop:{worker_id}")))

    def close(self) -> None:
        self._redis.close()
