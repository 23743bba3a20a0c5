import os
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import select, update

from service.doorbell import Doorbell
from service.errors import Conflict
from service.ids import new_id, utcnow
from service.jobs import lease as leases
from service.jobs import lifecycle, moves
from service.jobs.lease import CheckpointRow, Lease
from service.jobs.reconciler import Reconciler, Report, _return_lost, reconcile, sweep
from service.settings import Settings
from service.states import Status
from service.store import events, idempotency, jobs
from service.store.session import Store
from service.store.tables import IdempotencyKey, Job, Worker

NewJob = Callable[..., Job]


def read(store: Store, job_id: str) -> Job:
    with store.begin(readonly=True) as session:
        return jobs.get(session, "default", job_id)


def take(store: Store, settings: Settings, owner: str = "w") -> Lease:
    claimed = leases.claim(store, settings, owner, {"any"})
    assert claimed is not None
    return claimed[0]


def change(store: Store, job_id: str, **values: Any) -> None:
    with store.begin() as session:
        session.execute(update(Job).where(Job.id == job_id).values(**values))


@pytest.fixture
def after_lease(settings: Settings) -> datetime:
    """A moment when leases taken within the next minute have ended."""
    return utcnow() + timedelta(seconds=settings.lease_ttl_s + 60)


# ---------------------------------------------------------------- lost leases


def test_a_lease_that_holds_is_left_alone(store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob) -> None:
    job = new_job()
    take(store, settings)
    assert reconcile(store, settings, doorbell, utcnow()) == Report()
    assert read(store, job.id).status == "running"


def test_a_lost_job_queues_again_and_is_rung_for(
    store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob, after_lease: datetime
) -> None:
    job = new_job()
    take(store, settings)
    doorbell._redis.flushdb()  # its ring was heard
    assert reconcile(store, settings, doorbell, after_lease) == Report(queued=[job.id], rung=[job.id])
    found = read(store, job.id)
    assert (found.status, found.status_reason, found.crashes, found.lease_owner) == ("queued", "lease_lost", 1, None)
    assert doorbell.waiting("any") == 1
    assert reconcile(store, settings, doorbell, after_lease) == Report()


@pytest.mark.parametrize(("action", "settled"), [("pause", "paused"), ("cancel", "cancelled")])
def test_a_wish_whose_worker_is_gone_is_fulfilled(
    store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob, after_lease: datetime, action: str, settled: str
) -> None:
    job = new_job()
    take(store, settings)
    getattr(lifecycle, action)(store, doorbell, "default", job.id)
    assert reconcile(store, settings, doorbell, after_lease) == (
        Report(paused=[job.id]) if settled == "paused" else Report(cancelled=[job.id])
    )
    assert read(store, job.id).status == settled


def test_the_third_crash_without_a_new_checkpoint_ends_the_job(
    store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob, after_lease: datetime
) -> None:
    job = new_job()
    for expected in ("queued", "queued", "failed"):
        take(store, settings)
        reconcile(store, settings, doorbell, after_lease)
        assert read(store, job.id).status == expected
    error = read(store, job.id).error
    assert error is not None
    assert (error["code"], error["category"], error["attempt"]) == ("crash_loop", "infra", 3)


def test_a_checkpoint_in_between_forgives(
    store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob, after_lease: datetime
) -> None:
    job = new_job()
    for step in range(5):
        lease = take(store, settings)
        row = CheckpointRow(new_id("ckpt"), step, "full", {}, f"checkpoints/{step}", 1, "0" * 64, {}, True, False)
        leases.commit_checkpoint(store, lease, row)
        reconcile(store, settings, doorbell, after_lease)
    found = read(store, job.id)
    assert (found.status, found.crashes, found.attempt) == ("queued", 1, 5)


def test_many_reconcilers_settle_a_job_once(
    store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob, after_lease: datetime
) -> None:
    made = [new_job().id for _ in range(4)]
    for _ in made:
        take(store, settings)
    reports: list[Report] = []
    threads = [Thread(target=lambda: reports.append(reconcile(store, settings, doorbell, after_lease))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(id_ for report in reports for id_ in report.queued) == sorted(made)
    assert [read(store, id_).crashes for id_ in made] == [1, 1, 1, 1]


def test_a_move_of_a_row_that_changed_meanwhile_is_refused(store: Store, new_job: NewJob) -> None:
    """The compare-and-swap under the lock: a row read without it does not overwrite anything."""
    stale = new_job()
    change(store, stale.id, status="paused")
    with pytest.raises(Conflict) as caught, store.begin() as session:
        moves.move(session, stale, Status.CANCELLED, "x", utcnow())
    assert caught.value.code == "changed_meanwhile"
    assert read(store, stale.id).status == "paused"


def test_a_lease_that_was_renewed_since_the_look_is_left_alone(
    store: Store, settings: Settings, new_job: NewJob, after_lease: datetime
) -> None:
    job = new_job()
    lease = take(store, settings)
    for renewed, outcome in ((True, None), (False, Status.QUEUED)):
        if renewed:
            leases.renew_all(store, settings, [lease])
        with store.begin() as session:
            found = jobs.get(session, "default", job.id, lock=True)
            assert _return_lost(session, found, utcnow() if renewed else after_lease) == outcome


# ---------------------------------------------------------------- deadlines


def test_a_job_that_runs_too_long_is_ended_after_a_grace(
    store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob
) -> None:
    job = new_job(limits={"max_runtime_s": 1000})
    lease = take(store, settings)
    start = utcnow()
    change(store, job.id, lease_until=start + timedelta(days=1), run_s=400.0)
    in_grace = start + timedelta(seconds=600 + settings.drain_grace_s - 5)
    assert reconcile(store, settings, doorbell, in_grace) == Report()
    assert reconcile(store, settings, doorbell, in_grace + timedelta(seconds=10)) == Report(failed=[job.id])
    error = read(store, job.id).error
    assert error is not None
    assert (error["code"], error["category"]) == ("max_runtime", "user")
    assert isinstance(leases.renew_all(store, settings, [lease])[lease], leases.LeaseLost)


def test_a_queued_job_whose_time_is_used_up_does_not_start_again(
    store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob
) -> None:
    job = new_job(limits={"max_runtime_s": 1000})
    change(store, job.id, run_s=999.0)
    assert reconcile(store, settings, doorbell, utcnow()).failed == []
    change(store, job.id, run_s=1001.0)
    assert reconcile(store, settings, doorbell, utcnow()).failed == [job.id]


# ---------------------------------------------------------------- the bell


def test_a_ring_that_was_lost_is_repeated_after_a_while(
    store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob
) -> None:
    job = new_job()
    doorbell._redis.flushdb()
    now = utcnow()
    assert reconcile(store, settings, doorbell, now).rung == []
    later = now + timedelta(seconds=settings.ring_again_s + 1)
    assert reconcile(store, settings, doorbell, later).rung == [job.id]
    assert doorbell.waiting("any") == 1


def test_rings_that_wait_are_not_doubled(store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob) -> None:
    """A worker that is busy for hours must not find thousands of rings."""
    new_job()
    new_job()
    for minutes in range(1, 5):
        assert reconcile(store, settings, doorbell, utcnow() + timedelta(minutes=minutes)).rung == []
    assert doorbell.waiting("any") == 2


def test_one_of_two_lost_rings_is_repeated_once(store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob) -> None:
    new_job()
    new_job()
    doorbell._redis.lpop("train.any")
    assert len(reconcile(store, settings, doorbell, utcnow() + timedelta(minutes=1)).rung) == 1
    assert doorbell.waiting("any") == 2


def test_many_reconcilers_ring_once(store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob) -> None:
    made = sorted(new_job().id for _ in range(5))
    later, barrier, reports = utcnow() + timedelta(minutes=1), Barrier(4), list[Report]()

    def look() -> None:
        barrier.wait()
        reports.append(reconcile(store, settings, doorbell, later))

    doorbell._redis.flushdb()
    threads = [Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(id_ for report in reports for id_ in report.rung) == made


def test_thousands_of_lost_rings_are_repeated_a_part_at_a_time(
    store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.jobs.reconciler.RINGS_AT_ONCE", 2)
    made = [new_job().id for _ in range(5)]
    doorbell._redis.flushdb()
    later = utcnow() + timedelta(minutes=1)
    assert [reconcile(store, settings, doorbell, later).rung for _ in range(4)] == [made[:2], made[2:4], made[4:], []]
    assert doorbell.waiting("any") == 5


def test_doubled_rings_are_harmless(store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob) -> None:
    """Each ring makes a worker look; the second finds nothing to take."""
    job = new_job()
    doorbell.ring(job.id, "any")
    assert doorbell.waiting("any") == 2
    assert take(store, settings).attempt == 1
    assert leases.claim(store, settings, "w2", {"any"}) is None


def test_a_job_that_was_put_off_is_rung_for_when_its_time_has_come(
    store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob
) -> None:
    job = new_job()
    leases.release(store, take(store, settings), "retry", delay_s=100)
    doorbell._redis.flushdb()
    assert reconcile(store, settings, doorbell, utcnow() + timedelta(seconds=90)).rung == []
    assert reconcile(store, settings, doorbell, utcnow() + timedelta(seconds=101)).rung == [job.id]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_broken_bell_stops_nothing_else_and_is_tried_again(
    store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob, after_lease: datetime
) -> None:
    job = new_job()
    take(store, settings)
    doorbell._redis.flushdb()
    deaf = Doorbell(settings.model_copy(update={"redis_url": SecretStr("redis://127.0.0.1:1/0")}))
    assert reconcile(store, settings, deaf, after_lease) == Report(queued=[job.id])
    assert read(store, job.id).rung_at is None
    assert reconcile(store, settings, doorbell, after_lease).rung == [job.id]


# ---------------------------------------------------------------- house-keeping


def test_old_keys_and_long_gone_workers_are_forgotten(store: Store, settings: Settings, doorbell: Doorbell) -> None:
    now = utcnow()
    with store.begin() as session:
        for hours in (1, 25):
            when = now - timedelta(hours=hours)
            idempotency.begin(session, project="p", route="r", key=str(hours), body_sha256="0" * 64, now=when)
            session.add(
                Worker(
                    id=f"wrk_{hours}",
                    host="h",
                    pid=1,
                    device="cpu",
                    resource_classes=["any"],
                    started_at=when,
                    last_seen_at=when,
                )
            )
    assert reconcile(store, settings, doorbell, now).forgotten_keys == 1
    with store.begin(readonly=True) as session:
        assert session.scalars(select(IdempotencyKey.key)).all() == ["1"]
        assert session.scalars(select(Worker.id)).all() == ["wrk_1"]


def commit_blob(store: Store, path: str) -> None:
    folder = store.blobs.temporary_dir()
    (folder / "weights").write_bytes(b"1234")
    store.blobs.commit_dir(folder, path)


@pytest.fixture
def known(store: Store, settings: Settings, new_job: NewJob) -> str:
    """A checkpoint with its row and its folder."""
    new_job()
    path = "checkpoints/job_x/ckpt_known"
    commit_blob(store, path)
    row = CheckpointRow("ckpt_known", 1, "full", {}, path, 4, "0" * 64, {}, True, False)
    leases.commit_checkpoint(store, take(store, settings), row)
    return path


def test_blobs_that_no_row_names_are_swept_after_an_hour(store: Store, known: str) -> None:
    commit_blob(store, "checkpoints/job_x/ckpt_orphan")
    abandoned = store.blobs.temporary_dir()
    assert sweep(store, utcnow() + timedelta(minutes=50)) == []
    assert sweep(store, utcnow() + timedelta(minutes=70)) == ["checkpoints/job_x/ckpt_orphan"]
    assert abandoned.exists()
    assert sweep(store, utcnow() + timedelta(hours=25)) == [f"tmp/{abandoned.name}"]
    assert store.blobs.path(known).joinpath("weights").read_bytes() == b"1234"


def test_an_upload_that_is_still_written_to_is_not_swept(store: Store) -> None:
    folder = store.blobs.temporary_dir()
    (folder / "part").touch()
    tomorrow = utcnow() + timedelta(hours=25)
    os.utime(folder / "part", (tomorrow.timestamp(), tomorrow.timestamp()))
    assert sweep(store, tomorrow) == []


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_folder_of_which_the_database_knows_nothing_is_never_swept(store: Store, tmp_path: Path) -> None:
    """Whoever points a fresh database at an old data directory must not lose their checkpoints."""
    commit_blob(store, "checkpoints/job_x/ckpt_precious")
    assert sweep(store, utcnow() + timedelta(days=400)) == []
    assert store.blobs.path("checkpoints/job_x/ckpt_precious").is_dir()


def test_the_thread_looks_by_itself_and_stops(store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob) -> None:
    job = new_job()
    take(store, settings)
    change(store, job.id, lease_until=utcnow() - timedelta(seconds=1))
    reconciler = Reconciler(store, settings, doorbell)
    reconciler.start()
    deadline = time.monotonic() + 10
    while read(store, job.id).status == "running" and time.monotonic() < deadline:
        time.sleep(0.02)
    reconciler.stop()
    assert read(store, job.id).status == "queued"
    with store.begin(readonly=True) as session:
        assert events.after(session, job.id, 0)[-1].data["reason"] == "lease_lost"
