"""A thread that renews the leases of a process while its main thread works, and receives the owners' wishes.

It watches three clocks. All leases are renewed every `lease_renew_s`, in one statement. A worker that could not renew for
`lease_self_stop_s` stops by itself, before the lease expires and another worker can claim the job. Work without progress for
`stall_timeout_s` is given up. The main thread calls `check()` between pieces of work; if it does not notice a lost lease in
time, the process is ended.
"""

import logging
import os
from collections.abc import Callable
from threading import Event, Lock, Thread
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
from service.store.usage import Spent
from workers.tenure.log_tail import LogTail

log = logging.getLogger(__name__)

TICK_S = 1.0  # how soon a new phase is written and a dead parent is noticed
AGAIN_S = 0.5  # between two tries of a write while the store is down
NOTICE_S = 10.0  # how long the main thread may take to notice that a lease is lost
STALLED_RETRY_S = 5.0
EXIT_LEASE_LOST = 75
EXIT_STALLED = 76
Written = TypeVar("Written")


class Hold:
    """One lease of this process. The main thread writes its phase and progress; the keeper's thread its wish and loss."""

    def __init__(self, lease: Lease, *, stall_timeout_s: float, tail: LogTail) -> None:
        self.lease, self.stall_timeout_s, self.tail = lease, stall_timeout_s, tail
        self.started = self.renewed_at = self.progress_at = monotonic()
        self.phase = Phase.LOADING
        self.written_phase: Phase | None = None
        self.wish: Wish | None = None
        self.lost: str | None = None
        self.lost_at = 0.0

    @property
    def ran_s(self) -> float:
        """Seconds since the work was taken in hand."""
        return monotonic() - self.started

    def check(self, phase: Phase | None = None) -> Wish | None:
        """Record progress and return the owner's wish. Raises LeaseLost if the lease is lost."""
        if self.lost is not None:
            raise LeaseLost(self.lost)
        self.progress_at = monotonic()
        if phase is not None:
            self.phase = phase
        return self.wish

    def patiently(self, write: Callable[[], Written]) -> Written:
        """Do a write of the main thread, and retry it while the store is down and the lease may still be ours.

        `write` must be safe to repeat, because a try that raised may have been committed. Raises LeaseLost.
        """
        while True:
            try:
                return write()
            except (OperationalError, InterfaceError):
                self.check()
                log.warning("the store does not answer; trying again", exc_info=True)
                sleep(AGAIN_S)

    def lose(self, why: str) -> None:
        """Mark the lease as lost. The next `check` raises."""
        log.warning("lease of %s lost: %s", self.lease.job_id, why)
        self.lost_at, self.lost = monotonic(), why


class Keeper:
    """Keeps all leases of a process. Use `with Keeper(...) as keeper:`, or call `start()` once for the process's life."""

    def __init__(self, store: Store, settings: Settings, doorbell: Doorbell) -> None:
        self.store, self.settings, self.doorbell = store, settings, doorbell
        self._parent = os.getppid()
        self._holds: list[Hold] = []
        self._listened_for = frozenset[str]()
        self._changing = Lock()
        self._wanted = Event()  # set if something is held, or the thread must end
        self._closed = False
        self._thread = Thread(target=self._run, name="keeper", daemon=True)

    def start(self) -> Self:
        self._thread.start()
        return self

    def close(self) -> None:
        with self._changing:
            self._closed = True
            self._wanted.set()
        self._thread.join()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def hold(self, hold: Hold) -> None:
        """Renew this lease from now on."""
        with self._changing:
            self._holds.append(hold)
            self._wanted.set()
        if before := next(iter(self._listened_for - {hold.lease.job_id}), None):
            self.doorbell.signal(before, "wish")  # wakes the thread, which does not yet listen for this job

    def let_go(self, hold: Hold) -> None:
        """Stop renewing. Does not wait for the thread: the store accepts its last write for this lease or refuses it."""
        with self._changing:
            self._holds = [held for held in self._holds if held is not hold]
            if not self._holds and not self._closed:
                self._wanted.clear()

    def held(self) -> list[Hold]:
        with self._changing:
            return list(self._holds)

    def progress(self) -> None:
        """The main thread is at work for one of those that it holds, and the others wait for their turn."""
        for hold in self.held():
            hold.progress_at = monotonic()

    def _run(self) -> None:
        while not self._closed:
            try:
                self._listen_and_look()
            except Exception:  # the thread must go on: all later jobs of this process need it
                log.exception("a look at the leases failed; looking again")
                sleep(TICK_S)

    def _listen_and_look(self) -> None:
        job_ids = frozenset(hold.lease.job_id for hold in self.held())
        heard, self._listened_for = self._listened_for, job_ids
        if job_ids:
            rung = self.doorbell.listen(job_ids, TICK_S)
            self.tick(renew=rung or not job_ids <= heard)  # renewing also reads wishes that came before we listened
        else:
            self.doorbell.hang_up()  # a connection that idles for long may break unnoticed
            self._wanted.wait()

    def tick(self, *, renew: bool = False) -> None:
        """Check all clocks once. `renew`: renew now, even if it is not time yet."""
        if os.getppid() != self._parent:
            log.error("the worker's parent is gone; stopping")
            os._exit(EXIT_LEASE_LOST)
        for hold in self.held():
            if monotonic() - hold.progress_at > hold.stall_timeout_s:
                self._give_up_stalled(hold)
        ours = [hold for hold in self.held() if hold.lost is None]
        try:
            if renew or any(monotonic() - hold.renewed_at >= self.settings.lease_renew_s for hold in ours):
                self._renew(ours)
            for hold in ours:
                self._write_phase(hold)
        except Exception:  # the store is down: `_look_at_clock` decides how long that may last
            log.warning("could not renew the lease of %s", ", ".join(hold.lease.job_id for hold in ours), exc_info=True)
        for hold in self.held():
            self._look_at_clock(hold)

    def _renew(self, holds: list[Hold]) -> None:
        if not holds:
            return
        asked_at = monotonic()  # not when the answer came: the store may have been slow, and the new lease counts from here
        answers = leases.renew_all(self.store, self.settings, {hold.lease: hold.ran_s for hold in holds})
        for hold in holds:
            answer = answers[hold.lease]
            if isinstance(answer, LeaseLost):
                self._lose(hold, answer)
            else:
                hold.wish, hold.renewed_at = answer, asked_at

    def _write_phase(self, hold: Hold) -> None:
        phase = hold.phase
        if hold.lost is not None or phase is hold.written_phase:
            return
        try:
            leases.set_phase(self.store, hold.lease, phase)
            hold.written_phase = phase
        except LeaseLost as lost:
            self._lose(hold, lost)

    def _lose(self, hold: Hold, lost: LeaseLost) -> None:
        if hold in self.held():  # else the main thread has settled it meanwhile
            hold.lose(lost.detail)

    def _look_at_clock(self, hold: Hold) -> None:
        if hold.lost is None and monotonic() - hold.renewed_at > self.settings.lease_self_stop_s:
            hold.lose(f"could not renew for {self.settings.lease_self_stop_s:.0f} s")
        if hold.lost is not None and monotonic() - hold.lost_at > NOTICE_S:
            log.error("the lease is lost and the work does not stop; ending the process")
            os._exit(EXIT_LEASE_LOST)

    def _give_up_stalled(self, hold: Hold) -> None:
        """Record the failure, if the store answers, and end the process, because its main thread cannot be woken."""
        job_id = hold.lease.job_id
        detail = f"no progress for {hold.stall_timeout_s:g} s in phase {hold.phase} (limits.stall_timeout_s)"
        log.error("job %s: %s; giving this attempt up", job_id, detail)
        failure = hold.tail.add_to(Failure("stalled", detail, phase=hold.phase.value))
        try:
            leases.release(
                self.store,
                hold.lease,
                failure.code,
                failure=failure,
                delay_s=STALLED_RETRY_S,
                spent=Spent(ran_s=hold.ran_s),
            )
        except Exception:  # the parent settles it as a lost worker
            log.warning("could not say that %s stalled", job_id, exc_info=True)
        self.doorbell.signal(job_id, "events")
        os._exit(EXIT_STALLED)
