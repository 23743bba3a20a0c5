"""How much of this process a key may take: so many of its requests are worked on at once, some more wait in line, and what
comes on top is told to come again. A request that only waits (for an event, a loss worker, a slow upload) takes no share."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from service.errors import RateLimited

IN_LINE = 256  # requests of a key that wait for a share


@dataclass
class _Line:
    """Of one key: its free shares, taken in the order in which requests ask."""

    free: asyncio.Semaphore
    requests: int = 0
    waiting: int = 0


class Share:
    """One request's part."""

    def __init__(self, line: _Line) -> None:
        self._line, self._held = line, False

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

    @asynccontextmanager
    async def resting(self) -> AsyncIterator[None]:
        """Others of the key may work while this request waits; then it takes its place in line."""
        self.give_back()
        yield
        await self.take()


class Shares:
    """Of all keys in this process. For the event loop's thread only."""

    def __init__(self, at_once: int, in_line: int = IN_LINE) -> None:
        self._at_once, self._in_line = at_once, in_line
        self._lines: dict[str, _Line] = {}

    @asynccontextmanager
    async def share(self, key_id: str, *, always: bool = False) -> AsyncIterator[Share]:
        """Held until the block ends. Raises RateLimited where as many requests of the key wait as may, unless the line takes
        this one `always`, for it is part of a request that was taken before."""
        line = self._lines.setdefault(key_id, _Line(asyncio.Semaphore(self._at_once)))
        if not always and line.free.locked() and line.waiting >= self._in_line:
            raise RateLimited(
                f"{self._at_once} requests of this API key are being worked on and {line.waiting} wait, "
                "which is as many as one key may have",
                code="too_many_at_once",
                hint="send fewer at once; wait for the seconds of Retry-After",
                retry_after_s=1,
            )
        line.requests += 1
        share = Share(line)
        try:
            await share.take()
            yield share
        finally:
            share.give_back()
            line.requests -= 1
            if not line.requests:
                del self._lines[key_id]


class Turns:
    """Work that costs much: so much at once of one key, so much of all keys. Whoever waits for a turn holds no thread."""

    def __init__(self, *, per_key: int, in_all: int) -> None:
        self._of_key, self._of_all = Shares(per_key), asyncio.Semaphore(in_all)

    @asynccontextmanager
    async def turn(self, key_id: str) -> AsyncIterator[None]:
        async with self._of_key.share(key_id, always=True), self._of_all:
            yield
