import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Thread
from typing import Any

import pytest

from service.doorbell import Doorbell
from service.errors import Conflict, Failure, LeaseLost, NotFound
from service.ids import utcnow
from service.jobs import lease as leases
from service.jobs import lifecycle
from service.jobs.reconciler import reconcile
from service.settings import Settings
from service.states import Status, is_legal
from service.store import events, jobs
from service.store.session import Store
from service.store.tables import Job

NewJob = Callable[..., Job]
ATTEMPTS = 10


def log_of(store: Store, job: Job) -> Sequence[Any]:
    with store.begin(readonly=True) as session:
        return events.after(session, job.id, 0)


def test_the_log_can_be_read_from_any_point(store: Store, new_job: NewJob) -> None:
    job = new_job()
    with store.begin() as session:
        assert events.append(session, job.id, "warning", {"n": 3}) == 3
        assert events.append_all(session, job.id, [("warning", {"n": 4}), ("warning", {"n": 5})]) == 5
        assert [event.data["n"] for event in events.after(session, job.id, 3)] == [4, 5]
        assert [event.data["n"] for event in events.after(session, job.id, 2, limit=1)] == [3]


def test_a_job_begins_with_created_and_queued(store: Store, new_job: NewJob) -> None:
    job = new_job(name="mine")
    first, second = log_of(store, job)
    assert (first.seq, first.type, first.data) == (
        1,
        "created",
        {"kind": "supervised", "name": "mine", "parent_id": None, "status": "queued"},
    )
    assert (second.seq, second.type, second.data) == (2, "queued", {"resource_class": "any"})
    assert job.last_event == 2


def test_a_transaction_that_fails_uses_up_no_number(store: Store, new_job: NewJob) -> None:
    job = new_job()

    def fail() -> None:
        with store.begin() as session:
            events.append(session, job.id, "warning", {})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with store.begin() as session:
        assert events.append(session, job.id, "warning", {}) == 3


def test_writers_that_race_share_out_the_numbers(store: Store, new_job: NewJob) -> None:
    job = new_job()

    def write(_: int) -> None:
        for _ in range(10):
            with store.begin() as session:
                events.append_all(session, job.id, [("warning", {}), ("warning", {})])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert [event.seq for event in log_of(store, job)] == list(range(1, 2 + 4 * 10 * 2 + 1))


def test_an_event_of_an_unknown_job_is_refused(store: Store) -> None:
    with pytest.raises(NotFound), store.begin() as session:
        events.append(session, "job_none", "warning", {})


def test_the_log_has_no_gaps_and_tells_a_legal_path_whoever_races(
    store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob
) -> None:
    job, surprises = new_job(limits={"max_attempts": 100}), list[BaseException]()
    # Leases that end almost at once, so that the reconciler has something to settle.
    hasty = settings.model_copy(update={"lease_ttl_s": 0.003, "lease_self_stop_s": 0.002, "lease_renew_s": 0.001})

    deadline = time.monotonic() + 20

    def going_on() -> bool:
        with store.begin(readonly=True) as session:
            return jobs.get(session, "default", job.id).attempt < ATTEMPTS and time.monotonic() < deadline

    def worker(name: str) -> None:
        draw = random.Random(name)
        while going_on():
            claimed = leases.claim(store, hasty, name, {"any"})
            if claimed is None:
                continue
            with suppress(LeaseLost):
                leases.commit_step(store, claimed[0], claimed[0].attempt, {"loss": 1.0})
                wish = leases.renew_all(store, hasty, claimed[:1])[claimed[0]]
                if wish == "pause":
                    leases.pause(store, claimed[0])
                else:
                    leases.release(store, claimed[0], "next", failure=draw.choice([None, Failure("io_error", "y")]))

    def owner(name: str) -> None:
        draw = random.Random(name)
        while going_on():
            with suppress(Conflict):
                getattr(lifecycle, draw.choice(["pause", "resume", "resume"]))(store, doorbell, "default", job.id)

    def reconciler(name: str) -> None:
        while going_on():
            reconcile(store, hasty, doorbell, utcnow())

    def guarded(role: Callable[[str], None], name: str) -> None:
        try:
            role(name)
        except BaseException as error:
            surprises.append(error)

    roles = [(worker, "w1"), (worker, "w2"), (owner, "o1"), (owner, "o2"), (reconciler, "r")]
    threads = [Thread(target=guarded, args=role) for role in roles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lifecycle.cancel(store, doorbell, "default", job.id)

    assert surprises == []
    log = log_of(store, job)
    assert [event.seq for event in log] == list(range(1, len(log) + 1))
    status, attempts = Status.QUEUED, [0]
    for event in log:
        if event.type == "status_changed":
            assert event.data["from"] == status
            assert is_legal(status, Status(event.data["to"]))
            status = Status(event.data["to"])
            if status is Status.RUNNING:
                attempts.append(event.data["attempt"])
    assert attempts == list(range(len(attempts)))
    assert len(attempts) > ATTEMPTS
    with store.begin(readonly=True) as session:
        found = session.get(Job, job.id)
        assert found is not None
        assert (found.status, found.last_event) == (status, len(log))
