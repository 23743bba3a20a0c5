"""The log of a session's operations, on both databases: appended once, answered once, forgotten when nobody needs it."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from itertools import count
from pathlib import Path
from shutil import copy
from threading import Barrier
from time import monotonic
from typing import Any

import pytest
from sqlalchemy import event, func, select, text

from service.doorbell import Doorbell
from service.errors import Busy, Conflict, InvalidRequest, LeaseLost
from service.ids import new_id, utcnow
from service.jobs import lease as leases
from service.jobs import lifecycle
from service.jobs.discard import discard
from service.jobs.lease import CheckpointRow, Lease
from service.jobs.reconciler import expire, reconcile
from service.sessions.sessions import resolve_session, sampler_of
from service.settings import Settings
from service.spec.session import SessionSpec
from service.store import checkpoints, clock, jobs, operations, usage
from service.store.operations import Answered, Asked
from service.store.session import Store, make_engine
from service.store.tables import Job, Operation, Usage
from service.store.usage import Spent

TINY = {"source": "tiny", "adapter": None, "from_checkpoint": None}
LORA = {"source": "tiny", "adapter": {"kind": "lora", "rank": 4}}


class Session:
    """A session in the store, and what its owner and its worker do with it."""

    def __init__(self, store: Store, doorbell: Doorbell, settings: Settings) -> None:
        self.store, self.doorbell, self.settings = store, doorbell, settings
        spec = SessionSpec.model_validate({"model": LORA})
        resolved = resolve_session(store, settings, "default", spec)
        self.id = lifecycle.create_job(store, doorbell, project="default", sent={}, resolved=resolved).id

    def append(self, *asked: Asked) -> list[str]:
        rows = lifecycle.append_operations(self.store, self.doorbell, self.settings, "default", self.id, asked)
        return [row.id for row in rows]

    def claim(self, owner: str = "w1") -> Lease:
        claimed = leases.claim(self.store, self.settings, owner, {"any"})
        assert claimed is not None
        assert claimed[1].id == self.id
        return claimed[0]

    def answer(self, lease: Lease, *answered: Answered) -> None:
        leases.answer_operations(self.store, self.settings, lease, answered)

    def row(self, seq: int) -> Operation:
        with self.store.begin(readonly=True) as session:
            (row,) = operations.since(session, self.id, seq, limit=1)
            return row

    def job(self) -> Job:
        with self.store.begin(readonly=True) as session:
            job = jobs.find(session, self.id)
            assert job is not None
            return job


@pytest.fixture
def session(store: Store, doorbell: Doorbell, settings: Settings) -> Session:
    return Session(store, doorbell, settings)


def step(seq: int, request: bytes = b"step", lane: str = "") -> Asked:
    return Asked("optim_step", seq, request, lane=lane)


def snapshot(step_: int, name: str | None = None, purpose: checkpoints.Purpose = "training") -> CheckpointRow:
    id_ = new_id("ckpt")
    path = f"checkpoints/{id_}"
    return CheckpointRow(id_, step_, "lora", LORA, path, 1, "0" * 64, {}, True, False, name=name, purpose=purpose)


def test_a_race_of_repeats_logs_one(session: Session) -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = [id_ for (id_,) in pool.map(lambda _: session.append(step(1)), range(16))]
    assert len(set(ids)) == 1
    with pytest.raises(InvalidRequest, match="seq 1"):
        session.append(step(1, b"another"))


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_what_was_appended_outlives_a_power_cut(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk has of the files what they held when they were last synced; SQLite's own way to wait is not used here."""
    file, disk = Path(session.store.engine.url.database or ""), tmp_path / "disk"
    disk.mkdir()

    def fsync(_: int) -> None:
        for name in (file.name, f"{file.name}-wal"):
            copy(file.with_name(name), disk / name)

    fsync(0)
    monkeypatch.setattr(os, "fsync", fsync)
    ids = session.append(step(1), step(2))
    after = make_engine(f"sqlite:///{disk / file.name}")
    with after.connect() as connection:
        assert list(connection.scalars(select(Operation.id).order_by(Operation.seq))) == ids
    after.dispose()


def test_ready_is_the_next_in_line_and_a_gap_waits(session: Session, store: Store) -> None:
    session.append(step(2))
    with store.look() as sql:
        assert operations.ready(sql, {session.id: 0}) == []
    session.append(step(1), step(4))
    with store.look() as sql:
        assert [row.seq for row in operations.ready(sql, {session.id: 0})] == [1, 2]
        assert [row.seq for row in operations.ready(sql, {session.id: 1})] == [2]
        assert operations.ready(sql, {session.id: 2}) == []


def test_of_what_follows_only_small_requests_are_read_ahead(session: Session, store: Store) -> None:
    large = b"x" * (operations.SMALL_BYTES + 1)
    session.append(step(1, large), step(2), step(3, large), *map(step, range(4, 20)))
    with store.look() as sql:
        assert [row.seq for row in operations.ready(sql, {session.id: 0})] == [1, 2]
        assert operations.ready(sql, {session.id: 2})[0].request == large
        assert len(operations.ready(sql, {session.id: 3})) == operations.AHEAD


def test_loose_lanes_have_no_order(session: Session, store: Store) -> None:
    first, second = session.append(step(7, lane="a"), step(3, lane="b"))
    session.append(step(1))
    with store.look() as sql:
        assert {row.id for row in operations.loose(sql, [session.id])} == {first, second}
        assert [row.id for row in operations.loose(sql, [session.id], known=[first])] == [second]


def test_only_the_lease_s_holder_answers_and_only_once(session: Session, store: Store) -> None:
    (id_,) = session.append(step(1))
    lease = session.claim()
    session.answer(lease, Answered(id_, b"first"))
    session.answer(lease, Answered(id_, b"second"))
    with store.begin(readonly=True) as sql:
        row = operations.get(sql, "default", id_)
        assert (row.status, row.answer, row.attempt) == ("done", b"first", 1)
    leases.worker_lost(store, session.doorbell, "w1")
    (other,) = session.append(step(2))
    with pytest.raises(LeaseLost):
        session.answer(lease, Answered(other, b"a zombie's"))
    assert session.row(2).status == "waiting"


def test_what_was_computed_for_a_withdrawn_operation_is_metered(session: Session, store: Store) -> None:
    kept, gone = session.append(step(1, lane="a"), step(1, lane="b"))
    lease, spent = session.claim(), Spent(sampled_tokens=5)
    lifecycle.withdraw_operation(store, gone)
    for answered in (gone, kept, kept):  # the last is a repeat
        leases.answer_operations(store, session.settings, lease, [Answered(answered, b"")], spent=spent)
    with store.begin(readonly=True) as sql:
        assert sql.scalar(select(func.sum(Usage.sampled_tokens)).where(Usage.job_id == session.id)) == 10


def test_snapshot_forgets_what_no_replay_needs(session: Session) -> None:
    session.append(*(step(seq) for seq in range(1, 5)))
    lease = session.claim()
    leases.commit_snapshot(session.store, session.settings, lease, snapshot(2), replay_from=3)
    assert [session.row(seq).request for seq in range(1, 5)] == [None, None, b"step", b"step"]
    session.append(step(1))  # a repeat is recognised without its request


def test_a_snapshot_forgets_from_where_the_last_one_ended(session: Session) -> None:
    session.append(*(step(seq) for seq in range(1, 7)))
    lease = session.claim()
    for replay_from in (2, 5, 3):
        leases.commit_snapshot(session.store, session.settings, lease, snapshot(2), replay_from=replay_from)
    assert [session.row(seq).request is None for seq in range(1, 7)] == [True] * 4 + [False] * 2


def test_what_is_read_does_not_grow_with_the_session(session: Session, store: Store) -> None:
    """Counted in SQLite's own steps: to look at each of the 600 operations takes thousands."""
    if store.engine.dialect.name != "sqlite":
        pytest.skip("counts SQLite's steps")
    lease = session.claim()
    for first in range(1, 601, 200):
        ids = session.append(*map(step, range(first, first + 200)))
        session.answer(lease, *(Answered(id_, b"") for id_ in ids))
    leases.commit_snapshot(store, session.settings, lease, snapshot(1), replay_from=598)
    session.append(step(601), step(1, lane="a"))
    questions = {
        "ready": lambda sql: operations.ready(sql.connection(), {session.id: 600}),
        "loose": lambda sql: operations.loose(sql.connection(), [session.id]),
        "load": lambda sql: operations.load(sql, session.id),
        "has_waiting": lambda sql: operations.has_waiting(sql, session.id, 600),
        "forget_requests": lambda sql: operations.forget_requests(sql, session.id, 601),
    }
    taken = dict[str, int]()
    with store.begin() as sql:
        raw: Any = sql.connection().connection.driver_connection
        for name, ask in questions.items():
            steps = count()
            raw.set_progress_handler(lambda steps=steps: int(next(steps) < 0), 1)
            assert ask(sql) or name == "forget_requests"
            raw.set_progress_handler(None, 1)
            taken[name] = next(steps)
    assert all(0 < steps < 1000 for steps in taken.values()), taken


def test_named_checkpoints_stay_and_snapshots_go(session: Session, store: Store) -> None:
    lease = session.claim()
    rows = [snapshot(1), snapshot(2, name="mine"), snapshot(3), snapshot(4)]
    removed = [leases.commit_snapshot(store, session.settings, lease, row, replay_from=1, keep_last=1) for row in rows]
    assert removed == [[], [], [rows[0].path], [rows[2].path]]
    assert session.job().checkpoint_id == rows[3].id
    better = snapshot(5, name="mine")
    gone = leases.commit_snapshot(store, session.settings, lease, better, overwrite=True, replay_from=1)
    assert gone == [rows[1].path]
    with store.begin(readonly=True) as sql:
        found = checkpoints.named(sql, session.id, "training", "mine")
        assert found is not None
        assert found.id == better.id
        assert checkpoints.named(sql, session.id, "sampler", "mine") is None


def test_a_name_that_goes_while_a_job_needs_it_is_no_snapshot(
    session: Session, store: Store, settings: Settings, doorbell: Doorbell, job_maker: Any
) -> None:
    """Its owner deletes it, or saves over it: the session keeps its own two snapshots all the same."""
    lease = session.claim()
    deleted, overwritten = snapshot(2, name="deleted"), snapshot(3, name="again")
    for row in (snapshot(1), deleted, overwritten):
        leases.commit_snapshot(store, settings, lease, row, replay_from=1, keep_last=2)
    needing = [job_maker(store, doorbell, from_checkpoint_id=row.id).id for row in (deleted, overwritten)]
    assert discard(store, doorbell, [deleted.id], utcnow()) == ([], {deleted.id: "in_use"})
    leases.commit_snapshot(store, settings, lease, snapshot(4, name="again"), replay_from=1, overwrite=True)
    with store.begin(readonly=True) as sql:
        assert checkpoints.named(sql, session.id, "training", "deleted") is None
        assert [row.step for row in checkpoints.of_job(sql, session.id)] == [4, 3, 2, 1]
    assert leases.commit_snapshot(store, settings, lease, snapshot(5), replay_from=1, keep_last=2) == []
    for job_id in needing:
        lifecycle.cancel(store, doorbell, "default", job_id)
    assert sorted(expire(store, doorbell, utcnow())) == sorted([deleted.id, overwritten.id])
    with store.begin(readonly=True) as sql:
        assert [row.step for row in checkpoints.of_job(sql, session.id)] == [5, 4, 1]


def test_an_expired_name_is_free_at_once(session: Session, store: Store, settings: Settings, doorbell: Doorbell) -> None:
    lease = session.claim()
    row = replace(snapshot(1, name="mine"), ttl_s=60.0)
    leases.commit_snapshot(store, settings, lease, row, replay_from=1)  # the session goes on from it
    for _ in range(2):
        assert expire(store, doorbell, utcnow() + timedelta(seconds=61)) == []
        with store.begin(readonly=True) as sql:
            assert checkpoints.named(sql, session.id, "training", "mine") is None
            assert session.job().checkpoint_id == row.id


def test_version_to_sample_from_is_no_place_to_go_on_from(session: Session, store: Store) -> None:
    lease = session.claim()
    leases.commit_snapshot(store, session.settings, lease, snapshot(1, "v1", "sampler"), replay_from=None)
    assert session.job().checkpoint_id is None
    with store.begin(readonly=True) as sql:
        assert checkpoints.of_job(sql, session.id) == []


def test_rest_and_an_operation_at_the_same_moment(session: Session, store: Store, settings: Settings) -> None:
    """Whichever comes first, no operation is left waiting in a session that rests."""
    for round_ in range(1, 9):
        lease = session.claim()
        with ThreadPoolExecutor(2) as pool:
            resting = pool.submit(leases.rest, store, lease, round_ - 1)
            pool.submit(session.append, step(round_)).result()
            resting.result()
        assert session.job().status == "queued"
        session.answer(session.claim(), Answered(session.row(round_).id, b"done"))
        leases.worker_lost(store, session.doorbell, "w1")
        with store.begin() as sql:  # as a checkpoint would: attempts without one are counted
            job = jobs.find(sql, session.id, lock=True)
            assert job is not None
            job.crashes = 0


@pytest.mark.parametrize("ends", ["rest", "pause", "drained", "worker_lost"])
def test_a_session_that_leaves_its_worker_has_wasted_nothing(session: Session, store: Store, ends: str) -> None:
    """It saved itself before that, if anything was left to save. Its steps are counted as a job's."""
    session.append(step(1), step(2))
    lease = session.claim()
    for seq in (1, 2):
        done, spent = Answered(session.row(seq).id, b"done", step=seq), Spent(0, 5, {"updating": 1.0})
        leases.answer_operations(store, session.settings, lease, [done], spent=spent)
    leases.commit_snapshot(store, session.settings, lease, snapshot(2), replay_from=3)
    waited = Spent(phase_s={"updating": 60.0})  # for operations, after its last snapshot
    match ends:
        case "rest":
            leases.rest(store, lease, 2, spent=waited)
        case "pause":
            leases.pause(store, lease, spent=waited)
        case "drained":
            leases.release(store, lease, "drained", spent=waited)
        case _:
            leases.worker_lost(store, session.doorbell, "w1")
    with store.begin(readonly=True) as sql:
        [attempt], found = usage.attempts(sql, session.id), usage.of_job(sql, session.id)
    assert (attempt.steps, found.trained_tokens, found.wasted_trained_tokens) == (2, 10, 0)
    if ends != "worker_lost":
        assert found.worker_s >= 62.0 and found.wasted_s == pytest.approx(0.0, abs=0.5)


def test_what_a_sampler_answered_is_not_wasted(store: Store, doorbell: Doorbell, settings: Settings) -> None:
    """It has no checkpoints; its answers are kept, also if its worker dies afterwards."""
    job = sampler_of(store, doorbell, settings, "default", TINY).id
    asked = Asked("sample", 1, b"prompt", lane="a")
    (row,) = lifecycle.append_operations(store, doorbell, settings, "default", job, [asked])
    claimed = leases.claim(store, settings, "w1", {"any"})
    assert claimed is not None
    answered = [Answered(row.id, b"text")]
    leases.answer_operations(store, settings, claimed[0], answered, spent=Spent(100, 0, {"sampling": 1.0}))
    leases.worker_lost(store, doorbell, "w1")
    with store.begin(readonly=True) as sql:
        found = usage.of_job(sql, job)
    assert (found.sampled_tokens, found.wasted_sampled_tokens) == (100, 0)


def test_a_sampler_that_is_cancelled_while_it_waits_has_wasted_nothing(
    store: Store, doorbell: Doorbell, settings: Settings
) -> None:
    job = sampler_of(store, doorbell, settings, "default", TINY).id
    claimed = leases.claim(store, settings, "w1", {"any"})
    assert claimed is not None
    leases.cancelled(store, claimed[0], spent=Spent(phase_s={"sampling": 200.0}))
    with store.begin(readonly=True) as sql:
        found = usage.of_job(sql, job)
    assert found.worker_s >= 200.0 and found.wasted_s == pytest.approx(0.0, abs=0.5)


def test_what_a_session_waited_before_it_was_cancelled_is_wasted(session: Session, store: Store) -> None:
    """Since its last snapshot, as all else that came after it."""
    lease = session.claim()
    leases.cancelled(store, lease, spent=Spent(phase_s={"updating": 200.0}))
    with store.begin(readonly=True) as sql:
        assert usage.of_job(sql, session.id).wasted_s >= 200.0


def test_reconciler_wakes_a_session_that_rests_with_work(session: Session, store: Store, settings: Settings) -> None:
    leases.rest(store, session.claim(), 0)
    with store.begin() as sql:  # as if the process had died between two lines
        operations.append(sql, session.id, step(1), store.now())
    report = reconcile(store, settings, session.doorbell, store.now())
    assert report.queued == [session.id]
    assert session.job().status == "queued"


def test_too_much_is_refused_and_nothing_of_it_is_logged(session: Session, settings: Settings) -> None:
    session.settings = settings.model_copy(update={"max_waiting_operations": 2})
    session.append(step(1), step(2))
    with pytest.raises(Busy, match="2 waiting operations"):
        session.append(step(3))
    session.append(step(1))  # a repeat needs no room
    assert session.job().status == "queued"


def test_answers_expire_and_seqs_stay_used(session: Session, store: Store, settings: Settings) -> None:
    ordered, loose = session.append(step(1), step(1, lane="a"))
    lease = session.claim()
    session.answer(lease, Answered(ordered, b"x"), Answered(loose, b"y"))
    reconcile(store, settings, session.doorbell, store.now() + timedelta(seconds=settings.operation_answer_ttl_s - 5))
    with store.begin(readonly=True) as sql:
        assert operations.get(sql, "default", ordered).answer == b"x"
    later = store.now() + timedelta(seconds=settings.operation_answer_ttl_s + 5)
    with store.begin() as sql:
        assert operations.expire(sql, later) == 2
        assert operations.get(sql, "default", ordered).answer is None
        assert operations.finished(sql.connection(), [ordered, loose]) == {ordered, loose}
    with pytest.raises(InvalidRequest):
        session.append(step(1, b"another"))


def test_the_end_fails_what_waits(session: Session, store: Store) -> None:
    session.append(step(1))
    lifecycle.cancel(store, session.doorbell, "default", session.id)
    row = session.row(1)
    assert (row.status, row.error and row.error["code"]) == ("failed", "session_over")
    with pytest.raises(Conflict, match="has ended"):
        session.append(step(2))


def test_process_takes_further_sessions_of_its_base(store: Store, doorbell: Doorbell, settings: Settings) -> None:
    first, second = Session(store, doorbell, settings), Session(store, doorbell, settings)
    first.claim()
    key = first.job().base_key
    assert key is not None
    assert leases.queued(store, {"any"}, key) == (True, False)
    assert leases.queued(store, {"any"}, None) == leases.queued(store, {"any"}, "another") == (False, True)
    assert leases.queued(store, {"gpu"}, key) == (False, False)
    taken = leases.claim_beside(store, settings, "w1", {"any"}, key, 8)
    assert [job.id for _, job in taken] == [second.id]
    assert leases.claim_beside(store, settings, "w1", {"any"}, key, 8) == []
    assert leases.queued(store, {"any"}, key) == (False, False)


def test_one_sampler_a_base_and_project(store: Store, doorbell: Doorbell, settings: Settings) -> None:
    ids = [sampler_of(store, doorbell, settings, project, LORA).id for project in ("a", "a", "b")]
    assert ids[0] == ids[1] != ids[2]
    with store.begin(readonly=True) as sql:
        job = jobs.find(sql, ids[0])
        assert job is not None
        assert job.kind == "sampler"
        assert job.base_key == Session(store, doorbell, settings).job().base_key


def test_data_dir_is_untouched_by_the_log(settings: Settings, session: Session) -> None:
    session.append(step(1))
    assert not Path(settings.blobs_dir).exists() or not any(Path(settings.blobs_dir).iterdir())


def test_crashes_are_forgotten_once_nothing_is_left_that_may_have_caused_them(
    store: Store, settings: Settings, doorbell: Doorbell
) -> None:
    """Only what an earlier attempt was at counts, and the first note of it stays."""
    job = sampler_of(store, doorbell, settings, "default", TINY).id
    with store.begin() as session:
        now = clock.now(session)
        first, second = (operations.append(session, job, Asked("sample", 1, b"x", lane=lane), now)[0] for lane in "ab")
        operations.at_work(session, first.id, attempt=1)
        operations.at_work(session, first.id, attempt=2)
        operations.at_work(session, second.id, attempt=2)
        assert operations.has_suspects(session, job, 2)
        answered = Answered(first.id, b"y")
        assert operations.answer(session, job, answered, attempt=2, now=now, expires_at=now)
        assert not operations.has_suspects(session, job, 2)
        assert operations.has_suspects(session, job, 3)


def test_a_project_has_one_sampler_of_a_base(store: Store, settings: Settings, doorbell: Doorbell) -> None:
    """However many ask at once; one that has ended makes place for the next."""
    start = Barrier(4)

    def make(_: int) -> str:
        start.wait()
        return sampler_of(store, doorbell, settings, "default", TINY).id

    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(make, range(4)))
    assert len(made) == 1
    assert sampler_of(store, doorbell, settings, "other", TINY).id not in made
    lifecycle.cancel(store, doorbell, "default", made.pop())
    assert sampler_of(store, doorbell, settings, "default", TINY).status == "queued"


def test_who_comes_first_has_the_seq(session: Session) -> None:
    """Four at once for each seq, two of which send the same: these two win or lose together."""
    bodies = (b"same", b"same", b"other", b"third")
    start = Barrier(len(bodies))

    def race(body: bytes) -> list[str]:
        ids = list[str]()
        for seq in range(1, 6):
            start.wait()
            try:
                ids += session.append(step(seq, body))
            except InvalidRequest as lost:
                ids.append(lost.code)
        return ids

    with ThreadPoolExecutor(len(bodies)) as pool:
        each = list(pool.map(race, bodies))
    assert each[0] == each[1]
    for seq, ids in enumerate(zip(*each[1:], strict=True), 1):
        (winner,) = [id_ for id_ in ids if id_ != "seq_reused"]
        assert session.row(seq).id == winner
        assert session.row(seq).request == bodies[ids.index(winner) + 1]


def test_newest_first_in_pages_with_all_lanes(session: Session, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = count(99, -1)  # ids of one millisecond come in any order
    monkeypatch.setattr(operations, "new_id", lambda prefix: f"{prefix}_{next(numbers)}")
    ids = session.append(*map(step, range(1, 5)))  # together
    ids += [session.append(step(1, lane=lane))[0] for lane in "ba"]
    ids += session.append(step(5))
    with store.begin(readonly=True) as sql:
        found, before = list[str](), None
        while True:
            rows, has_more = operations.newest(sql, session.id, before=before, limit=3)
            found, before = [*found, *(row.id for row in rows)], rows[-1].id
            if not has_more:
                break
        assert found == ids[::-1]
        with pytest.raises(InvalidRequest, match="op_unknown") as caught:
            operations.newest(sql, session.id, before="op_unknown")
        assert caught.value.errors[0].pointer == "/before"


def test_newest_first_uses_its_index(session: Session, store: Store) -> None:
    session.append(*map(step, range(1, 4)))
    with store.begin(readonly=True) as sql:
        statements = list[tuple[str, Any]]()
        event.listen(sql.connection(), "before_cursor_execute", lambda *said: statements.append((said[2], said[3])))
        (last,) = operations.newest(sql, session.id, limit=1)[0]
        operations.newest(sql, session.id, before=last.id, limit=1)
        if sql.connection().dialect.name == "postgresql":
            sql.execute(text("SET LOCAL enable_seqscan = off"))  # three rows are read faster without an index
        explain = "EXPLAIN QUERY PLAN " if sql.connection().dialect.name == "sqlite" else "EXPLAIN "
        for statement, parameters in [statements[0], statements[2]]:
            plan = sql.connection().exec_driver_sql(explain + statement, parameters).all()
            assert "ix_operations_newest" in str(plan)


def test_when_the_work_on_it_began_is_told_by_the_store_s_clock(session: Session) -> None:
    timed, untimed = session.append(step(1), step(2))
    session.answer(session.claim(), Answered(timed, b"", began=monotonic() - 5), Answered(untimed, b""))
    row = session.row(1)
    assert row.started_at is not None and row.finished_at is not None
    assert 5 <= (row.finished_at - row.started_at).total_seconds() < 60
    assert session.row(2).started_at is None
