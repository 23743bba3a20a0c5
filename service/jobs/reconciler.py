"""Repairs what a crash, a lost message or a dead worker left behind. Any number of copies may run at once."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from itertools import takewhile
from pathlib import Path
from random import uniform
from threading import Event, Thread
from time import monotonic

from sqlalchemy.orm import Session

from service import telemetry
from service.doorbell import Doorbell
from service.errors import Failure
from service.ids import utcnow
from service.jobs import moves
from service.jobs.discard import discard
from service.jobs.lease import IDLE
from service.settings import Settings
from service.states import FINAL, HELD, Status
from service.store import audit, checkpoints, datasets, idempotency, jobs, operations, webhooks, workers
from service.store.blobs import TEMPORARY, Blobs
from service.store.jobs import Runtime
from service.store.session import Store
from service.store.tables import Job

log = logging.getLogger(__name__)

PARENT_KILLS_WITHIN = timedelta(seconds=15)  # after the grace of a training process that does not obey
ORPHAN_AFTER = timedelta(hours=1)  # from the rename of a blob to the commit of its row
TEMPORARY_AFTER = timedelta(days=1)  # the longest upload
UNUSED_AFTER = timedelta(days=1)
SWEEP_EVERY_S = 600.0
RINGS_AT_ONCE = 500  # per class and look: if Redis lost thousands, dead workers must not wait for all rings


@dataclass
class Report:
    """The ids of jobs, by what was done to them."""

    queued: list[str] = field(default_factory=list)
    paused: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    rung: list[str] = field(default_factory=list)
    expired: list[str] = field(default_factory=list)  # checkpoints
    forgotten_keys: int = 0

    def moves(self) -> dict[str, int]:
        return {part.name: len(value) for part in fields(self) if isinstance(value := getattr(self, part.name), list) and value}


def reconcile(store: Store, settings: Settings, doorbell: Doorbell, now: datetime) -> Report:
    """Check everything once. Each job is settled in its own transaction, which checks again before it acts."""
    report = Report()
    with store.begin(readonly=True) as session:
        expired = jobs.held(session, expired_at=now)
        overdue = [job.id for job in jobs.runtimes(session) if _is_overdue(job, settings, now)]
        late = jobs.past_deadline(session, now)
        disobeyed = jobs.disobeyed(session, now - PARENT_KILLS_WITHIN)
        resting = operations.idle_with_work(session)
    for job_id in expired:
        _settle(store, doorbell, report, job_id, lambda session, job: _return_lost(session, job, now))
    for job_id in overdue:
        _settle(store, doorbell, report, job_id, lambda session, job: _end_overdue(session, job, settings, now))
    for job_id in late:
        _settle(store, doorbell, report, job_id, lambda session, job: _end_late(session, job, settings, now))
    for job_id in disobeyed:  # here the parent is stuck, too; later writes of this worker are refused
        _settle(store, doorbell, report, job_id, lambda session, job: moves.unresponsive(session, job, now))
    for job_id in resting:
        _settle(store, doorbell, report, job_id, lambda session, job: _wake(session, job, now))
    _ring_again(store, settings, doorbell, report, now)
    report.expired = expire(store, doorbell, now)
    with store.begin() as session:
        report.forgotten_keys = idempotency.expire(session, now)
        operations.expire(session, now)
        webhooks.expire(session, now)
        audit.expire(session, now)
        workers.forget(session, now)
        jobs.shorten_leases(session, now + timedelta(seconds=settings.lease_ttl_s))
    return report


def _settle(
    store: Store, doorbell: Doorbell, report: Report, job_id: str, act: Callable[[Session, Job], Status | None]
) -> None:
    with store.begin() as session:
        job = jobs.find(session, job_id, lock=True, light=True)
        went_to = None if job is None else act(session, job)
    if went_to is not None:
        getattr(report, went_to.value).append(job_id)
        doorbell.signal(job_id, "events")
        log.warning("job %s settled: %s", job_id, went_to.value)


def _return_lost(session: Session, job: Job, now: datetime) -> Status | None:
    """Settle a job whose lease expired: its worker is dead, or has stopped by itself."""
    if job.status not in HELD or (job.lease_until is not None and job.lease_until >= now):
        return None
    return moves.lost(session, job, "lease_lost", now)


def _is_overdue(job: Runtime, settings: Settings, now: datetime) -> bool:
    """A worker ends its job itself, with a checkpoint; the grace lets it."""
    grace = settings.drain_grace_s if job.status in HELD else 0.0
    return job.allowed_s is not None and job.run_s + moves.running_s(job, now) > job.allowed_s + grace


def _end_overdue(session: Session, job: Job, settings: Settings, now: datetime) -> Status | None:
    overdue = [runtime for runtime in jobs.runtimes(session, job.id) if _is_overdue(runtime, settings, now)]
    if not overdue:
        return None
    ran = job.run_s + moves.running_s(job, now)
    failure = Failure(
        "max_runtime",
        f"the job ran for {ran:.0f} s, allowed are {overdue[0].allowed_s:.0f} s (limits.max_runtime_s)",
    )
    return moves.fail(session, job, failure, now)


def _end_late(session: Session, job: Job, settings: Settings, now: datetime) -> Status | None:
    """A worker ends its job itself, with a checkpoint; the grace lets it."""
    grace = timedelta(seconds=settings.drain_grace_s if job.status in HELD else 0.0)
    if job.status in FINAL or job.deadline_at is None or job.deadline_at + grace >= now:
        return None
    return moves.fail(session, job, moves.deadline(job), now)


def _wake(session: Session, job: Job, now: datetime) -> Status | None:
    """Queue an idle session that has an operation all the same."""
    if job.status != Status.PAUSED or job.status_reason != IDLE:
        return None
    moves.move(session, job, Status.QUEUED, "operation", now)
    return Status.QUEUED


def _ring_again(store: Store, settings: Settings, doorbell: Doorbell, report: Report, now: datetime) -> None:
    """Ring for queued jobs that nobody claimed. Never have more rings waiting than jobs: a busy worker must read them all."""
    rung_before = now - timedelta(seconds=settings.ring_again_s)
    with store.begin(readonly=True) as session:
        classes = jobs.classes_queued(session, now)
        missing = {class_: jobs.count_queued(session, class_, now) - (doorbell.waiting(class_) or 0) for class_ in classes}
    for class_, count in missing.items():
        if count <= 0:
            continue
        with store.begin() as session:
            silent = jobs.take_unheard(session, class_, now, rung_before, min(count, RINGS_AT_ONCE))
        rung = list(takewhile(lambda job_id, class_=class_: doorbell.ring(job_id, class_), silent))
        report.rung += rung
        if len(rung) < len(silent):
            with store.begin() as session:
                jobs.unring(session, silent[len(rung) :])
            return  # Redis did not accept the ring: the next look tries again


# ---------------------------------------------------------------- files


def expire(store: Store, doorbell: Doorbell, now: datetime) -> list[str]:
    """Delete checkpoints whose time to live is over. Returns their ids. A name goes at once, the rest when no job needs it."""
    with store.begin(readonly=True) as session:
        over = checkpoints.expired(session, now)
    removed, _ = discard(store, doorbell, over, now) if over else ([], {})  # checks again, under locks
    return [row.id for row in removed]


def sweep(store: Store, now: datetime) -> list[str]:
    """Remove blobs that no row names and temporary folders that nobody writes to. Returns their relative paths.

    If the database knows none of the blobs here, this is the wrong folder or the wrong database, and nothing is removed.
    The same holds for the bucket, if there is one. This machine keeps copies of its checkpoints that were used within a day.
    """
    with store.begin(readonly=True) as session:
        claimed = checkpoints.live_paths(session) | datasets.live_paths(session)
    gone = [f"{TEMPORARY}/{path.name}" for path in _abandoned(store.blobs, now)]
    for path in gone:
        store.blobs.forget(path)
    orphans = [path for path in store.blobs.unclaimed(claimed) if _is_older(store.blobs.path(path), now - ORPHAN_AFTER)]
    if store.blobs.bucket is None:
        place, any_known = str(store.blobs.root), any(store.blobs.path(path).exists() for path in claimed)
    else:
        there, others = store.blobs.bucket.blobs(claimed)
        for path in store.blobs.unused(claimed & there, (now - UNUSED_AFTER).timestamp()):
            store.blobs.forget(path)
        orphans += [path for path, changed_at in others.items() if changed_at < now - TEMPORARY_AFTER and path not in orphans]
        place, any_known = store.blobs.bucket.url, bool(there)
    if orphans and not any_known:
        log.error("%d blobs in %s are unknown to this database, and none is known: not swept", len(orphans), place)
        orphans = []
    for path in orphans:
        store.blobs.delete(path)
    return gone + orphans


def _abandoned(blobs: Blobs, now: datetime) -> list[Path]:
    folder = blobs.root / TEMPORARY
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in entries if _is_older(path, now - TEMPORARY_AFTER)]


def _is_older(path: Path, moment: datetime) -> bool:
    """Whether nothing in it was written, and it was not renamed, since `moment`."""
    try:
        stats = [member.lstat() for member in [path, *path.rglob("*")]]
    except FileNotFoundError:
        return False  # it is being changed right now
    return max(max(stat.st_mtime, stat.st_ctime) for stat in stats) < moment.timestamp()


# ---------------------------------------------------------------- the thread


class Reconciler:
    """Runs `reconcile` every `reconcile_every_s`, with jitter so that copies spread out, and `sweep` every ten minutes."""

    def __init__(self, store: Store, settings: Settings, doorbell: Doorbell) -> None:
        self._store, self._settings, self._doorbell = store, settings, doorbell
        self._stop = Event()
        self._thread = Thread(target=self._run, name="reconciler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        swept_at = monotonic()
        while not self._stop.is_set():
            try:
                self.look()
                if monotonic() - swept_at > SWEEP_EVERY_S:
                    swept_at = monotonic()
                    sweep(self._store, utcnow())  # by the clock that files go by
            except Exception:  # the store is away: looking again is all that this thread is for
                log.exception("the reconciler could not look")
            self._stop.wait(self._settings.reconcile_every_s * uniform(0.8, 1.2))

    def look(self) -> Report:
        report = reconcile(self._store, self._settings, self._doorbell, self._store.now())
        for name, count in report.moves().items():
            telemetry.RECONCILED.labels(name).inc(count)
        return report
