import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from threading import Barrier, Thread

import pytest

from chaos.rig import Zygote, wait_until
from service.ids import new_id, utcnow
from service.jobs import lease as leases
from service.jobs.lease import Lease
from service.settings import Settings
from service.store import events, jobs, metrics
from service.store.session import Store
from service.store.tables import Job, Worker

NewJob = Callable[..., Job]
CLAIMS, PROCESSES = 24, 3
CLAIMER = Path(__file__).with_name("claimer.py")


def test_processes_that_race_for_one_job_get_distinct_fencing_numbers(
    store: Store, settings: Settings, new_job: NewJob, tmp_path: Path, zygote: Zygote
) -> None:
    job = new_job()
    logs = [tmp_path / f"w{i}.log" for i in range(PROCESSES)]
    racers = [zygote.child([str(CLAIMER), settings.sql_url, str(tmp_path), log.stem, str(CLAIMS)], {}, log) for log in logs]
    try:
        wait_until(lambda: all(log.exists() and log.read_text() == "ready\n" for log in logs), 30, "the racers to be ready")
        (tmp_path / "go").touch()
        while all(racer.poll() is None for racer in racers):  # one takes the last claim, ends the job and stops
            time.sleep(0.02)
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()
    said = [line for log in logs for line in log.read_text().split()]
    assert sorted(int(line) for line in said if line.isdecimal()) == list(range(1, CLAIMS + 1))
    assert "leaked" not in said
    with store.begin(readonly=True) as session:
        assert metrics.names(session, job.id) == ["attempt"]
        assert [event.seq for event in events.after(session, job.id, 0)] == list(range(1, 3 + 3 * CLAIMS))
        assert jobs.get(session, "default", job.id).status == "succeeded"


def test_threads_that_race_for_several_jobs_share_them_out(store: Store, settings: Settings, new_job: NewJob) -> None:
    made = {new_job().id for _ in range(6)}
    won: list[tuple[Lease, Job]] = []
    barrier = Barrier(6)

    def race(number: int) -> None:
        barrier.wait()
        claimed = leases.claim(store, settings, f"w{number}", {"any"})
        assert claimed is not None
        won.append(claimed)

    threads = [Thread(target=race, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {lease.job_id for lease, _ in won} == made
    assert leases.claim(store, settings, "late", {"any"}) is None


def test_priority_goes_first_then_whoever_waited_longest(store: Store, settings: Settings, new_job: NewJob) -> None:
    first, second, urgent = new_job(), new_job(), new_job(resources={"priority": 90})
    taken = [leases.claim(store, settings, "w", {"any"}) for _ in range(3)]
    assert [one[1].id for one in taken if one] == [urgent.id, first.id, second.id]


def test_only_jobs_of_its_classes(store: Store, settings: Settings, new_job: NewJob) -> None:
    job = new_job(resources={"class": "gpu"})
    assert leases.claim(store, settings, "w", {"any", "cpu"}) is None
    claimed = leases.claim(store, settings, "w", {"any", "gpu"})
    assert claimed is not None
    assert claimed[1].id == job.id


def test_a_claim_says_who_holds_the_job_and_since_when(store: Store, settings: Settings, new_job: NewJob) -> None:
    new_job()
    claimed = leases.claim(store, settings, "w", {"any"})
    assert claimed is not None
    lease, job = claimed
    assert (lease.attempt, lease.owner, job.status, job.lease_owner, job.attempt) == (1, "w", "running", "w", 1)
    assert job.lease_until is not None
    assert timedelta(seconds=settings.lease_ttl_s - 5) < job.lease_until - utcnow() <= timedelta(seconds=settings.lease_ttl_s)
    assert job.started_at == job.claimed_at is not None


def test_a_job_that_was_put_off_is_not_taken_before_its_time(store: Store, settings: Settings, new_job: NewJob) -> None:
    new_job()
    claimed = leases.claim(store, settings, "w", {"any"})
    assert claimed is not None
    leases.release(store, claimed[0], "later", delay_s=60)
    assert leases.claim(store, settings, "w", {"any"}) is None
    with store.begin() as session:
        assert jobs.next_queued(session, {"any"}, utcnow() + timedelta(seconds=61)) is not None


@pytest.fixture
def worker(store: Store) -> Worker:
    worker = Worker(
        id=new_id("wrk"), host="h", pid=1, device="cpu", resource_classes=["any"], started_at=utcnow(), last_seen_at=utcnow()
    )
    leases.hello(store, worker)
    return worker


def test_a_draining_worker_takes_nothing_and_hears_it_at_the_next_renewal(
    store: Store, settings: Settings, new_job: NewJob, worker: Worker
) -> None:
    new_job()
    new_job()
    claimed = leases.claim(store, settings, worker.id, {"any"})
    assert claimed is not None
    assert leases.renew_all(store, settings, claimed[:1]) == {claimed[0]: None}
    leases.draining(store, worker.id)
    assert leases.renew_all(store, settings, claimed[:1]) == {claimed[0]: "drain"}
    assert leases.claim(store, settings, worker.id, {"any"}) is None
    assert leases.claim(store, settings, "another", {"any"}) is not None
