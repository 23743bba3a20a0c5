"""Many sessions in one process: alone or together the results are the same, turns are fair, and whoever must go is gone."""

from datetime import timedelta
from time import monotonic
from typing import Any

import pytest
import torch
from session_operations import FULL, LORA, forward_backward, loop, optim_step, row, train_step

from job_specs import supervised_spec
from service.jobs import lifecycle
from service.jobs.lifecycle import create_job
from service.jobs.resolve import resolve
from service.spec.job import JobSpec
from service.store import clock, workers
from service.store.tables import TinkerModel, TinkerSession, Worker
from service.validation import parse
from workers.policy.base import Base
from workers.sessions import host
from workers.sessions.host import Host
from workers.sessions.session import Session
from workers.sessions.training import TRAINING
from workers.sessions.turns import FairTurns, Turns
from workers.tenure.keeper import Keeper

SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
SAMPLE = {"kind": "sample", "prompts": [[5, 6, 7]], "num_samples": 2, "seed": 3, "sampling": {"max_tokens": 6}}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def when(monkeypatch: pytest.MonkeyPatch, seq: int, act: Any) -> None:
    """Call `act` right after an operation with this seq has run."""
    plain = Session.do

    def do(self: Session, row: Any) -> None:
        plain(self, row)
        if row.seq == seq:
            act()

    monkeypatch.setattr(Session, "do", do)


def test_two_sessions_on_one_base_are_as_each_alone(rig: Any) -> None:
    wide = {
        **LORA,
        "adapter": {"kind": "lora", "rank": 8, "alpha": 4, "dropout": 0.1, "target_modules": ["q_proj", "down_proj"]},
    }
    alone = []
    for model in (LORA, wide):
        job = rig.session(model)
        rig.send(job, *loop(3), train_step(), SAMPLE)
        rig.work()
        alone.append(job)
    together = [rig.session(LORA), rig.session(wide)]
    for job in together:
        rig.send(job, *loop(3), train_step(), SAMPLE)
    rig.work()
    for one, other in zip(alone, together, strict=True):
        assert same(rig.weights(one), rig.weights(other))
        for seq in range(1, 12):
            assert rig.answer(one, seq) == rig.answer(other, seq), seq


@SQLITE
def test_another_sessions_weight_decay_leaves_ours_alone(rig: Any) -> None:
    ours, other = rig.session(), rig.session()
    look = forward_backward(row(5, 6, 7), kind="forward")
    rig.send(ours, look, look)
    rig.send(other, *[forward_backward(row(5, 6)), optim_step(learning_rate=0.5, weight_decay=1.5)] * 3)
    rig.work()
    assert rig.job(other).step == 3
    assert rig.answer(ours, 1) == rig.answer(ours, 2)


@SQLITE
def test_a_large_tenant_delays_a_small_one_by_two_operations_at_most(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = rig.session(project="large"), rig.session(project="small")
    big = forward_backward(*[row(*range(5, 60))] * 4)
    rig.send(large, *[big] * 100)
    ran: list[str] = []
    plain = Session.do

    def do(self: Session, operation: Any) -> None:
        plain(self, operation)
        ran.append(self.tenure.job.project)
        if len(ran) == 10:
            rig.send(small, forward_backward(row(5, 6)))

    monkeypatch.setattr(Session, "do", do)
    rig.work()
    assert ran.count("large") == 100 and ran.count("small") == 1
    assert ran.index("small") - 10 <= 2


@SQLITE
def test_samples_are_found_while_operations_in_order_run(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "FIND_S", 0.0)
    session, ran = rig.session(), list[str]()
    rig.send(session, *[forward_backward(row(5, 6))] * 30)
    when(monkeypatch, 5, lambda: rig.send_loose(session, SAMPLE, lane="beside"))
    plain_do, plain_add = Session.do, Host._add

    def do(self: Session, row: Any) -> None:
        plain_do(self, row)
        ran.append("in order")

    def add(self: Host, guest: Any, row: Any) -> None:
        plain_add(self, guest, row)
        ran.append("sample")

    monkeypatch.setattr(Session, "do", do)
    monkeypatch.setattr(Host, "_add", add)
    rig.work()
    assert rig.answer(session, 1, "beside")["tokens"]
    assert ran.index("sample") <= 5 + 1 + host.TOGETHER  # what is left of that turn, and one more


def test_turns_are_by_work_and_not_by_arrival() -> None:
    turns = FairTurns()
    waiting = {"a1": "a", "a2": "a", "b1": "b"}
    had = dict.fromkeys(waiting, 0.0)
    for _ in range(400):
        session = turns.next(waiting)
        cost = {"a1": 10.0, "a2": 1.0, "b1": 3.0}[session]
        turns.spend(waiting[session], session, cost)
        had[session] += cost
    assert abs(had["a1"] + had["a2"] - had["b1"]) <= 10
    assert abs(had["a1"] - had["a2"]) <= 10


def test_nobody_saves_up_turns() -> None:
    turns = Turns()
    for _ in range(100):
        turns.spend("busy", 1.0)
    order = []
    for _ in range(6):
        name = turns.next({"busy", "late"})
        order.append(name)
        turns.spend(name, 1.0)
    assert order.count("busy") == order.count("late") == 3


# ---------------------------------------------------------------- leaving


@SQLITE
def test_an_idle_session_comes_back_unharmed(rig: Any) -> None:
    evicted, quiet = rig.session(), rig.session()
    for step in range(3):
        rig.send(evicted, *loop(1, first=step)[:1])
        rig.work()
        assert rig.job(evicted).status_reason == "idle"
        rig.send(evicted, *loop(1, first=step)[1:])
        rig.work()
    rig.send(quiet, *loop(3))
    rig.work()
    assert same(rig.weights(evicted), rig.weights(quiet))


@SQLITE
def test_work_for_one_is_progress_of_all(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is computed, or done again, for an hour does not make another look as if the process hung."""
    busy, resting = rig.session(), rig.session()
    rig.send(resting, *loop(1))
    rig.send(busy, *loop(1), train_step())
    plain, long_ago, ages = TRAINING["train_step"], -1e6, list[float]()

    def hours(*arguments: Any) -> Any:
        holds = rig.keeper.held()
        for hold in holds:
            hold.progress_at = monotonic() + long_ago
        done = plain(*arguments)
        ages.extend(monotonic() - hold.progress_at for hold in holds)
        return done

    monkeypatch.setitem(TRAINING, "train_step", hours)
    monkeypatch.setattr(Keeper, "tick", lambda self, *, renew=False: None)  # it would end this process
    rig.work()
    assert len(ages) == 2 and max(ages) < 1000, ages


Hub = tuple[list[str | None], list[str]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Bases as if from a hub: the revisions that were asked for, and the commit at which the branch is, to be moved."""
    plain, asked, newest = Base.load, list[str | None](), ["a" * 40]

    def load(*args: Any, revision: str | None = None, **more: Any) -> Base:
        base = plain(*args, **more)
        asked.append(revision)
        base.revision = revision or newest[0]
        return base

    monkeypatch.setattr(Base, "load", load)
    return asked, newest


@SQLITE
def test_a_session_stays_at_its_commit_when_the_branch_moves(rig: Any, hub: Hub) -> None:
    """After a restart, with a snapshot or without one, and beside a neighbour of another commit."""
    asked, newest = hub
    saved, fresh = rig.session(), rig.session()
    rig.send(saved, *loop(1))
    rig.send(fresh, {**SAMPLE})  # changes no weight, so that it has no snapshot
    rig.work()
    newest[0] = "b" * 40
    new = rig.session()
    for job in (new, saved, fresh):
        rig.send(job, *loop(1, first=1))
    asked.clear()
    rig.work()
    assert sorted(map(str, asked)) == sorted(["None", "a" * 40])  # one base for both of that commit
    assert [rig.job(job).resolved["revision"][0] for job in (saved, fresh, new)] == ["a", "a", "b"]


@SQLITE
def test_a_sampler_stays_at_its_commit_and_samples_versions_of_others_at_theirs(rig: Any, hub: Hub) -> None:
    asked, newest = hub
    job = rig.session()
    rig.send(job, *loop(1), {"kind": "save_checkpoint", "name": "v", "purpose": "sampler"}, SAMPLE)
    rig.work()
    version, sampler = rig.answer(job, 4)["checkpoint_id"], rig.sampler()
    for newest[0] in ("b" * 40, "c" * 40):
        asked.clear()
        rig.send_loose(sampler, SAMPLE, lane=f"{newest[0]} version", checkpoint=version)
        rig.send_loose(sampler, SAMPLE, lane=f"{newest[0]} base")
        rig.work()
        assert rig.answer(sampler, 1, f"{newest[0]} version") == rig.answer(job, 5)
        assert rig.answer(sampler, 1, f"{newest[0]} base")
        assert asked == [None if newest[0][0] == "b" else "b" * 40, "a" * 40]
        assert rig.job(sampler).resolved["revision"] == "b" * 40


@SQLITE
def test_a_dead_client_s_session_leaves_when_its_heartbeat_is_missed(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long before it has been idle for long enough, while that of a client which is heard of stays."""
    rig.settings = rig.settings.model_copy(update={"session_idle_s": 30.0, "tinker_silence_s": 0.5})
    dead, alive = rig.session(), rig.session()
    with rig.store.begin() as session:
        now = clock.now(session)
        for job, silence_s in ((dead, 6), (alive, -60)):
            seen_at = now - timedelta(seconds=silence_s)
            said = {"project": "default", "user_metadata": {}, "created_at": now}
            session.add(TinkerSession(id=f"of-{job}", tags=[], seen_at=seen_at, **said))
            session.flush()
            session.add(TinkerModel(id=job, session_id=f"of-{job}", job_id=job, base_model="tiny", published=[], **said))
    rig.send(dead, *loop(1))
    rig.send(alive, *loop(1))
    there: list[tuple[str, str]] = []
    plain = Host._forget

    def forget(self: Host, guest: Any) -> None:
        plain(self, guest)
        there.extend((job, rig.job(job).status) for job in (dead, alive))
        for other in list(self._guests.values()):  # enough was seen
            other.busy_at -= 100.0

    monkeypatch.setattr(Host, "_forget", forget)
    began = monotonic()
    rig.work()
    assert monotonic() - began < rig.settings.session_idle_s
    assert there[:2] == [(dead, "paused"), (alive, "running")]
    assert (rig.job(dead).status_reason, rig.operation(dead, 3).status) == ("idle", "done")


@SQLITE
@pytest.mark.parametrize("model", [LORA, FULL], ids=["lora", "full"])
def test_a_paused_session_goes_on_where_it_was(rig: Any, monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    job = rig.session(model)
    rig.send(job, *loop(3))
    when(monkeypatch, 5, lambda: lifecycle.pause(rig.store, rig.doorbell, "default", job))
    when(monkeypatch, 5, lambda: _heard(rig))
    rig.work()
    paused = rig.job(job)
    assert (paused.status, paused.status_reason) == ("paused", "paused")
    assert [rig.operation(job, seq).status for seq in (5, 9)] == ["done", "waiting"]
    monkeypatch.undo()
    lifecycle.resume(rig.store, rig.doorbell, "default", job)
    rig.work()
    quiet = rig.session(model)
    rig.send(quiet, *loop(3))
    rig.work()
    assert same(rig.weights(job), rig.weights(quiet))


def _heard(rig: Any) -> None:
    """Wait until the keeper has heard of the wish."""
    keeper = rig.keeper
    for hold in keeper.held():
        keeper._renew([hold])


@SQLITE
def test_a_cancelled_session_is_over(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = rig.session()
    rig.send(job, *loop(3))
    when(monkeypatch, 2, lambda: (lifecycle.cancel(rig.store, rig.doorbell, "default", job), _heard(rig)))
    rig.work()
    assert rig.job(job).status == "cancelled"
    assert rig.error(job, 9)["code"] == "session_over"


@SQLITE
def test_sessions_give_way_to_other_work(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.settings = rig.settings.model_copy(update={"session_slice_s": 0.01, "session_idle_s": 100.0})
    job = rig.session()
    rig.send(job, *loop(2))
    sent = supervised_spec()
    resolved = resolve(rig.store, rig.settings, "default", parse(JobSpec, sent))
    when(monkeypatch, 4, lambda: create_job(rig.store, rig.doorbell, project="default", sent=sent, resolved=resolved))
    rig.work_once()
    assert (rig.job(job).status, rig.job(job).status_reason) == ("queued", "gave_way")


@SQLITE
def test_a_draining_worker_gives_its_sessions_back(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = rig.session()
    rig.send(job, *loop(3))
    with rig.store.begin() as session:
        now = rig.job(job).created_at
        worker = Worker(id="w", host="h", pid=1, device="cpu", resource_classes=["any"], started_at=now, last_seen_at=now)
        workers.hello(session, worker)

    def drain() -> None:
        with rig.store.begin() as session:
            workers.set_draining(session, "w")
        _heard(rig)

    when(monkeypatch, 4, drain)
    rig.work()
    assert (rig.job(job).status, rig.job(job).status_reason) == ("queued", "drained")
    assert [rig.operation(job, seq).status for seq in (4, 9)] == ["done", "waiting"]


@SQLITE
def test_a_session_that_cannot_be_loaded_fails_alone(rig: Any) -> None:
    broken = rig.session({**LORA, "adapter": {"kind": "lora", "rank": 4, "target_modules": ["no_such_layer"]}})
    sound = rig.session()
    for job in (broken, sound):
        rig.send(job, *loop(1))
    rig.work()
    assert (rig.job(broken).status, rig.job(broken).error["code"]) == ("failed", "lora_target_modules")
    assert rig.job(sound).step == 1


@SQLITE
def test_a_failure_inside_an_operation_leaves_the_session_as_it_was(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have changed half of the weights: the session is loaded again without it."""
    from workers.policy.learner import Learner

    job, quiet = rig.session(), rig.session()
    rig.send(job, *loop(1), train_step(), *loop(1, first=1))
    rig.send(quiet, *loop(2))
    plain, calls = Learner.step, []

    def step(self: Learner, settings: Any = None) -> Any:
        result = plain(self, settings)
        if self.adapter is not None and job in self.adapter:
            calls.append(1)
            if len(calls) == 3:  # the train step's second of four
                raise MemoryError
        return result

    monkeypatch.setattr(Learner, "step", step)
    rig.work()
    assert rig.error(job, 4)["code"] == "out_of_memory"
    assert same(rig.weights(job), rig.weights(quiet))
