"""Limits on how much of this process one key may use: a number of its requests run at once, more wait in line, and beyond
that they are refused. A request that only waits (for an event, a loss worker, a slow upload) holds no share."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from service.errors import RateLimited

IN_LINE = 256  # requests of a key that wait for a share


@dataclass
class _Line:
    """The line of one key. Its free shares are taken in the order in which requests ask."""

    free: asyncio.Semaphore
    requests: int = 0
    waiting: int = 0


class Share:
    """The share of one request."""

    def __init__(self, line: _Line, forget: Callable[[], object]) -> None:
        self._line, self._held, self._forget = line, False, forget
        self._left = False
        line.requests += 1

    async def take(self) -> None:
        self._line.waiting += 1
        try:
            await self._line.free.acquire()
        finally:
            self._line.waiting -= 1
        self._held = True

    def give_back(self) -> None:
        if self._held:
            self._held = False
            self._line.free.release()

    def leave(self) -> None:
        """The request needs it no more. May be said twice."""
        if self._left:
            return
        self._left = True
        self.give_back()
        self._line.requests -= 1
        if not self._line.requests:
            self._forget()

    @asynccontextmanager
    async def resting(self) -> AsyncIterator[None]:
        """Release the share inside the block, so that other requests of the key can run; then wait in line for it again."""
        self.give_back()
        yield
        await self.take()


class Shares:
    """The shares of all keys in this process. For the event loop's thread only."""

    def __init__(self, at_once: int, in_line: int = IN_LINE) -> None:
        self._at_once, self._in_line = at_once, in_line
        self._lines: dict[str, _Line] = {}

    @asynccontextmanager
    async def share(self, key_id: str, *, always: bool = False) -> AsyncIterator[Share]:
        """Hold a share until the block ends. `always`: for work that is part of a request which was admitted before."""
        share = await self.enter(key_id, always=always)
        try:
            yield share
        finally:
            share.leave()

    async def enter(self, key_id: str, *, always: bool = False) -> Share:
        """Take a share, which the caller has to `leave`. Raises RateLimited if the key's line is full, unless `always`."""
        line = self._lines.setdefault(key_id, _Line(asyncio.Semaphore(self._at_once)))
        if not always and line.free.locked() and line.waiting >= self._in_line:
            raise RateLimited(
                f"{self._at_once} requests of this API key are being worked on and {line.waiting} wait, "
                "which is as many as one key may have",
                code="too_many_at_once",
                hint="send fewer at once; wait for the seconds of Retry-After",
                retry_after_s=1,
            )
        share = Share(line, partial(self._lines.pop, key_id))
        try:
            await share.take()
        except BaseException:
            share.leave()
            raise
        return share


class Turns:
    """Limits costly work to `per_key` at once for each key and `in_all` for all keys. Waiting for a turn blocks no thread."""

    def __init__(self, *, per_key: int, in_all: int) -> None:
        self._of_key, self._of_all = Shares(per_key), asyncio.Semaphore(in_all)

    @asynccontextmanager
    async def turn(self, key_id: str) -> AsyncIterator[None]:
        async with self._of_key.share(key_id, always=True), self._of_all:
            yield
