from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import update

from service.doorbell import Doorbell
from service.errors import Failure, LeaseLost
from service.ids import new_id, utcnow
from service.jobs import lease as leases
from service.jobs import lifecycle
from service.jobs.lease import CheckpointRow, Lease, RolloutRow
from service.settings import Settings
from service.spec.job import CheckpointsSpec, KeepBest
from service.states import Phase, Wish
from service.store import checkpoints, events, jobs, metrics, rollouts
from service.store.session import Store
from service.store.tables import Job, Worker

NewJob = Callable[..., Job]
FAILURE = Failure("store_unavailable", "it does not answer")
SEEN = {"started_at": utcnow(), "last_seen_at": utcnow()}


def checkpoint(step: int, *, best: float | None = None) -> CheckpointRow:
    id_ = new_id("ckpt")
    metrics_ = {} if best is None else {"eval/reward/mean": best}
    return CheckpointRow(id_, step, "full", {"source": "tiny"}, f"checkpoints/{id_}", 10, "0" * 64, metrics_, True, False)


@pytest.fixture
def held(store: Store, settings: Settings, new_job: NewJob) -> Lease:
    new_job()
    claimed = leases.claim(store, settings, "w1", {"any"})
    assert claimed is not None
    return claimed[0]


def read(store: Store, lease: Lease) -> Job:
    with store.begin(readonly=True) as session:
        return jobs.get(session, "default", lease.job_id)


def told(store: Store, lease: Lease, type_: str) -> list[dict[str, Any]]:
    with store.begin(readonly=True) as session:
        return [event.data for event in events.after(session, lease.job_id, 0) if event.type == type_]


# ---------------------------------------------------------------- zombies


def renew(store: Store, settings: Settings, lease: Lease) -> Wish | None:
    answer = leases.renew_all(store, settings, [lease])[lease]
    if isinstance(answer, LeaseLost):
        raise answer
    return answer


WRITES: dict[str, Callable[[Store, Settings, Lease], object]] = {
    "renew_all": renew,
    "set_phase": lambda store, _, lease: leases.set_phase(store, lease, Phase.SAMPLING),
    "set_resolved": lambda store, _, lease: leases.set_resolved(store, lease, {"device": "cpu"}),
    "rewind": lambda store, _, lease: leases.rewind(store, lease, 0),
    "commit_step": lambda store, _, lease: leases.commit_step(store, lease, 1, {"loss": 1.0}),
    "commit_checkpoint": lambda store, _, lease: leases.commit_checkpoint(store, lease, checkpoint(1)),
    "retain": lambda store, _, lease: leases.retain(store, lease, CheckpointsSpec()),
    "pause": lambda store, _, lease: leases.pause(store, lease),
    "cancelled": lambda store, _, lease: leases.cancelled(store, lease),
    "release": lambda store, _, lease: leases.release(store, lease, "drained"),
    "succeed": lambda store, _, lease: leases.succeed(store, lease, {}, "max_steps"),
    "fail": lambda store, _, lease: leases.fail(store, lease, FAILURE),
}


@pytest.mark.parametrize(
    ("write", "again"),
    [*((write, "claimed by another") for write in WRITES), ("commit_step", "queued"), ("commit_step", "claimed by itself")],
)
def test_a_zombie_cannot_write(store: Store, settings: Settings, held: Lease, write: str, again: str) -> None:
    leases.release(store, held, "lost")
    if again != "queued":
        assert leases.claim(store, settings, "w2" if again == "claimed by another" else "w1", {"any"}) is not None
    before = vars(read(store, held)).copy()
    with pytest.raises(LeaseLost, match=held.job_id):
        WRITES[write](store, settings, held)
    after = vars(read(store, held))
    assert {name: value for name, value in after.items() if name[0] != "_"} == {
        name: value for name, value in before.items() if name[0] != "_"
    }


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("write", WRITES)
def test_the_holder_can_write(store: Store, settings: Settings, held: Lease, write: str) -> None:
    """The negative control of the test above."""
    WRITES[write](store, settings, held)


def test_a_lease_of_a_deleted_job_is_lost(store: Store, held: Lease) -> None:
    with store.begin() as session:
        jobs.remove(session, held.job_id)
    with pytest.raises(LeaseLost, match="gone"):
        leases.commit_step(store, held, 1, {})


# ---------------------------------------------------------------- progress


def test_a_step_leaves_metrics_rollouts_and_events_in_one_go(store: Store, held: Lease) -> None:
    group = RolloutRow("train", 3, 0, "2+2=", "4", [{"text": "4", "reward": 1.0}])
    values = {"reward/mean": 0.5, "loss": float("nan"), "policy/clip_fraction_low": 0.1, "debug/entropy_of_row_7": 1.0}
    leases.commit_step(store, held, 3, values, [group], [("evaluation", {"step": 3, "metrics": {"eval/loss": float("inf")}})])
    assert read(store, held).step == 3
    headline = {"reward/mean": 0.5, "loss": None, "policy/clip_fraction_low": 0.1}
    assert told(store, held, "step") == [{"step": 3, "max_steps": 10, "metrics": headline}]
    assert told(store, held, "evaluation") == [{"step": 3, "metrics": {"eval/loss": None}}]
    with store.begin(readonly=True) as session:
        curves = metrics.series(session, held.job_id)
        assert {name: (curve.step, curve.value) for name, curve in curves.items()} == {
            "reward/mean": ([3], [0.5]),
            "loss": ([3], [None]),
            "policy/clip_fraction_low": ([3], [0.1]),
            "debug/entropy_of_row_7": ([3], [1.0]),
        }
        rows, more = rollouts.page(session, held.job_id)
        assert ([(row.prompt, row.reference, row.samples) for row in rows], more) == (
            [("2+2=", "4", [{"text": "4", "reward": 1.0}])],
            False,
        )


def test_a_step_that_cannot_be_stored_leaves_nothing(store: Store, held: Lease) -> None:
    class Odd:
        pass

    with pytest.raises(Exception, match="Odd"):
        leases.commit_step(store, held, 1, {"loss": 1.0}, [RolloutRow("train", 1, 0, "p", None, [{"x": Odd()}])])
    assert read(store, held).step == 0
    with store.begin(readonly=True) as session:
        assert metrics.names(session, held.job_id) == []


def test_the_later_attempt_wins_and_the_earlier_one_does_not(store: Store, settings: Settings, held: Lease) -> None:
    leases.commit_step(store, held, 1, {"loss": 1.0}, [RolloutRow("train", 1, 0, "p", None, [{"text": "first"}])])
    leases.release(store, held, "lost")
    claimed = leases.claim(store, settings, "w2", {"any"})
    assert claimed is not None
    leases.commit_step(store, claimed[0], 1, {"loss": 2.0}, [RolloutRow("train", 1, 0, "p", None, [{"text": "second"}])])
    with store.begin() as session:
        metrics.write(session, held.job_id, 1, {"loss": 3.0}, attempt=1, now=read(store, held).updated_at)
    with store.begin(readonly=True) as session:
        assert metrics.series(session, held.job_id)["loss"].value == [2.0]
        assert rollouts.page(session, held.job_id)[0][0].samples == [{"text": "second"}]


def test_rewinding_takes_back_what_lies_beyond(store: Store, held: Lease) -> None:
    for step in (1, 2, 3):
        leases.commit_step(store, held, step, {"loss": 1.0}, [RolloutRow("train", step, 0, "p", None, [])])
    leases.rewind(store, held, 2)
    assert read(store, held).step == 2
    with store.begin(readonly=True) as session:
        assert metrics.series(session, held.job_id)["loss"].step == [1, 2]
        assert [row.step for row in rollouts.page(session, held.job_id)[0]] == [2, 1]


def test_phases_and_facts_are_told_once(store: Store, held: Lease) -> None:
    for phase in (Phase.SAMPLING, Phase.SAMPLING, Phase.GRADING):
        leases.set_phase(store, held, phase)
    leases.set_resolved(store, held, {"device": "cpu"})
    leases.set_resolved(store, held, {"dtype": "float32"})
    assert told(store, held, "phase_changed") == [{"phase": "sampling"}, {"phase": "grading"}]
    assert read(store, held).resolved == {"device": "cpu", "dtype": "float32"}


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_is_where_the_job_resumes_and_forgives_crashes(store: Store, settings: Settings, held: Lease) -> None:
    leases.release(store, held, "oom", counts_as_crash=True)
    claimed = leases.claim(store, settings, "w2", {"any"})
    assert claimed is not None
    assert claimed[1].crashes == 1
    row = checkpoint(4)
    leases.commit_checkpoint(store, claimed[0], row)
    job = read(store, held)
    assert (job.checkpoint_id, job.crashes) == (row.id, 0)
    assert told(store, held, "checkpoint_saved") == [{"checkpoint_id": row.id, "step": 4}]
    with store.begin(readonly=True) as session:
        saved = checkpoints.get(session, "default", row.id)
    assert (saved.job_id, saved.attempt, saved.path) == (held.job_id, 2, row.path)


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (CheckpointsSpec(keep_last=1), [5]),
        (CheckpointsSpec(keep_last=2), [4, 5]),
        (CheckpointsSpec(keep_last=1, keep_best=KeepBest(count=2)), [2, 3, 5]),
        (CheckpointsSpec(keep_last=1, keep_best=KeepBest(mode="min")), [4, 5]),
        (CheckpointsSpec(keep_last=9), [1, 2, 3, 4, 5]),
    ],
)
def test_retention_keeps_the_last_and_the_best(store: Store, held: Lease, keep: CheckpointsSpec, kept: list[int]) -> None:
    rows = [checkpoint(step, best=best) for step, best in [(1, None), (2, 0.9), (3, 0.8), (4, 0.1), (5, 0.2)]]
    for row in rows:
        leases.commit_checkpoint(store, held, row)
    assert set(leases.retain(store, held, keep)) == {row.path for row in rows if row.step not in kept}
    with store.begin(readonly=True) as session:
        assert sorted(one.step for one in checkpoints.of_job(session, held.job_id)) == kept
    assert leases.retain(store, held, keep) == []


def test_retention_keeps_no_broken_checkpoint_in_place_of_a_sound_one(store: Store, held: Lease) -> None:
    rows = [checkpoint(step, best=best) for step, best in [(1, 0.5), (2, None), (3, 0.9), (4, None)]]
    for row in rows:
        leases.commit_checkpoint(store, held, row)
    keep, broken = CheckpointsSpec(keep_last=2, keep_best=KeepBest(count=1)), {rows[2].id}
    assert leases.retain(store, held, keep, broken=broken) == [rows[2].path]


def test_retention_spares_what_another_job_starts_from(store: Store, doorbell: Doorbell, new_job: NewJob, held: Lease) -> None:
    rows = [checkpoint(step) for step in (1, 2, 3)]
    leases.commit_checkpoint(store, held, rows[0])
    child = new_job(from_checkpoint_id=rows[0].id)
    for row in rows[1:]:
        leases.commit_checkpoint(store, held, row)
    assert leases.retain(store, held, CheckpointsSpec(keep_last=1)) == [rows[1].path]
    lifecycle.cancel(store, doorbell, "default", child.id)
    assert leases.retain(store, held, CheckpointsSpec(keep_last=1)) == [rows[0].path]


# ---------------------------------------------------------------- letting go


def wish(store: Store, doorbell: Doorbell, lease: Lease, action: str) -> None:
    getattr(lifecycle, action)(store, doorbell, "default", lease.job_id)


@pytest.mark.parametrize(("action", "expected"), [("pause", Wish.PAUSE), ("cancel", Wish.CANCEL)])
def test_a_renewal_brings_the_owners_wish(
    store: Store, settings: Settings, doorbell: Doorbell, held: Lease, action: str, expected: Wish
) -> None:
    assert leases.renew_all(store, settings, [held]) == {held: None}
    wish(store, doorbell, held, action)
    assert leases.renew_all(store, settings, [held]) == {held: expected}


def test_one_renewal_tells_each_job_s_wish_and_which_leases_are_lost(
    store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob
) -> None:
    with store.begin() as session:
        session.add(Worker(id="w2", host="h", pid=1, device="cpu", resource_classes=["any"], draining=True, **SEEN))
    held: list[Lease] = []
    for owner in ("w1", "w1", "w1", "w1", "w1", "w3"):
        new_job()
        claimed = leases.claim(store, settings, owner, {"any"})
        assert claimed is not None
        held.append(claimed[0])
    paused, cancelled, saved, removed, fine, drained = held
    with store.begin() as session:
        session.execute(update(Job).where(Job.id == drained.job_id).values(lease_owner="w2"))  # one that drains claims nothing
        jobs.remove(session, removed.job_id)
    moved = Lease(drained.job_id, drained.attempt, "w2")
    lifecycle.pause(store, doorbell, "default", paused.job_id)
    lifecycle.cancel(store, doorbell, "default", cancelled.job_id)
    lifecycle.cancel(store, doorbell, "default", saved.job_id, save=True)
    answers = leases.renew_all(store, settings, [*held, moved])
    lost = {lease: answers.pop(lease) for lease in (removed, drained)}
    assert all(isinstance(error, LeaseLost) for error in lost.values())
    assert answers == {
        paused: Wish.PAUSE,
        cancelled: Wish.CANCEL,
        saved: Wish.SAVE_AND_CANCEL,
        fine: None,
        moved: Wish.DRAIN,
    }


# The wish that came first, what the worker reports, and where the job ends up.
ENDS = [
    (None, "pause", "paused"),
    ("pause", "pause", "paused"),
    (None, "cancelled", "cancelled"),
    ("cancel", "cancelled", "cancelled"),
    ("cancel", "pause", "cancelled"),
    (None, "release", "queued"),
    ("pause", "release", "paused"),
    ("cancel", "release", "cancelled"),
    (None, "succeed", "succeeded"),
    ("pause", "succeed", "succeeded"),
    ("cancel", "succeed", "cancelled"),
    (None, "fail", "failed"),
    ("pause", "fail", "failed"),
    ("cancel", "fail", "cancelled"),
]


@pytest.mark.parametrize(("wished", "report", "status"), ENDS)
def test_where_a_job_goes_when_its_worker_lets_go(
    store: Store, settings: Settings, doorbell: Doorbell, held: Lease, wished: str | None, report: str, status: str
) -> None:
    if wished:
        wish(store, doorbell, held, wished)
    with store.begin() as session:  # it has been at work for a while
        claimed_at = jobs.get(session, "default", held.job_id).claimed_at
        assert claimed_at is not None
        earlier = claimed_at.replace(year=claimed_at.year - 1)
        session.execute(update(Job).where(Job.id == held.job_id).values(claimed_at=earlier))
    assert WRITES[report](store, settings, held) == status
    job = read(store, held)
    assert (job.status, job.lease_owner, job.lease_until, job.wish, job.phase) == (status, None, None, None, None)
    assert job.run_s > 364 * 86400
    assert (job.finished_at is not None) == (status in ("succeeded", "failed", "cancelled"))
    assert told(store, held, "status_changed")[-1]["to"] == status


def test_success_keeps_its_result_and_failure_its_error(store: Store, settings: Settings, new_job: NewJob, held: Lease) -> None:
    leases.succeed(store, held, {"final": {"loss": float("nan")}}, "target_reached")
    job = read(store, held)
    assert (job.result, job.error, job.status_reason) == ({"final": {"loss": None}}, None, "target_reached")
    new_job()
    claimed = leases.claim(store, settings, "w", {"any"})
    assert claimed is not None
    leases.commit_step(store, claimed[0], 7, {})
    leases.set_phase(store, claimed[0], Phase.GRADING)
    leases.fail(store, claimed[0], Failure("prompt_too_long", "300 > 128", hint="shorten it"), {"steps": 7})
    job = read(store, claimed[0])
    assert job.error == {
        "code": "prompt_too_long",
        "detail": "300 > 128",
        "category": "user",
        "retryable": False,
        "hint": "shorten it",
        "phase": "grading",
        "step": 7,
        "attempt": 1,
    }
    assert (job.status_reason, job.result) == ("prompt_too_long", {"steps": 7})
    assert told(store, claimed[0], "failure") == [job.error]


def test_retryable_failures_are_retried_until_they_are_too_many(store: Store, settings: Settings, new_job: NewJob) -> None:
    job = new_job(limits={"max_attempts": 3})
    for status in ("queued", "queued", "failed"):
        claimed = leases.claim(store, settings, "w", {"any"})
        assert claimed is not None
        assert leases.release(store, claimed[0], "store_unavailable", failure=FAILURE) == status
    with store.begin(readonly=True) as session:
        ended = jobs.get(session, "default", job.id)
    assert (ended.attempt, ended.retries, ended.error and ended.error["code"]) == (3, 3, "store_unavailable")


def test_faults_with_a_checkpoint_between_them_are_not_added_up(store: Store, settings: Settings, new_job: NewJob) -> None:
    new_job(limits={"max_attempts": 2})
    for step in range(1, 6):
        claimed = leases.claim(store, settings, "w", {"any"})
        assert claimed is not None
        leases.commit_checkpoint(store, claimed[0], checkpoint(step))
        assert leases.release(store, claimed[0], "grader_down", failure=FAILURE) == "queued"


def test_draining_costs_no_attempt(store: Store, settings: Settings, new_job: NewJob) -> None:
    job = new_job(limits={"max_attempts": 1})
    for _ in range(3):
        claimed = leases.claim(store, settings, "w", {"any"})
        assert claimed is not None
        assert leases.release(store, claimed[0], "drained") == "queued"
    with store.begin(readonly=True) as session:
        ended = jobs.get(session, "default", job.id)
    assert (ended.retries, ended.crashes) == (0, 0)


def test_a_lost_worker_gives_back_all_that_it_held_and_nothing_else(
    store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob
) -> None:
    made = [new_job() for _ in range(3)]
    owners = ["w1", "w1", "w2"]
    for owner in owners:
        assert leases.claim(store, settings, owner, {"any"}) is not None
    assert leases.worker_lost(store, doorbell, "w1") == [made[0].id, made[1].id]
    with store.begin(readonly=True) as session:
        found = [jobs.get(session, "default", job.id) for job in made]
    assert [(job.status, job.status_reason, job.crashes) for job in found] == [
        ("queued", "worker_lost", 1),
        ("queued", "worker_lost", 1),
        ("running", "claimed", 0),
    ]
    assert doorbell.waiting("any") == 3 + 2  # rung when they were made, and again


# ---------------------------------------------------------------- a write whose answer was lost


def test_a_step_that_was_taken_is_not_told_again(store: Store, held: Lease) -> None:
    leases.commit_step(store, held, 1, {"loss": 1.0}, again=True)
    leases.commit_step(store, held, 1, {"loss": 1.0}, again=True)
    assert [data["step"] for data in told(store, held, "step")] == [1]
    leases.commit_step(store, held, 1, {"loss": 2.0})
    assert len(told(store, held, "step")) == 2, "only a repetition that says so is one"


def test_a_step_of_an_earlier_attempt_is_written_anew(store: Store, settings: Settings, held: Lease) -> None:
    leases.commit_step(store, held, 1, {"loss": 1.0})
    leases.release(store, held, "lost")
    claimed = leases.claim(store, settings, "w2", {"any"})
    assert claimed is not None
    leases.commit_step(store, claimed[0], 1, {"loss": 1.0}, again=True)
    assert len(told(store, held, "step")) == 2


def test_a_checkpoint_that_was_taken_is_not_taken_again(store: Store, held: Lease) -> None:
    row = checkpoint(3)
    leases.commit_checkpoint(store, held, row)
    leases.commit_checkpoint(store, held, row)
    with store.begin(readonly=True) as session:
        assert [one.id for one in checkpoints.of_job(session, held.job_id)] == [row.id]
    assert len(told(store, held, "checkpoint_saved")) == 1
