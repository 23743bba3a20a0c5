"""Waiting for answers of operations: however many callers wait in a process, a session that is signalled is read once."""

import asyncio
from collections.abc import Collection
from contextlib import suppress

from starlette.concurrency import run_in_threadpool

from service.doorbell import Signals
from service.store import operations
from service.store.session import Store

POLL_S = 2.0  # the delay of an answer whose signal was lost


class Answers:
    """For the event loop's thread only."""

    def __init__(self, signals: Signals, store: Store) -> None:
        self._signals, self._store = signals, store
        self._waiters: dict[str, dict[str, set[asyncio.Event]]] = {}  # by session, by operation

    async def wait(self, job_id: str, operation_id: str, timeout_s: float) -> bool:
        """Whether the operation is answered, has failed or is gone, after at most `timeout_s`."""
        done = asyncio.Event()
        mine = self._waiters.get(job_id)
        if mine is None:
            mine = self._waiters[job_id] = {}
            asyncio.create_task(self._look(job_id, mine), name=f"answers-{job_id}")  # noqa: RUF006  it ends with its waiters
        mine.setdefault(operation_id, set()).add(done)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    return await done.wait()
            return False
        finally:
            if waiting := mine.get(operation_id):
                waiting.discard(done)
                if not waiting:
                    del mine[operation_id]

    async def _look(self, job_id: str, mine: dict[str, set[asyncio.Event]]) -> None:
        """Read what is answered at each signal, as long as somebody waits."""
        try:
            with self._signals.watch(job_id) as bell:
                await asyncio.sleep(0)  # until the first waiter stands in the list
                while mine:
                    for operation_id in await run_in_threadpool(self._finished, tuple(mine)):
                        for event in mine.get(operation_id, ()):
                            event.set()
                    if any(not event.is_set() for events in mine.values() for event in events):
                        await bell.wait(POLL_S)
                    else:
                        await asyncio.sleep(0)  # the waiters leave
        finally:
            if self._waiters.get(job_id) is mine:
                del self._waiters[job_id]
            for events in mine.values():  # the store is away, or the server stops: they look for themselves
                for event in events:
                    event.set()

    def _finished(self, ids: Collection[str]) -> set[str]:
        with self._store.begin(readonly=True) as session:
            return operations.finished(session, ids)
