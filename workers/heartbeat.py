"""The thread that keeps a lease alive while the main thread trains, and brings the owner's wishes.

Three clocks: the lease is renewed every `lease_renew_s`; a worker that could not renew for `lease_self_stop_s` stops by
itself, before the lease ends and another may take the job; an attempt without progress for `stall_timeout_s` is given up.
The main thread looks with `check()` between pieces of work; when it does not look in time, the process is ended.
"""

import logging
import os
from collections.abc import Callable
from threading import Event, Thread
from time import monotonic, sleep
from types import TracebackType
from typing import Self, TypeVar

from sqlalchemy.exc import InterfaceError, OperationalError

from service.doorbell import Doorbell
from service.errors import Failure, LeaseLost
from service.jobs import lease as leases
from service.jobs.lease import Lease
from service.settings import Settings
from service.states import Phase, Wish
from service.store.session import Store
from workers.log_tail import LogTail
from workers.meter import Meter

log = logging.getLogger(__name__)

TICK_S = 1.0  # how soon a new phase is written and a dead parent is noticed
AGAIN_S = 0.5  # between two tries of a write while the store is away
NOTICE_S = 10.0  # how long the main thread may take to notice that the lease is lost
STALLED_RETRY_S = 5.0
EXIT_LEASE_LOST = 75
EXIT_STALLED = 76
Written = TypeVar("Written")


class Heartbeat:
    """`with Heartbeat(...) as heartbeat:` around the work of one attempt."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        doorbell: Doorbell,
        lease: Lease,
        *,
        stall_timeout_s: float,
        tail: LogTail,
    ) -> None:
        self._store, self._settings, self._doorbell, self._lease = store, settings, doorbell, lease
        self.tail = tail
        self._stall_timeout_s = stall_timeout_s
        self._parent = os.getppid()
        self._stop = Event()
        self._lost: str | None = None
        self._lost_at = 0.0
        self.started = self._renewed_at = self._progress_at = monotonic()
        self._written: Phase | None = None
        self.phase = Phase.LOADING
        self.meter = Meter(self.phase)
        self.wish: Wish | None = None
        self._thread = Thread(target=self._run, name=f"heartbeat-{lease.job_id}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def check(self, phase: Phase | None = None) -> Wish | None:
        """Called by the main thread: notes progress, says what the owner wishes. Raises LeaseLost for a zombie."""
        if self._lost is not None:
            raise LeaseLost(self._lost)
        self._progress_at = monotonic()
        if phase is not None:
            self.phase = phase
            self.meter.enter(phase)
        return self.wish

    def patiently(self, write: Callable[[], Written]) -> Written:
        """Do a write of the main thread's. While the store is away it is tried again, for as long as the lease may be ours.

        A try whose answer was lost may have been taken: `write` must be one that can be done twice. Raises LeaseLost.
        """
        while True:
            try:
                return write()
            except (OperationalError, InterfaceError):
                self.check()
                log.warning("the store does not answer; trying again", exc_info=True)
                sleep(AGAIN_S)

    def _run(self) -> None:
        while not self._stop.is_set():
            rung = self._wait()
            if self._stop.is_set():
                return
            self._tick(renew=rung or monotonic() - self._renewed_at >= self._settings.lease_renew_s)

    def _wait(self) -> bool:
        """Up to a tick; True when the doorbell says that there is a wish."""
        return self._doorbell.listen(self._lease.job_id, TICK_S)

    def _tick(self, *, renew: bool) -> None:
        if os.getppid() != self._parent:
            log.error("the worker's parent is gone; stopping")
            os._exit(EXIT_LEASE_LOST)
        if monotonic() - self._progress_at > self._stall_timeout_s:
            self._give_up_stalled()
        if self._lost is None:
            try:
                if renew:
                    self.wish = leases.renew(self._store, self._settings, self._lease)
                    self._renewed_at = monotonic()
                if self.phase is not self._written:
                    phase = self.phase
                    leases.set_phase(self._store, self._lease, phase)
                    self._written = phase
            except LeaseLost as error:
                self._lose(error.detail)
            except Exception:  # the store is away: the clock below decides how long that may last
                log.warning("could not renew the lease of %s", self._lease.job_id, exc_info=True)
        if self._lost is None and monotonic() - self._renewed_at > self._settings.lease_self_stop_s:
            self._lose(f"could not renew for {self._settings.lease_self_stop_s:.0f} s")
        if self._lost is not None and monotonic() - self._lost_at > NOTICE_S:
            log.error("the lease is lost and the work does not stop; ending the process")
            os._exit(EXIT_LEASE_LOST)

    def _give_up_stalled(self) -> None:
        """Say so, as far as the store answers, and end the process: its main thread cannot be woken."""
        detail = f"no progress for {self._stall_timeout_s:g} s in phase {self.phase} (limits.stall_timeout_s)"
        log.error("job %s: %s; giving this attempt up", self._lease.job_id, detail)
        failure = self.tail.add_to(Failure("stalled", detail, phase=self.phase.value))
        try:
            leases.release(self._store, self._lease, failure.code, failure=failure, delay_s=STALLED_RETRY_S)
        except Exception:  # the parent settles it as a lost worker
            log.warning("could not say that %s stalled", self._lease.job_id, exc_info=True)
        self._doorbell.signal(self._lease.job_id, "events")
        os._exit(EXIT_STALLED)

    def _lose(self, why: str) -> None:
        log.warning("lease of %s lost: %s", self._lease.job_id, why)
        self._lost, self._lost_at = why, monotonic()
