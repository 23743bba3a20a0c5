"""The parent's eye on its training process: one that does not obey, or that works for nobody, is killed as a process group.

A process that is stuck in native code, or frozen, sees no wish and no lost lease by itself. Its parent can still end it: the
GPU is free, and Celery's pool starts another.
"""

import logging
import os
import signal
from contextlib import suppress
from threading import Event, Thread
from time import monotonic

from billiard.process import active_children
from celery.worker import state

from service.doorbell import RING_TASK, Doorbell
from service.jobs import lease
from service.store.session import Store

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
WITHOUT_A_JOB_S = 30.0  # how long a training process may be at work while this worker holds nothing


def lead_a_group() -> None:
    """Called in the training process: whatever it starts can be ended with it."""
    os.setpgid(0, 0)


def kill_children() -> None:
    for child in active_children():
        with suppress(ProcessLookupError):
            if os.getpgid(child.pid) == child.pid:
                os.killpg(child.pid, signal.SIGKILL)
            else:
                os.kill(child.pid, signal.SIGKILL)


class Minder:
    """A thread of the worker's parent."""

    def __init__(self, store: Store, doorbell: Doorbell, owner: str) -> None:
        self._store, self._doorbell, self._owner = store, doorbell, owner
        self._idle_since: float | None = None
        self._stop = Event()
        self._thread = Thread(target=self._run, name="minder", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(LOOK_EVERY_S):
            try:
                self.look()
            except Exception:  # the store is away: looked again in a second
                log.warning("could not look after the training process", exc_info=True)
                self._idle_since = None

    def look(self) -> None:
        now = self._store.now()
        for job_id in lease.disobeyed(self._store, self._owner, now):
            log.error("job %s: the training process did not obey in time; killing it", job_id)
            kill_children()
            lease.unresponsive(self._store, self._doorbell, job_id, now)
        trains = any(request.name == RING_TASK for request in state.active_requests)  # who answers losses holds no job
        if not trains or not lease.holds_nothing(self._store, self._owner):
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = monotonic()
        elif monotonic() - self._idle_since > WITHOUT_A_JOB_S:
            log.error("the training process lost its job and does not end; killing it")
            kill_children()
            self._idle_since = None
