"""Random histories of jobs against a model of a few lines: whoever submits, claims, dies and comes back, in whatever order.

RATCHET_TEST_HISTORIES=500 tries that many histories instead of a few.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck
from hypothesis import Phase as Phases
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from pydantic import SecretStr
from sqlalchemy import select, text
from sqlalchemy.orm import defer

from chaos import stale
from service.errors import Conflict, Failure, LeaseLost
from service.ids import new_id, utcnow
from service.jobs import lease as leases
from service.jobs import lifecycle, reconciler
from service.jobs.lease import CheckpointRow, Lease
from service.settings import Settings
from service.states import ACTIONS, FINAL, HELD, Phase, Status, allowed_actions, is_legal
from service.store import clock, jobs
from service.store.session import Store, open_store, upgrade
from service.store.tables import Base, Checkpoint, Event, Job, Metric, Worker

HISTORIES = int(os.environ.get("RATCHET_TEST_HISTORIES", "0"))
STEPS = 30
OWNERS = ("w1", "w2", "w3")
S = Status
owners = st.sampled_from(OWNERS)
# An index into whatever there is: modulo its number.
which = st.integers(0, 1000)


@dataclass
class Model:
    """What a job should be."""

    max_attempts: int
    priority: int
    queued_at: datetime
    status: Status = S.QUEUED
    not_before: datetime | None = None
    attempt: int = 0
    owner: str | None = None
    lease_until: datetime | None = None
    crashes: int = 0
    retries: int = 0
    step: int = 0
    saved: list[str] = field(default_factory=list)

    def leave(self, target: Status, now: datetime) -> None:
        """Out of its worker's hands, as near to `target` as its owner wished."""
        if self.status is S.CANCELLING:
            target = S.CANCELLED
        elif self.status is S.PAUSING and target is S.QUEUED:
            target = S.PAUSED
        self.status, self.owner, self.lease_until = target, None, None
        if target is S.QUEUED:
            self.queued_at, self.not_before = now, None

    def lose(self, now: datetime) -> None:
        self.crashes += 1
        loop = self.status is S.RUNNING and self.crashes >= self.max_attempts
        self.leave(S.FAILED if loop else S.QUEUED, now)


class SilentDoorbell:
    """Losing every message must be harmless: here none is ever heard."""

    def ring(self, job_id: str, resource_class: str) -> bool:
        return True

    def signal(self, job_id: str, what: str) -> bool:
        return True

    def waiting(self, resource_class: str) -> int:
        return 0


class Histories(RuleBasedStateMachine):
    store: ClassVar[Store]
    settings: ClassVar[Settings]
    new_job: ClassVar[Callable[..., Job]]
    bell: ClassVar[Any] = SilentDoorbell()
    now: ClassVar[datetime]

    def __init__(self) -> None:
        super().__init__()
        self.models: dict[str, Model] = {}
        self.leases: list[Lease] = []
        self.draining: set[str] = set()

    @initialize()
    def empty(self) -> None:
        type(self).now = utcnow()
        with self.store.begin() as session:
            for table in reversed(Base.metadata.sorted_tables):
                session.execute(table.delete())
            session.execute(text(f"DELETE FROM {stale.TABLE}"))
            for owner in OWNERS:
                times = {"started_at": self.now, "last_seen_at": self.now}
                session.add(Worker(id=owner, host="h", pid=1, device="cpu", resource_classes=["any"], draining=False, **times))

    def job(self, number: int) -> tuple[str, Model]:
        return list(self.models.items())[number % len(self.models)]

    def lease(self, number: int) -> tuple[Lease, Model]:
        lease = self.leases[number % len(self.leases)]
        return lease, self.models[lease.job_id]

    def holds(self, lease: Lease) -> bool:
        model = self.models[lease.job_id]
        return model.status in HELD and (model.attempt, model.owner) == (lease.attempt, lease.owner)

    def write(self, lease: Lease, do: Callable[[], Any]) -> bool:
        """A worker writes. True when it holds the job; a zombie must be refused."""
        if self.holds(lease):
            do()
            return True
        with pytest.raises(LeaseLost):
            do()
        return False

    # ------------------------------------------------------------ people

    @rule(priority=st.sampled_from([10, 50]), max_attempts=st.integers(1, 3))
    def submit(self, priority: int, max_attempts: int) -> None:
        self._queue(priority, max_attempts, None)

    @precondition(lambda self: self.models)
    @rule(number=which)
    def fork(self, number: int) -> None:
        """From the newest checkpoint; a parent without one is begun anew. The parent stays as it is."""
        parent_id, parent = self.job(number)
        self._queue(parent.priority, parent.max_attempts, parent_id, parent.saved[-1] if parent.saved else None)

    def _queue(self, priority: int, max_attempts: int, parent_id: str | None, start: str | None = None) -> None:
        limits = {"max_steps": 10, "max_attempts": max_attempts}
        job = self.new_job(
            self.store,
            self.bell,
            parent_id=parent_id,
            from_checkpoint_id=start,
            limits=limits,
            resources={"priority": priority},
        )
        self.models[job.id] = Model(max_attempts, priority, self.now)

    @precondition(lambda self: self.models)
    @rule(number=which, action=st.sampled_from(["pause", "resume", "cancel"]))
    def act(self, number: int, action: str) -> None:
        job_id, model = self.job(number)
        do = getattr(lifecycle, action)
        target = ACTIONS[action].get(model.status)
        if target is None and model.status not in lifecycle.ALREADY[action]:
            with pytest.raises(Conflict) as refused:
                do(self.store, self.bell, "default", job_id)
            assert refused.value.extra["allowed_moves"] == allowed_actions(model.status)
            return
        assert do(self.store, self.bell, "default", job_id).status == (target or model.status)
        if target is not None:
            model.status = target
            if target is S.QUEUED:
                model.queued_at, model.not_before = self.now, None

    @precondition(lambda self: any(model.status in FINAL for model in self.models.values()))
    @rule(number=which)
    def delete(self, number: int) -> None:
        ended = [job_id for job_id, model in self.models.items() if model.status in FINAL]
        job_id = ended[number % len(ended)]
        lifecycle.delete(self.store, "default", job_id)
        del self.models[job_id]
        self.leases = [lease for lease in self.leases if lease.job_id != job_id]

    # ------------------------------------------------------------ workers

    @rule(owner=owners)
    def claim(self, owner: str) -> None:
        due = [
            (-model.priority, model.queued_at, job_id)
            for job_id, model in self.models.items()
            if model.status is S.QUEUED and (model.not_before is None or model.not_before <= self.now)
        ]
        claimed = leases.claim(self.store, self.settings, owner, {"any"})
        if not due or owner in self.draining:
            assert claimed is None
            return
        assert claimed is not None
        lease, job = claimed
        assert job.id == min(due)[2], "the highest priority first, then the longest in the queue"
        model = self.models[job.id]
        model.status, model.owner, model.attempt = S.RUNNING, owner, model.attempt + 1
        model.lease_until = self.now + timedelta(seconds=self.settings.lease_ttl_s)
        assert lease.attempt == model.attempt
        self.leases.append(lease)

    @precondition(lambda self: self.leases)
    @rule(number=which)
    def renew(self, number: int) -> None:
        lease, model = self.lease(number)
        wishes: list[Any] = []

        def write() -> None:
            wishes.append(leases.renew_all(self.store, self.settings, [lease])[lease])
            if isinstance(wishes[0], LeaseLost):
                raise wishes[0]

        if self.write(lease, write):
            model.lease_until = self.now + timedelta(seconds=self.settings.lease_ttl_s)
            drain = "drain" if lease.owner in self.draining else None
            assert wishes == [{S.PAUSING: "pause", S.CANCELLING: "cancel"}.get(model.status, drain)]

    @precondition(lambda self: self.leases)
    @rule(number=which, phase=st.sampled_from(Phase))
    def enter_phase(self, number: int, phase: Phase) -> None:
        lease, _ = self.lease(number)
        self.write(lease, lambda: leases.set_phase(self.store, lease, phase))

    @precondition(lambda self: self.leases)
    @rule(number=which)
    def commit_step(self, number: int) -> None:
        lease, model = self.lease(number)
        step = model.step + 1
        if self.write(lease, lambda: leases.commit_step(self.store, lease, step, {"loss": float(lease.attempt)})):
            model.step = step

    @precondition(lambda self: self.leases)
    @rule(number=which, back=st.integers(0, 2))
    def rewind(self, number: int, back: int) -> None:
        lease, model = self.lease(number)
        step = max(0, model.step - back)
        if self.write(lease, lambda: leases.rewind(self.store, lease, step)):
            model.step = step

    @precondition(lambda self: self.leases)
    @rule(number=which)
    def save(self, number: int) -> None:
        lease, model = self.lease(number)
        id_ = new_id("ckpt")
        row = CheckpointRow(id_, model.step, "full", {"source": "tiny"}, f"checkpoints/{id_}", 1, "0" * 64, {}, True, False)
        if self.write(lease, lambda: leases.commit_checkpoint(self.store, lease, row)):
            model.saved.append(id_)
            model.crashes = model.retries = 0

    @precondition(lambda self: self.leases)
    @rule(number=which, how=st.sampled_from(["succeed", "fail", "pause", "cancelled", "drained"]))
    def let_go(self, number: int, how: str) -> None:
        lease, model = self.lease(number)
        ways: dict[str, tuple[Callable[[], Any], Status]] = {
            "succeed": (lambda: leases.succeed(self.store, lease, {}, "max_steps"), S.SUCCEEDED),
            "fail": (lambda: leases.fail(self.store, lease, Failure("out_of_memory", "no memory")), S.FAILED),
            "pause": (lambda: leases.pause(self.store, lease), S.PAUSED),
            "cancelled": (lambda: leases.cancelled(self.store, lease), S.CANCELLED),
            "drained": (lambda: leases.release(self.store, lease, "drained"), S.QUEUED),
        }
        do, target = ways[how]
        if self.write(lease, do):
            model.leave(target, self.now)

    @precondition(lambda self: self.leases)
    @rule(number=which, delay_s=st.sampled_from([0.0, 30.0]))
    def fail_and_retry(self, number: int, delay_s: float) -> None:
        lease, model = self.lease(number)
        failure = Failure("io_error", "the disk is full")
        if self.write(lease, lambda: leases.release(self.store, lease, "retry", failure=failure, delay_s=delay_s)):
            model.retries += 1
            over = model.status is S.RUNNING and model.retries >= model.max_attempts
            later = model.status is S.RUNNING and delay_s > 0
            model.leave(S.FAILED if over else S.QUEUED, self.now)
            if later and not over:
                model.not_before = self.now + timedelta(seconds=delay_s)

    @rule(owner=owners)
    def crash(self, owner: str) -> None:
        """Its parent says that the child is dead: everything that it held is settled, and nothing else."""
        held = sorted(job_id for job_id, model in self.models.items() if model.status in HELD and model.owner == owner)
        assert leases.worker_lost(self.store, self.bell, owner) == held
        for job_id in held:
            self.models[job_id].lose(self.now)

    @rule(owner=owners)
    def drain(self, owner: str) -> None:
        leases.draining(self.store, owner)
        self.draining.add(owner)

    @rule(owner=owners)
    def come_back(self, owner: str) -> None:
        times = {"started_at": self.now, "last_seen_at": self.now}
        worker = Worker(id=owner, host="h", pid=1, device="cpu", resource_classes=["any"], draining=False, **times)
        leases.hello(self.store, worker)
        self.draining.discard(owner)

    # ------------------------------------------------------------ time

    @rule(seconds=st.sampled_from([-20, 1, 25, 61]))
    def jump(self, seconds: int) -> None:
        type(self).now += timedelta(seconds=seconds)

    @rule()
    def expire(self) -> None:
        """One look of the reconciler: whoever did not renew in time has lost the job."""
        lost = [job_id for job_id, m in self.models.items() if m.lease_until is not None and m.lease_until < self.now]
        report = reconciler.reconcile(self.store, self.settings, self.bell, self.now)
        assert sorted(report.queued + report.paused + report.cancelled + report.failed) == sorted(lost)
        for job_id in lost:
            self.models[job_id].lose(self.now)

    # ------------------------------------------------------------ what always holds

    @invariant()
    def everything_is_as_the_model_says(self) -> None:
        with self.store.begin(readonly=True) as session:
            rows = {job.id: job for job in session.scalars(select(Job).options(defer(Job.spec), defer(Job.spec_sent)))}
            saved = session.execute(select(Checkpoint.job_id, Checkpoint.id).where(Checkpoint.job_id.is_not(None)))
            assert sorted(map(tuple, saved)) == sorted((id_, one) for id_, model in self.models.items() for one in model.saved)
            beyond = select(Metric.job_id).join(Job, Job.id == Metric.job_id).where(Metric.step > Job.step)
            assert session.execute(beyond).all() == [], "no metric stands beyond the step that the job has reached"
            assert session.execute(text(f"SELECT what, job_id FROM {stale.TABLE}")).all() == [], "a stale attempt wrote"
            told: dict[str, list[Event]] = {job_id: [] for job_id in rows}
            for event in session.scalars(select(Event).order_by(Event.job_id, Event.seq)):
                told[event.job_id].append(event)
        assert rows.keys() == self.models.keys()
        for job_id, model in self.models.items():
            _agrees(rows[job_id], model)
            _walks(told[job_id], rows[job_id])
            holders = [lease for lease in self.leases if lease.job_id == job_id and self.holds(lease)]
            assert len(holders) == (model.status in HELD)


def _agrees(job: Job, model: Model) -> None:
    assert job.status == model.status
    counters = (job.attempt, job.crashes, job.retries, job.step)
    assert counters == (model.attempt, model.crashes, model.retries, model.step)
    assert job.checkpoint_id == (model.saved[-1] if model.saved else None)
    assert (job.finished_at is not None) == (model.status in FINAL)
    held = job.status in HELD
    assert (job.lease_owner is not None, job.lease_until is not None, job.claimed_at is not None) == (held,) * 3
    assert held or (job.phase is None and job.wish is None)
    assert job.run_s >= 0


def _walks(told: list[Event], job: Job) -> None:
    """A log without a gap, and a legal path through the states."""
    assert [event.seq for event in told] == list(range(1, job.last_event + 1))
    status, claims = S.QUEUED, 0
    for data in (event.data for event in told if event.type == "status_changed"):
        assert data["from"] == status and is_legal(S(data["from"]), S(data["to"]))
        claims += (data["from"], data["to"]) == ("queued", "running")
        assert data["attempt"] == claims
        status = S(data["to"])
    assert (status, claims) == (job.status, job.attempt)


@pytest.fixture(params=["sqlite", "postgresql"])
def histories(request: pytest.FixtureRequest, tmp_path: Path, job_maker: Any) -> Iterator[type[Histories]]:
    """The machine over an empty database with the triggers of chaos.stale, and with a clock that it may turn."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'ratchet.db'}"
    else:
        url = request.getfixturevalue("new_postgres_database")()
    upgrade(url)
    stale.watch(url)
    settings = Settings(environment="development", data_dir=tmp_path, database_url=SecretStr(url))
    store = open_store(settings)
    machine = type("Histories", (Histories,), {"store": store, "settings": settings, "new_job": staticmethod(job_maker)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "now", lambda _: machine.now)
        patch.setattr(clock, "at", lambda _, after: machine.now + after)
        yield machine
    store.close()


def run(machine: type[Histories], histories: int, **options: Any) -> None:
    checks = list(HealthCheck)
    options |= {"max_examples": histories, "stateful_step_count": STEPS, "deadline": None, "suppress_health_check": checks}
    run_state_machine_as_test(machine, settings=hypothesis_settings(**options))


@pytest.mark.timeout(0 if HISTORIES else 120)
def test_no_history_breaks_a_job(histories: type[Histories]) -> None:
    run(histories, HISTORIES or 6, derandomize=not HISTORIES)


def test_without_fencing_some_history_does(histories: type[Histories], monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def holding(store: Store, lease: Lease) -> Iterator[Any]:
        with store.begin() as session:
            yield session, jobs.find(session, lease.job_id, lock=True, light=True)

    monkeypatch.setattr(leases, "_holding", holding)
    # A zombie was not refused, or tried what is not legal any more.
    with pytest.raises((pytest.fail.Exception, AssertionError, Conflict), match=r"LeaseLost|cannot become"):
        run(histories, 50, derandomize=True, phases=[Phases.generate], database=None)
