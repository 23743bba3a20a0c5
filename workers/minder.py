"""The parent watches its training process and kills its process group if it does not obey, or works without a job.

A process that is frozen or stuck in native code notices neither a wish nor a lost lease. If its parent kills it, the GPU is
free again, and Celery's pool starts another process.
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
    """Called in the training process: makes it the leader of a process group, so that its children can be killed with it."""
    os.setpgid(0, 0)


def kill_children() -> None:
    for child in active_children():
        with suppress(ProcessLookupError):
            if os.getpgid(child.pid) == child.pid:
                os.killpg(child.pid, signal.SIGKILL)
            else:
                os.kill(child.pid, signal.SIGKILL)


class Minder:
    """A thread of the worker's parent that looks every LOOK_EVERY_S."""

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
            except Exception:  # the store is down: tried again in LOOK_EVERY_S
                log.warning("could not look after the training process", exc_info=True)
                self._idle_since = None

    def look(self) -> None:
        held = lease.in_hands_of(self._store, self._owner)
        for job_id in held.disobeyed:
            log.error("job %s: the training process did not obey in time; killing it", job_id)
            kill_children()
            lease.unresponsive(self._store, self._doorbell, job_id, self._store.now())
        trains = any(request.name == RING_TASK for request in state.active_requests)  # loss requests need no job
        if not trains or not held.nothing:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = monotonic()
        elif monotonic() - self._idle_since > WITHOUT_A_JOB_S:
            log.error("the training process lost its job and does not end; killing it")
            kill_children()
            self._idle_since = None
