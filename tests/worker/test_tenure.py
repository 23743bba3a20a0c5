"""What holds work: one thread and one statement for all leases of a process, patience, and no waiting when work is let go."""

import logging
import threading
import time
from collections.abc import Callable
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import event, select
from sqlalchemy.exc import OperationalError

from service.doorbell import Doorbell
from service.errors import Failure, LeaseLost
from service.ids import utcnow
from service.jobs import lease as leases
from service.jobs import lifecycle
from service.jobs.lease import Lease
from service.jobs.lifecycle import create_job
from service.jobs.resolve import resolve
from service.settings import Settings
from service.spec.job import CheckpointsSpec, JobSpec
from service.states import Phase, Wish
from service.store import checkpoints, events, jobs, usage
from service.store.session import Store
from service.store.tables import Job
from service.validation import parse
from workers.policy.checkpoint import verify
from workers.tenure import keeper as module
from workers.tenure.keeper import Hold, Keeper
from workers.tenure.log_tail import LogTail
from workers.tenure.outcome import Cancelled, Drained, Failed, Outcome, Paused, Succeeded
from workers.tenure.tenure import Contents, Tenure

SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
AWAY = OperationalError("COMMIT", {}, Exception("the server closed the connection"))
TRANSACTION = ("BEGIN", "PRAGMA")
Claim = Callable[[int], list[tuple[Lease, Job]]]


@pytest.fixture
def keeper(store: Store, settings: Settings, doorbell: Doorbell) -> Keeper:
    """Whose thread does not run: the test looks at the clocks itself."""
    return Keeper(store, settings, doorbell)


@pytest.fixture
def claim(store: Store, settings: Settings, doorbell: Doorbell, specs: SimpleNamespace) -> Claim:
    """So many jobs, held by one worker."""

    def claim(count: int) -> list[tuple[Lease, Job]]:
        sent = specs.supervised()
        resolved = resolve(store, settings, "default", parse(JobSpec, sent))
        for _ in range(count):
            create_job(store, doorbell, project="default", sent=sent, resolved=resolved)
        claimed = [leases.claim(store, settings, "w", {"any"}) for _ in range(count)]
        return [one for one in claimed if one is not None]

    return claim


@pytest.fixture
def hold(settings: Settings) -> Callable[[Lease], Hold]:
    return lambda lease: Hold(lease, stall_timeout_s=60, tail=LogTail(settings))


@pytest.fixture
def statements(store: Store) -> list[tuple[str, str]]:
    """(thread, statement), as they are sent to the database; BEGIN left out."""
    sent: list[tuple[str, str]] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if not statement.startswith(TRANSACTION):
            sent.append((threading.current_thread().name, statement))

    event.listen(store.engine, "before_cursor_execute", note)
    return sent


def until_of(store: Store, lease: Lease) -> datetime:
    with store.begin(readonly=True) as session:
        found = session.scalar(select(Job.lease_until).where(Job.id == lease.job_id))
    assert found is not None
    return found


def eventually(holds: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---------------------------------------------------------------- one thread, one statement


def test_fifty_leases_are_renewed_by_one_statement(
    store: Store, keeper: Keeper, claim: Claim, hold: Callable[[Lease], Hold], statements: list[tuple[str, str]]
) -> None:
    held = [lease for lease, _ in claim(50)]
    assert len(held) == 50
    for lease in held:
        keeper.hold(hold(lease))
    keeper.tick()  # the phases
    before = [until_of(store, lease) for lease in held]
    statements.clear()
    keeper.tick(renew=True)
    assert [statement.split(" ", 2)[:2] for _, statement in statements] == [["UPDATE", "jobs"]]
    assert all(until_of(store, lease) > was for lease, was in zip(held, before, strict=True))
    statements.clear()
    keeper.tick()
    assert statements == []  # there is nothing to say


def test_fifty_leases_are_kept_by_one_thread(
    store: Store,
    settings: Settings,
    doorbell: Doorbell,
    claim: Claim,
    hold: Callable[[Lease], Hold],
    statements: list[tuple[str, str]],
) -> None:
    held = [lease for lease, _ in claim(50)]
    threads = threading.active_count()
    with Keeper(store, settings.model_copy(update={"lease_renew_s": 0.1}), doorbell) as keeper:
        for lease in held:
            keeper.hold(hold(lease))
        assert threading.active_count() == threads + 1
        first = until_of(store, held[0])
        eventually(lambda: until_of(store, held[0]) > first)
        renewed = [until_of(store, lease) for lease in held]
        eventually(lambda: all(until_of(store, lease) > was for lease, was in zip(held, renewed, strict=True)))
    assert {thread for thread, statement in statements if statement.startswith("UPDATE jobs SET lease_until")} == {"keeper"}


def test_a_lease_that_is_lost_is_lost_alone(
    store: Store, settings: Settings, keeper: Keeper, claim: Claim, hold: Callable[[Lease], Hold]
) -> None:
    first, gone, taken, last = holds = [hold(lease) for lease, _ in claim(4)]
    for one in holds:
        keeper.hold(one)
    leases.release(store, gone.lease, "drained")
    leases.release(store, taken.lease, "drained")
    assert leases.claim(store, settings, "another", {"any"}) is not None
    before = [until_of(store, one.lease) for one in (first, last)]
    keeper.tick(renew=True)
    for zombie in (gone, taken):
        with pytest.raises(LeaseLost, match=zombie.lease.job_id):
            zombie.check()
    assert (first.check(), last.check()) == (None, None)
    assert all(until_of(store, one.lease) > was for one, was in zip((first, last), before, strict=True))
    for zombie in (gone, taken):
        keeper.let_go(zombie)
    keeper.tick(renew=True)
    assert (first.check(), last.check()) == (None, None)


def test_a_wish_reaches_the_work_that_it_is_for_at_once(
    store: Store, settings: Settings, doorbell: Doorbell, claim: Claim, hold: Callable[[Lease], Hold]
) -> None:
    holds = [hold(lease) for lease, _ in claim(3)]
    with Keeper(store, settings.model_copy(update={"lease_renew_s": 3600.0}), doorbell) as keeper:
        for one in holds:
            keeper.hold(one)
        eventually(lambda: all(one.written_phase is Phase.LOADING for one in holds))  # it listens
        lifecycle.pause(store, doorbell, "default", holds[1].lease.job_id)
        eventually(lambda: holds[1].wish is not None, timeout_s=5)
        assert [one.check() for one in holds] == [None, Wish.PAUSE, None]


def test_work_that_follows_other_work_is_listened_for_at_once(
    store: Store, settings: Settings, doorbell: Doorbell, claim: Claim, hold: Callable[[Lease], Hold]
) -> None:
    """The quickest of several: the thread had listened for a whole second otherwise, each time."""
    one, *others = (hold(lease) for lease, _ in claim(4))
    took = list[float]()
    with Keeper(store, settings.model_copy(update={"lease_renew_s": 3600.0}), doorbell) as keeper:
        keeper.hold(one)
        for other in others:
            eventually(lambda one=one: one.written_phase is Phase.LOADING)  # and the thread listens again
            time.sleep(0.1)
            keeper.let_go(one)
            started = time.monotonic()
            keeper.hold(other)
            eventually(lambda other=other: other.written_phase is Phase.LOADING)
            took.append(time.monotonic() - started)
            one = other
    assert min(took) < 0.6


def test_a_wish_that_came_before_anybody_listened_is_not_missed(
    store: Store, settings: Settings, doorbell: Doorbell, claim: Claim, hold: Callable[[Lease], Hold]
) -> None:
    one = hold(claim(1)[0][0])
    lifecycle.cancel(store, doorbell, "default", one.lease.job_id)
    with Keeper(store, settings.model_copy(update={"lease_renew_s": 3600.0}), doorbell) as keeper:
        keeper.hold(one)
        eventually(lambda: one.wish is Wish.CANCEL, timeout_s=5)


@SQLITE
def test_a_look_that_fails_is_not_the_last_one(
    store: Store,
    settings: Settings,
    doorbell: Doorbell,
    claim: Claim,
    hold: Callable[[Lease], Hold],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listen, failures = doorbell.listen, [RuntimeError("nobody thought of this"), RuntimeError("nor of this")]

    def stumbling(*args: Any) -> bool:
        if failures:
            raise failures.pop()
        return listen(*args)

    monkeypatch.setattr(doorbell, "listen", stumbling)
    one = hold(claim(1)[0][0])
    first = until_of(store, one.lease)
    with Keeper(store, settings.model_copy(update={"lease_renew_s": 0.1}), doorbell) as keeper:
        keeper.hold(one)
        eventually(lambda: until_of(store, one.lease) > first)


# ---------------------------------------------------------------- the clocks


@SQLITE
def test_who_could_not_renew_for_too_long_stops_by_himself(
    keeper: Keeper, settings: Settings, hold: Callable[[Lease], Hold], monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> None:
        raise AWAY

    monkeypatch.setattr(leases, "renew_all", away)
    old, young = hold(Lease("job_1", 1, "w")), hold(Lease("job_2", 1, "w"))
    old.renewed_at -= settings.lease_self_stop_s + 1
    for one in (old, young):
        keeper.hold(one)
    keeper.tick(renew=True)
    with pytest.raises(LeaseLost, match="could not renew for 45 s"):
        old.check()
    assert young.check() is None


@SQLITE
def test_a_lease_counts_from_when_it_was_asked_for(
    keeper: Keeper, hold: Callable[[Lease], Hold], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store may hold a renewal up; the row's new end was reckoned before that."""
    one = hold(Lease("job_1", 1, "w"))

    def slow(store: Store, settings: Settings, held: list[Lease]) -> dict[Lease, None]:
        time.sleep(0.3)
        return dict.fromkeys(held)

    monkeypatch.setattr(leases, "renew_all", slow)
    monkeypatch.setattr(leases, "set_phase", lambda *_: None)
    keeper.hold(one)
    asked_at = time.monotonic()
    keeper.tick(renew=True)
    assert asked_at <= one.renewed_at < asked_at + 0.2


@SQLITE
def test_work_that_does_not_stop_when_its_lease_is_lost_is_ended_with_its_process(
    keeper: Keeper, hold: Callable[[Lease], Hold], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Exited(Exception): ...

    def exit_(code: int) -> None:
        raise Exited(code)

    monkeypatch.setattr(module.os, "_exit", exit_)
    stopped, goes_on = hold(Lease("job_1", 1, "w")), hold(Lease("job_2", 1, "w"))
    for one in (stopped, goes_on):
        keeper.hold(one)
        one.lose("taken")
        one.lost_at -= module.NOTICE_S + 1
    keeper.let_go(stopped)
    with pytest.raises(Exited, match=str(module.EXIT_LEASE_LOST)):
        keeper.tick()
    keeper.let_go(goes_on)
    keeper.tick()


# ---------------------------------------------------------------- how work ends

ENDS = [
    (Succeeded({"ended": "max_steps"}, "max_steps"), "succeeded", "max_steps"),
    (Paused(), "paused", "paused"),
    (Paused("budget_spent"), "paused", "budget_spent"),
    (Cancelled(), "cancelled", "cancelled"),
    (Drained(), "queued", "drained"),
    (Failed(Failure("store_unavailable", "away"), 3), "queued", "store_unavailable"),
    (Failed(Failure("grader_unhealthy", "ill"), 3), "paused", "grader_unhealthy"),
    (Failed(Failure("prompt_empty", "nothing"), 3, {"steps": 3}), "failed", "prompt_empty"),
]


@pytest.mark.parametrize(("outcome", "status", "reason"), ENDS, ids=lambda value: str(value)[:40])
@SQLITE
def test_each_outcome_is_written_down_with_what_was_spent(
    store: Store, keeper: Keeper, claim: Claim, outcome: Outcome, status: str, reason: str
) -> None:
    lease, job = claim(1)[0]
    if isinstance(outcome, Cancelled):
        lifecycle.cancel(store, keeper.doorbell, "default", job.id)
    if outcome == Paused():
        lifecycle.pause(store, keeper.doorbell, "default", job.id)
    with Tenure(keeper, lease, job, stall_timeout_s=60) as tenure:
        logging.getLogger("workers.test").warning("the last line")
        tenure.check(Phase.UPDATING)
        tenure.meter.trained(7)
        tenure.settle(outcome)
        assert keeper.held() == []
    with store.begin(readonly=True) as session:
        ended = jobs.get(session, "default", job.id)
        assert usage.of_job(session, job.id).trained_tokens == 7
    assert (ended.status, ended.status_reason, ended.lease_owner) == (status, reason, None)
    if isinstance(outcome, Failed):
        assert ended.error is not None
        where = {name: ended.error[name] for name in ("code", "phase", "step", "attempt")}
        assert where == {"code": reason, "phase": "updating", "step": 3, "attempt": 1}
        assert ended.error["log_tail"][-1].endswith("the last line")


@SQLITE
def test_a_retry_waits_longer_after_each_failure(store: Store, keeper: Keeper, claim: Claim) -> None:
    lease, job = claim(1)[0]
    job.retries = 1
    with Tenure(keeper, lease, job, stall_timeout_s=60) as tenure:
        before = utcnow()
        tenure.settle(Failed(Failure("store_unavailable", "away"), 0))
    with store.begin(readonly=True) as session:
        not_before = jobs.get(session, "default", job.id).not_before
    assert not_before is not None
    assert 10 <= (not_before - before).total_seconds() < 15


@SQLITE
def test_a_zombie_settles_nothing_and_points_nobody_at_its_checkpoint(
    store: Store, settings: Settings, keeper: Keeper, claim: Claim
) -> None:
    lease, job = claim(1)[0]
    with Tenure(keeper, lease, job, stall_timeout_s=60) as tenure:
        leases.release(store, lease, "lost")
        assert leases.claim(store, settings, "another", {"any"}) is not None
        with pytest.raises(LeaseLost):
            tenure.save(contents(1), CheckpointsSpec())
        with pytest.raises(LeaseLost):
            tenure.commit_step(1, {"loss": 1.0})
        with pytest.raises(LeaseLost):
            tenure.settle(Succeeded({}, "max_steps"))
    with store.begin(readonly=True) as session:
        now = jobs.get(session, "default", job.id)
        assert (now.status, now.attempt, now.step, now.checkpoint_id) == ("running", 2, 0, None)
        assert checkpoints.of_job(session, job.id) == []


# ---------------------------------------------------------------- checkpoints


def contents(step: int, metrics: dict[str, float] | None = None) -> Contents:
    def write(folder: Path) -> None:
        (folder / "weights").write_text(f"at {step}")

    return Contents(step, "lora", write, metrics or {})


@SQLITE
def test_a_checkpoint_is_written_once_a_step_and_pushes_the_oldest_out(store: Store, keeper: Keeper, claim: Claim) -> None:
    lease, job = claim(1)[0]
    with Tenure(keeper, lease, job, stall_timeout_s=60) as tenure:
        for step in (1, 1, 2, 3):
            tenure.save(contents(step, {"eval/loss": float(step)}), CheckpointsSpec(keep_last=2))
        tenure.save(contents(3), CheckpointsSpec(keep_last=2), final=True)  # the last one is written again, and says so
    with store.begin(readonly=True) as session:
        kept = checkpoints.of_job(session, job.id)
        assert jobs.get(session, "default", job.id).checkpoint_id == kept[0].id
    assert [(row.step, row.is_final, row.metrics) for row in kept] == [(3, True, {}), (3, False, {"eval/loss": 3.0})]
    folders = sorted((store.blobs.root / "checkpoints" / job.id).iterdir())
    assert folders == sorted(store.blobs.path(row.path) for row in kept)
    verify(folders[0], kept[1].manifest_sha256)
    assert (folders[0] / "weights").read_text() == "at 3"


@SQLITE
def test_what_could_not_be_written_whole_leaves_nothing_behind(store: Store, keeper: Keeper, claim: Claim) -> None:
    lease, job = claim(1)[0]

    def full(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise OSError(28, "No space left on device")

    with Tenure(keeper, lease, job, stall_timeout_s=60) as tenure, pytest.raises(OSError, match="No space"):
        tenure.save(Contents(1, "lora", full, {}), CheckpointsSpec())
    assert [path for path in store.blobs.root.rglob("*") if path.is_file()] == []


# ---------------------------------------------------------------- letting go


@SQLITE
def test_letting_go_waits_for_nobody(store: Store, settings: Settings, doorbell: Doorbell, claim: Claim) -> None:
    """The quickest of several: the machine may have other things to do."""
    waits: list[float] = []
    with Keeper(store, settings, doorbell) as keeper:
        for lease, job in claim(3):
            with Tenure(keeper, lease, job, stall_timeout_s=60) as tenure:
                time.sleep(0.1)  # the thread listens now, for up to a second
                tenure.check(Phase.UPDATING)
                done = time.monotonic()
            waits.append(time.monotonic() - done)
        assert keeper.held() == []
    assert min(waits) < 0.3, waits


@SQLITE
def test_what_was_settled_during_a_look_is_not_lost(
    keeper: Keeper, hold: Callable[[Lease], Hold], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = hold(Lease("job_1", 1, "w"))

    def settled_meanwhile(store: Store, settings: Settings, held: list[Lease]) -> dict[Lease, LeaseLost]:
        keeper.let_go(one)
        return {lease: LeaseLost("it is succeeded") for lease in held}

    monkeypatch.setattr(leases, "renew_all", settled_meanwhile)
    keeper.hold(one)
    keeper.tick(renew=True)
    assert one.lost is None


@pytest.mark.timeout(120)
def test_a_worker_takes_the_next_job_at_once(shared: Any, specs: SimpleNamespace) -> None:
    """The quickest of several: the machine may have other things to do."""
    ids = [shared.submit(specs.supervised(limits={"max_steps": 1})).id for _ in range(6)]
    jobs = [shared.succeeded(job_id) for job_id in ids]
    gaps = [(after.started_at - before.finished_at).total_seconds() for before, after in pairwise(jobs)]
    assert min(gaps) < 0.4, gaps


# ---------------------------------------------------------------- patience


@pytest.fixture
def patient(hold: Callable[[Lease], Hold], monkeypatch: pytest.MonkeyPatch) -> Hold:
    monkeypatch.setattr(module, "AGAIN_S", 0.0)
    return hold(Lease("job_1", 1, "w"))


def failing(*errors: Exception) -> Any:
    left = list(errors)

    def write() -> str:
        if left:
            raise left.pop(0)
        return "written"

    return write


@SQLITE
def test_a_write_is_tried_until_the_store_is_back(patient: Hold) -> None:
    assert patient.patiently(failing(AWAY, AWAY)) == "written"


@SQLITE
def test_it_is_given_up_when_the_lease_may_be_anothers(patient: Hold) -> None:
    patient.lose("could not renew for 45 s")
    with pytest.raises(LeaseLost, match="could not renew"):
        patient.patiently(failing(AWAY))


@SQLITE
def test_a_step_whose_answer_was_lost_is_committed_once(
    store: Store, keeper: Keeper, claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AGAIN_S", 0.0)
    commit, tries = leases.commit_step, list[bool]()

    def unheard(*args: Any, **kwargs: Any) -> bool:
        tries.append(kwargs["again"])
        answer = commit(*args, **kwargs)
        if len(tries) == 1:
            raise AWAY
        return answer

    monkeypatch.setattr(leases, "commit_step", unheard)
    lease, job = claim(1)[0]
    with Tenure(keeper, lease, job, stall_timeout_s=60) as tenure:
        tenure.meter.trained(5)
        tenure.commit_step(1, {"loss": 1.0})
        assert tenure.budget_spent is False
    assert tries == [False, True]
    with store.begin(readonly=True) as session:
        assert usage.of_job(session, job.id).trained_tokens == 5
        assert [found.type for found in events.after(session, job.id, 0)].count("step") == 1


@SQLITE
def test_other_errors_are_not_for_waiting(patient: Hold) -> None:
    with pytest.raises(ValueError, match="no"):
        patient.patiently(failing(ValueError("no")))
