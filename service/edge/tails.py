"""Followers of one job share one reader of its log: however many there are in this process, an event is read and encoded
once, or once for each pace at which they are told. Older events than the newest ones kept here each follower reads for
itself."""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from time import monotonic

from starlette.concurrency import run_in_threadpool

from service.doorbell import Signals, Watch
from service.errors import NotFound

POLL_S = 2.0  # the delay of an event whose signal was lost
KEPT = 1000  # newest events kept of a job, for followers that are slightly behind


@dataclass(frozen=True)
class TailLine:
    """An event, encoded for sending."""

    seq: int
    text: bytes


@dataclass(frozen=True)
class Look:
    """The result of one read of the log."""

    lines: list[TailLine]
    last: int  # number of the newest event covered by this read
    has_more: bool
    is_over: bool  # there will be no further events
    revoked: frozenset[str] = field(default_factory=frozenset)  # those of the given keys that are no longer valid


Looking = Callable[[int | None, frozenset[str]], Look]  # arguments: event to read after (None: find the end), keys to check


class Tail:
    """The newest events of one job, kept while it has followers. Between two reads of what is new pass at least `every_s`."""

    def __init__(self, signals: Signals, job_id: str, look: Looking, every_s: float) -> None:
        self._signals, self._job_id, self._look, self._every_s = signals, job_id, look, every_s
        self._lines: deque[TailLine] = deque(maxlen=KEPT)
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.followers: Counter[str] = Counter()  # by the id of their key
        self.revoked: frozenset[str] = frozenset()
        self.last: int | None = None  # number of the newest event; None before the first look
        self.ended = False  # no more reads: the job has ended or is gone, reading failed, or the server stops
        self.error: Exception | None = None

    def start(self) -> None:
        # The watch begins before the first read, so no signal is missed between reading and waiting.
        watching = ExitStack()
        bell = watching.enter_context(self._signals.watch(self._job_id))
        self._task = asyncio.create_task(self._run(bell), name=f"tail-{self._job_id}")
        self._task.add_done_callback(lambda _: watching.close())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def behind(self, seq: int) -> list[TailLine] | None:
        """The events after number `seq`; None if one of them is no longer kept here."""
        if self.last is None or seq >= self.last:
            return []
        count = self.last - seq  # they are numbered without gaps
        return [self._lines[i] for i in range(-count, 0)] if count <= len(self._lines) else None

    async def wait(self, timeout_s: float) -> bool:
        """Wait for news: True when there is some, False when the time is up."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                return await self._changed.wait()
        return False

    async def _run(self, bell: Watch) -> None:
        try:
            while not self.ended:
                look, looked_at = await run_in_threadpool(self._look, self.last, frozenset(self.followers)), monotonic()
                self._take(look)
                if not look.has_more and not self.ended:
                    await bell.wait(POLL_S)
                    await self._rest(looked_at + self._every_s)
        except NotFound:  # the job was deleted
            self.end()
        except Exception as error:  # the store is away: the streams break, and their clients reconnect
            self.error = error
            self.end()

    async def _rest(self, until: float) -> None:
        """Wait for the time of the next read. A key that is revoked meanwhile is noticed as soon as without a pace."""
        while (left := until - monotonic()) > POLL_S:
            await asyncio.sleep(POLL_S)
            look = await run_in_threadpool(self._look, None, frozenset(self.followers))
            if look.revoked - self.revoked:
                self.revoked = look.revoked
                self._wake()
        await asyncio.sleep(left)

    def _take(self, look: Look) -> None:
        news = look.lines or look.is_over or self.last is None or look.revoked - self.revoked
        self._lines.extend(look.lines)
        self.last, self.revoked = look.last, look.revoked
        if look.is_over:
            self.end()
        elif news:
            self._wake()

    def end(self) -> None:
        self.ended = True
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class Tails:
    """The tails of all jobs that are followed in this process. For the event loop's thread only."""

    def __init__(self, signals: Signals) -> None:
        self._signals = signals
        self._tails: dict[tuple[str, float], Tail] = {}

    @contextmanager
    def follow(self, job_id: str, key_id: str, look: Looking, every_s: float) -> Iterator[Tail]:
        """The job's tail, shared by its followers of this pace and kept as long as there is one."""
        which = job_id, every_s
        tail = self._tails.get(which)
        if tail is None or tail.ended:
            tail = self._tails[which] = Tail(self._signals, job_id, look, every_s)
            tail.start()
        tail.followers[key_id] += 1
        try:
            yield tail
        finally:
            tail.followers[key_id] -= 1
            tail.followers += Counter()  # drops zero counts
            if not tail.followers:
                if self._tails.get(which) is tail:
                    del self._tails[which]
                tail.stop()

    def stop(self) -> None:
        """End all tails: the server stops."""
        for tail in self._tails.values():
            tail.end()
