"""Waiting for answers of operations: however many callers wait in a process, a session that is signalled is read once, and what
was read is handed to all of them."""

import asyncio
from collections.abc import Collection, Mapping
from contextlib import suppress

from starlette.concurrency import run_in_threadpool

from service.doorbell import Signals, Watch
from service.store import operations
from service.store.operations import Outcome
from service.store.session import Store

POLL_S = 2.0  # the delay of an answer whose signal was lost


class Waiter:
    """A caller who waits for some operations of a session."""

    def __init__(self, ids: Collection[str]) -> None:
        self.left, self.found = set(ids), dict[str, Outcome]()
        self.over = asyncio.Event()  # all are there, or nobody looks any more

    def take(self, found: Mapping[str, Outcome], gone: Collection[str]) -> None:
        self.found |= {id_: found[id_] for id_ in self.left & found.keys()}
        self.left -= found.keys() | set(gone)
        if not self.left:
            self.over.set()


class Answers:
    """For the event loop's thread only."""

    def __init__(self, signals: Signals, store: Store) -> None:
        self._signals, self._store = signals, store
        self._waiters: dict[str, set[Waiter]] = {}  # by session

    async def wait(
        self, job_id: str, ids: Collection[str], timeout_s: float, *, since: Watch | None = None
    ) -> dict[str, Outcome]:
        """What came of these operations, by id, as soon as none of them waits any more, or after `timeout_s`. Those that still
        wait, or are gone, are left out.

        since  watches the session, from before they were seen to wait: until it is rung they need not be looked at
        """
        return (await self.watch(job_id, ids, timeout_s, since=since)).found

    async def watch(self, job_id: str, ids: Collection[str], timeout_s: float, *, since: Watch | None = None) -> Waiter:
        """The same; unless it is `over`, some of them were seen to wait until the end."""
        waiter, mine = Waiter(ids), self._waiters.get(job_id)
        joins = mine is not None
        if mine is None:
            mine = self._waiters[job_id] = set()
            asyncio.create_task(self._look(job_id, mine, since), name=f"answers-{job_id}")  # noqa: RUF006  it ends with its waiters
        mine.add(waiter)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    # What was signalled before is not read again for those who come later.
                    if joins and (since is None or since.rung.is_set()):
                        waiter.take(*await run_in_threadpool(self._read, list(ids)))
                    await waiter.over.wait()
            return waiter
        finally:
            mine.discard(waiter)

    async def _look(self, job_id: str, mine: set[Waiter], since: Watch | None) -> None:
        """Read what is answered at each signal, as long as somebody waits."""
        try:
            with self._signals.watch(job_id) as bell:
                await asyncio.sleep(0)  # until the first waiter stands in the list
                if since is not None and not since.rung.is_set():
                    await bell.wait(POLL_S)
                while mine:
                    asked = {id_ for waiter in mine for id_ in waiter.left}
                    found, gone = await run_in_threadpool(self._read, asked) if asked else ({}, set[str]())
                    for waiter in mine:
                        waiter.take(found, gone)
                    if any(waiter.left for waiter in mine):
                        await bell.wait(POLL_S)
                    else:
                        await asyncio.sleep(0)  # the waiters leave
        finally:
            if self._waiters.get(job_id) is mine:
                del self._waiters[job_id]
            for waiter in mine:  # the store is away, or the server stops: they look for themselves
                waiter.over.set()

    def _read(self, ids: Collection[str]) -> tuple[dict[str, Outcome], set[str]]:
        """Those that no longer wait, and those that are gone."""
        with self._store.look() as connection:
            return operations.outcomes(connection, ids)
