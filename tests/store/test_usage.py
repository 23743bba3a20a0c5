"""The ledger: nothing lost, nothing counted twice as useful, whatever becomes of an attempt."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, update

from service.doorbell import Doorbell
from service.errors import Conflict, Failure
from service.ids import new_id, utcnow
from service.jobs import lease as leases
from service.jobs import lifecycle
from service.jobs.lease import CheckpointRow, Lease
from service.settings import Settings
from service.store import jobs, usage
from service.store.session import Store
from service.store.tables import Job, Usage
from service.store.usage import NOTHING, Spent, Totals

NewJob = Callable[..., Job]


def take(store: Store, settings: Settings, owner: str = "w") -> Lease:
    claimed = leases.claim(store, settings, owner, {"any"})
    assert claimed is not None
    return claimed[0]


def ran_for(store: Store, lease: Lease, seconds: float) -> None:
    with store.begin() as session:
        session.execute(update(Job).where(Job.id == lease.job_id).values(claimed_at=utcnow() - timedelta(seconds=seconds)))


def totals(store: Store, job_id: str) -> Totals:
    with store.begin(readonly=True) as session:
        return usage.of_job(session, job_id)


def read(store: Store, job_id: str) -> Job:
    with store.begin(readonly=True) as session:
        return jobs.get(session, "default", job_id)


def step(store: Store, lease: Lease, number: int, *, sampled: int = 100, trained: int = 10) -> bool:
    metrics = {"tokens/sampled": float(sampled), "tokens/trained": float(trained), "perf/step_s": 2.0}
    spent = Spent(sampled, trained, {"sampling": 1.5, "updating": 0.5})
    return leases.commit_step(store, lease, number, metrics, spent=spent)


def save(store: Store, lease: Lease, number: int, *, after: Spent = NOTHING) -> CheckpointRow:
    id_ = new_id("ckpt")
    row = CheckpointRow(id_, number, "full", {"source": "tiny"}, f"checkpoints/{id_}", 10, "0" * 64, {}, True, False)
    leases.commit_checkpoint(store, lease, row, spent=Spent(phase_s={"saving": 1.0}), after=after)
    return row


def test_a_job_that_goes_well_wastes_nothing(store: Store, settings: Settings, new_job: NewJob) -> None:
    job, held = new_job(), take(store, settings)
    for number in (1, 2):
        step(store, held, number)
    save(store, held, 2)
    ran_for(store, held, 20.0)
    leases.succeed(store, held, {}, "max_steps", spent=Spent(phase_s={"saving": 0.25}))
    found = totals(store, job.id)
    assert (found.attempts, found.sampled_tokens, found.trained_tokens, found.tokens) == (1, 200, 20, 220)
    # 20 s in all; 5.25 were told by the worker, and the rest belongs to the phase that the job ended in.
    rest_s = found.worker_s - 5.25
    assert found.phase_s == pytest.approx(
        {"loading": rest_s, "sampling": 3.0, "grading": 0, "updating": 1.0, "evaluating": 0, "saving": 1.25}
    )
    assert rest_s >= 14.75
    assert found.worker_s == pytest.approx(read(store, job.id).run_s, abs=1e-6)
    assert (found.wasted_sampled_tokens, found.wasted_trained_tokens, found.wasted_s) == (0, 0, 0.0)


ENDS: dict[str, Callable[[Store, Doorbell, Lease], object]] = {
    "lost": lambda store, doorbell, lease: leases.worker_lost(store, doorbell, lease.owner),
    "retried": lambda store, _, lease: leases.release(store, lease, "io_error", failure=Failure("io_error", "no disk")),
    "failed": lambda store, _, lease: leases.fail(store, lease, Failure("out_of_memory", "no memory")),
    "parked": lambda store, _, lease: leases.park(store, lease, Failure("grader_unhealthy", "down")),
    "cancelled": lambda store, _, lease: leases.cancelled(store, lease),
    "drained": lambda store, _, lease: leases.release(store, lease, "drained"),
}


@pytest.mark.parametrize("end", ENDS)
def test_what_came_after_the_last_checkpoint_is_wasted(
    store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob, end: str
) -> None:
    job, held = new_job(), take(store, settings)
    for number in (1, 2):
        step(store, held, number)
    save(store, held, 2)
    step(store, held, 3)
    ran_for(store, held, 20.0)
    ENDS[end](store, doorbell, held)
    found = totals(store, job.id)
    assert (found.sampled_tokens, found.wasted_sampled_tokens) == (300, 100)
    assert (found.trained_tokens, found.wasted_trained_tokens) == (30, 10)
    # Two steps of 2 s and a second of saving were kept.
    assert (found.worker_s, found.wasted_s) == (pytest.approx(read(store, job.id).run_s), pytest.approx(found.worker_s - 5.0))


def test_a_checkpoint_does_not_cover_the_steps_that_came_while_it_was_written(
    store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob
) -> None:
    job, held = new_job(), take(store, settings)
    for number in (1, 2, 3):
        step(store, held, number)
    one = Spent(100, 10, {"sampling": 1.5, "updating": 0.5})
    save(store, held, 1, after=one + one)
    leases.worker_lost(store, doorbell, "w")
    found = totals(store, job.id)
    assert (found.sampled_tokens, found.wasted_sampled_tokens) == (300, 200)
    assert (found.trained_tokens, found.wasted_trained_tokens) == (30, 20)
    assert found.wasted_s == pytest.approx(found.worker_s - 3.0)


def test_a_step_that_is_repeated_after_a_crash_is_spent_twice_and_useful_once(
    store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob
) -> None:
    job, held = new_job(), take(store, settings)
    save(store, held, 0)
    step(store, held, 1)
    leases.worker_lost(store, doorbell, "w")
    held = take(store, settings)
    leases.rewind(store, held, 0)
    step(store, held, 1)
    save(store, held, 1)
    leases.succeed(store, held, {}, "max_steps")
    found = totals(store, job.id)
    assert (found.attempts, found.sampled_tokens, found.wasted_sampled_tokens) == (2, 200, 100)


def test_a_checkpoint_that_is_broken_makes_what_it_covered_wasted_once(
    store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob
) -> None:
    job, held = new_job(), take(store, settings)
    save(store, held, 0)
    for number in (1, 2, 3):
        step(store, held, number)
    save(store, held, 3)
    step(store, held, 4)
    for _ in range(2):  # twice: what the second attempt repeats is wasted by its own end, not again
        leases.worker_lost(store, doorbell, "w")
        held = take(store, settings)
        leases.rewind(store, held, 0)
        step(store, held, 1)
    save(store, held, 1)
    found = totals(store, job.id)
    # Attempt 1: 4 steps for nothing; attempt 2: one; attempt 3: one that is kept.
    assert (found.sampled_tokens, found.wasted_sampled_tokens) == (600, 500)


@pytest.mark.parametrize("again", [1, 2])
@pytest.mark.parametrize(("goes_on_from", "wasted"), [(2, 100 + 7), (None, 300 + 3 * 7)])
def test_evaluations_that_are_done_again_are_wasted_too(
    store: Store,
    settings: Settings,
    doorbell: Doorbell,
    new_job: NewJob,
    goes_on_from: int | None,
    wasted: int,
    again: int,
) -> None:
    """Spent less wasted is what was kept, to the token, however often a broken checkpoint is met."""

    def evaluate(number: int) -> None:
        leases.commit_step(store, held, number, {"eval/tokens/sampled": 7.0}, spent=Spent(sampled_tokens=7))

    job, held = new_job(), take(store, settings)
    evaluate(0)
    for number in (1, 2, 3):
        step(store, held, number)
        if number > 1:
            evaluate(number)
        save(store, held, number)
    for _ in range(again):  # the second time nothing was written in between
        leases.worker_lost(store, doorbell, "w")
        held = take(store, settings)
        leases.rewind(store, held, goes_on_from or 0, anew=goes_on_from is None)
    found = totals(store, job.id)
    assert (found.sampled_tokens, found.wasted_sampled_tokens) == (321, wasted)


def test_a_zombie_s_step_is_on_nobody_s_account(store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob) -> None:
    job, zombie = new_job(), take(store, settings)
    leases.worker_lost(store, doorbell, "w")
    take(store, settings, "w2")
    before = totals(store, job.id)
    with pytest.raises(leases.LeaseLost):
        step(store, zombie, 1)
    assert totals(store, job.id) == before


def test_a_step_that_cannot_be_stored_is_not_charged(store: Store, settings: Settings, new_job: NewJob) -> None:
    job, held = new_job(), take(store, settings)
    with pytest.raises(Exception, match="object"):
        leases.commit_step(store, held, 1, {}, (), [("odd", {"x": object()})], spent=Spent(1, 1))
    found = totals(store, job.id)
    assert (found.sampled_tokens, found.trained_tokens) == (0, 0)


def test_sums_by_day_job_and_key_agree(store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob) -> None:
    first, second = new_job(), new_job()
    for owner, sampled in (("a", 1), ("b", 20)):
        held = take(store, settings, owner)
        step(store, held, 1, sampled=sampled, trained=0)
        save(store, held, 1)
    today = f"{utcnow():%Y-%m-%d}"
    with store.begin() as session:
        session.execute(update(Usage).where(Usage.job_id == first.id).values(day="2020-02-29", key_id="key_1"))

    def report(**filters: Any) -> dict[str | None, int]:
        with store.begin(readonly=True) as session:
            return {one.group: one.sampled_tokens for one in usage.report(session, "default", **filters)}

    assert report() == {None: 21}
    assert report(group_by="day") == {"2020-02-29": 1, today: 20}
    assert report(group_by="job") == {first.id: 1, second.id: 20}
    assert report(group_by="key") == {"key_1": 1, None: 20}
    assert report(group_by="job", last_day="2020-02-29") == {first.id: 1}
    assert report(group_by="job", first_day="2020-03-01") == {second.id: 20}
    assert report(key_id="key_1", group_by="job") == {first.id: 1}
    assert report(job_id=second.id, group_by="day") == {today: 20}
    with store.begin(readonly=True) as session:
        assert usage.report(session, "another", group_by="day") == []
    with store.begin() as session:
        jobs.remove(session, first.id)
    assert report() == {None: 21}, "the ledger outlives the job"


# ---------------------------------------------------------------- budgets


@pytest.mark.parametrize("bound", [{"tokens": 220}, {"worker_s": 4.0}])
def test_the_step_that_reaches_the_budget_says_so(
    store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob, bound: dict[str, Any]
) -> None:
    job, held = new_job(limits={"max_steps": 9, "budget": bound}), take(store, settings)
    assert [step(store, held, number) for number in (1, 2)] == [False, True]
    leases.pause(store, held, "budget_spent")
    assert (read(store, job.id).status, read(store, job.id).status_reason) == ("paused", "budget_spent")
    with pytest.raises(Conflict) as refused:
        lifecycle.resume(store, doorbell, "default", job.id)
    assert refused.value.code == "budget_spent"
    assert read(store, job.id).status == "paused"
    raised = lifecycle.resume(store, doorbell, "default", job.id, budget={name: value * 3 for name, value in bound.items()})
    assert raised.status == "queued"
    assert step(store, take(store, settings), 3) is False


def test_a_project_s_budget_stops_all_its_jobs_and_nobody_else_s(
    store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob
) -> None:
    running, waiting, elsewhere = new_job(), new_job(), new_job(project="another")
    held = take(store, settings)
    with store.begin() as session:
        usage.set_budget(session, "default", tokens=110, worker_s=None, since="1970-01-01", now=utcnow())
    assert step(store, held, 1) is True
    claimed = leases.claim(store, settings, "w2", {"any"})
    assert claimed is not None and claimed[1].id == elsewhere.id
    assert (read(store, waiting.id).status, read(store, waiting.id).status_reason) == ("paused", "budget_spent")
    with pytest.raises(Conflict):
        lifecycle.resume(store, doorbell, "default", waiting.id)
    with store.begin() as session:  # counted from tomorrow on
        usage.set_budget(session, "default", tokens=110, worker_s=None, since="2999-01-01", now=utcnow())
    assert lifecycle.resume(store, doorbell, "default", waiting.id).status == "queued"
    assert read(store, running.id).status == "running"


def test_without_budgets_nothing_stops(store: Store, settings: Settings, new_job: NewJob) -> None:
    new_job()
    held = take(store, settings)
    assert step(store, held, 1, sampled=10**15) is False
    with store.begin(readonly=True) as session:
        assert session.scalar(select(Usage.sampled_tokens)) == 10**15
