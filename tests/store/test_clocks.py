"""Clocks that are wrong, or set while jobs run: nothing is charged for it, no dead worker is missed, no checkpoint passed over.

On SQLite the clock that is set is the one machine's; on PostgreSQL it is that of a worker's or an API's machine.
"""

from collections.abc import Callable
from datetime import timedelta
from itertools import count

import pytest
import redis

from service import ids
from service.doorbell import Doorbell
from service.ids import new_id
from service.jobs import lease as leases
from service.jobs.lease import CheckpointRow, Lease
from service.jobs.reconciler import reconcile
from service.settings import Settings
from service.spec.job import CheckpointsSpec
from service.states import Phase, Status
from service.store import checkpoints, idempotency, jobs, usage
from service.store.idempotency import Claim
from service.store.session import Store
from service.store.tables import Job
from service.store.usage import Spent

HOUR = timedelta(hours=1)
Set = Callable[[timedelta], None]
SHIFTS = pytest.mark.parametrize("shift", [-HOUR, HOUR], ids=["back", "forward"])


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Set:
    real = ids.utcnow
    return lambda shift: monkeypatch.setattr(ids, "utcnow", lambda: real() + shift)


@pytest.fixture
def held(store: Store, settings: Settings, new_job: Callable[..., Job]) -> Lease:
    new_job()
    claimed = leases.claim(store, settings, "w1", {"any"})
    assert claimed is not None
    return claimed[0]


def read(store: Store, lease: Lease) -> tuple[Job, usage.Totals]:
    with store.begin(readonly=True) as session:
        return jobs.get(session, "default", lease.job_id), usage.of_job(session, lease.job_id)


@SHIFTS
def test_an_attempt_is_as_long_as_its_worker_counted(store: Store, held: Lease, set_clock: Set, shift: timedelta) -> None:
    set_clock(shift)
    leases.succeed(store, held, {}, "max_steps", spent=Spent(phase_s={Phase.UPDATING: 5.0}, ran_s=7.0))
    job, spent = read(store, held)
    assert job.run_s == pytest.approx(7.0)
    assert spent.worker_s == pytest.approx(7.0)


@SHIFTS
def test_a_worker_that_dies_after_the_clock_was_set_is_paid_for_what_it_ran(
    store: Store, settings: Settings, doorbell: Doorbell, held: Lease, set_clock: Set, shift: timedelta
) -> None:
    set_clock(shift)
    leases.renew_all(store, settings, {held: 5.0})
    leases.worker_lost(store, doorbell, held.owner)
    job, spent = read(store, held)
    assert job.status == Status.QUEUED
    assert job.run_s == pytest.approx(5.0, abs=2)
    assert spent.worker_s == pytest.approx(5.0, abs=2)


def test_a_worker_that_died_when_the_clock_was_set_back_is_missed(
    store: Store, settings: Settings, doorbell: Doorbell, held: Lease, set_clock: Set
) -> None:
    set_clock(-HOUR)
    now = store.now()
    assert reconcile(store, settings, doorbell, now).queued == []
    assert reconcile(store, settings, doorbell, now + timedelta(seconds=settings.lease_ttl_s + 1)).queued == [held.job_id]


def test_what_came_after_a_lease_is_not_paid_for(store: Store, settings: Settings, doorbell: Doorbell, held: Lease) -> None:
    """Nobody looked for an hour, or the clock was set forward."""
    assert reconcile(store, settings, doorbell, store.now() + HOUR).queued == [held.job_id]
    job, spent = read(store, held)
    assert job.run_s == pytest.approx(settings.lease_ttl_s, abs=2)
    assert spent.worker_s == pytest.approx(settings.lease_ttl_s, abs=2)


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@SHIFTS
def test_a_wrong_clock_beside_postgres_changes_nothing(
    store: Store, settings: Settings, doorbell: Doorbell, new_job: Callable[..., Job], set_clock: Set, shift: timedelta
) -> None:
    """Each of several machines has a clock of its own; what one writes, the others compare."""
    earliest = store.now()
    set_clock(shift)
    new_job()
    claimed = leases.claim(store, settings, "w1", {"any"})
    assert claimed is not None
    lease, job = claimed
    leases.renew_all(store, settings, [lease])
    with store.begin() as session:
        key = idempotency.begin(session, project="p", route="r", key="k", body_sha256="0" * 64)
    set_clock(timedelta())
    job, _ = read(store, lease)
    latest = store.now()
    assert isinstance(key, Claim)
    for moment in (job.created_at, job.queued_at, job.claimed_at, key.taken_at):
        assert moment is not None
        assert earliest <= moment <= latest
    assert job.lease_until is not None
    assert earliest <= job.lease_until - timedelta(seconds=settings.lease_ttl_s) <= latest
    assert reconcile(store, settings, doorbell, latest).queued == []


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_bell_that_was_rung_before_the_clock_was_set_back_is_rung_again(
    store: Store, settings: Settings, doorbell: Doorbell, new_job: Callable[..., Job], set_clock: Set, redis_url: str
) -> None:
    job = new_job()
    with redis.Redis.from_url(redis_url) as client:
        client.flushdb()  # the message is lost
    set_clock(-HOUR)
    assert reconcile(store, settings, doorbell, store.now()).rung == [job.id]


# ---------------------------------------------------------------- checkpoints


@pytest.fixture
def saved(store: Store, held: Lease) -> list[tuple[int, int]]:
    """(attempt, step) of checkpoints, each written down by a worker whose clock is slower than those of all before."""
    numbers, order = count(), [(1, 5), (1, 8), (2, 6), (2, 10), (2, 10)]
    now = store.now()
    with store.begin() as session:
        for number, (attempt, step) in zip(numbers, order, strict=False):
            final = number == len(order) - 1
            # The ids, too, were made by those clocks.
            id_ = f"ckpt_{9 - number}"
            row = CheckpointRow(id_, step, "full", {}, f"x/{new_id('ckpt')}", 1, "0" * 64, {}, True, final)
            then = now - timedelta(seconds=12 * number)
            checkpoints.create(session, row, project="default", job_id=held.job_id, attempt=attempt, now=then)
    return order


def test_a_resume_tries_the_furthest_checkpoint_first(store: Store, held: Lease, saved: list[tuple[int, int]]) -> None:
    with store.begin(readonly=True) as session:
        found = checkpoints.of_job(session, held.job_id)
    assert [(one.attempt, one.step) for one in found] == saved[::-1]
    assert [one.is_final for one in found] == [True, False, False, False, False]


def test_keep_last_keeps_the_furthest(store: Store, held: Lease, saved: list[tuple[int, int]]) -> None:
    assert len(leases.retain(store, held, CheckpointsSpec(keep_last=2))) == len(saved) - 2
    with store.begin(readonly=True) as session:
        left = checkpoints.of_job(session, held.job_id)
    assert [(one.attempt, one.step) for one in left] == [(2, 10), (2, 10)]


def test_a_deletion_spares_the_furthest(store: Store, held: Lease, saved: list[tuple[int, int]]) -> None:
    with store.begin(readonly=True) as session:
        chosen, more = checkpoints.chosen(session, "default", job_id=held.job_id, keep_last=2, limit=10)
    assert sorted((one.attempt, one.step) for one in chosen) == [(1, 5), (1, 8), (2, 6)]
    assert not more
    assert [one.created_at for one in chosen] == sorted(one.created_at for one in chosen)
