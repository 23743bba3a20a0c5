"""Queries over the operations of sessions and samplers: their write-ahead log. Only a lease's holder answers one."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from hashlib import sha256
from time import monotonic
from typing import Any, Literal

from sqlalchemy import Connection, LargeBinary, bindparam, delete, func, or_, select, update
from sqlalchemy.orm import Session, defer

from service.errors import InvalidRequest, NotFound
from service.ids import new_id
from service.store.dialect import connection_of, for_both, name_of, table_of
from service.store.paging import descending
from service.store.tables import Job, Operation

ORDERED = ""  # the lane in which operations run in the order of seq
EXPIRED_AT_ONCE = 1000
KINDS = ("session", "sampler")  # of jobs that have operations

State = Literal["waiting", "done", "failed"]


@dataclass(frozen=True)
class Asked:
    """An operation as it is asked for. `request`: safetensors with the metadata `head`, see `service.sessions.codec`."""

    kind: str
    seq: int
    request: bytes
    cost: int = 1
    lane: str = ORDERED
    lookup: Callable[[Session, str], bytes] | None = None  # given the project, the request with the id of what it names


@dataclass(frozen=True)
class Answered:
    """What came of an operation: an answer (safetensors with the metadata `head`), or an error {code, detail, category}."""

    id: str
    answer: bytes | None = None
    error: dict[str, Any] | None = None
    step: int | None = None  # the optimizer steps that its session has done by then
    metrics: Mapping[str, float | None] | None = None  # of that step
    began: float | None = None  # when the work on it began: `time.monotonic()` of this process


def append(
    session: Session | Connection, job_id: str, asked: Asked, now: datetime, traceparent: str | None = None
) -> tuple[Operation, bool]:
    """Log the operation. Returns its row without the request, and whether it is new: a repeat gets the first one's row.

    Raises InvalidRequest `seq_reused` if its seq was used with another body.
    """
    digest = sha256(asked.kind.encode() + b"\0" + asked.request).hexdigest()
    row: dict[str, Any] = {
        "id": new_id("op"),
        "job_id": job_id,
        "lane": asked.lane,
        "seq": asked.seq,
        "kind": asked.kind,
        "body_sha256": digest,
        "request": asked.request,
        "size_bytes": len(asked.request),
        "cost": asked.cost,
        "status": "waiting",
        "created_at": now,
        **({} if traceparent is None else {"traceparent": traceparent}),
    }
    connection = connection_of(session)
    if connection.scalar(_APPEND[name_of(session)], row) is not None:
        return Operation(**{name: value for name, value in row.items() if name != "request"}), True
    with Session(connection, expire_on_commit=False) as again:
        there = at(again, job_id, asked.lane, asked.seq)
    assert there is not None
    if there.body_sha256 != digest:
        raise InvalidRequest(
            f"seq {asked.seq} was used for another operation ({there.kind}, {there.id}); each has a seq of its own",
            code="seq_reused",
            hint="if another program sends operations, too: its list of operations says what was done, and the next seq",
        )
    return there, False


_T = table_of(Operation)
_APPEND = for_both(
    lambda insert: insert(_T).on_conflict_do_nothing(index_elements=["job_id", "lane", "seq"]).returning(_T.c.id)
)


def rewrite(session: Session, row: Operation, request: bytes) -> None:
    """Log this as the operation's request. A repeat is still known by what was sent."""
    row.size_bytes = len(request)
    session.execute(update(_T).where(_T.c.id == row.id).values(request=request, size_bytes=row.size_bytes))


def at(session: Session, job_id: str, lane: str, seq: int) -> Operation | None:
    """The operation at this place, without request and answer."""
    return session.scalar(_AT, {"in_job": job_id, "in_lane": lane, "at_seq": seq})


WITHOUT_BYTES = (defer(Operation.request), defer(Operation.answer))
_IN_LANE = (Operation.job_id == bindparam("in_job"), Operation.lane == bindparam("in_lane"))
_AT = (
    select(Operation)
    .where(*_IN_LANE, Operation.seq == bindparam("at_seq"))
    .options(*WITHOUT_BYTES)
    .execution_options(populate_existing=True)
)
_ONE = (
    select(Operation)
    .join(Job, Job.id == Operation.job_id)
    .where(Operation.id == bindparam("one"), Job.project == bindparam("of_project"))
    .options(defer(Operation.request))
    .execution_options(populate_existing=True)
)


def get(session: Session, project: str, operation_id: str) -> Operation:
    """An operation of this project, with its answer. Raises NotFound."""
    row = session.scalar(_ONE, {"one": operation_id, "of_project": project})
    if row is None:
        raise NotFound(f"no operation {operation_id} in this project")
    return row


def page(
    session: Session, job_id: str, *, lane: str = ORDERED, after: int = 0, limit: int = 20
) -> tuple[list[Operation], bool]:
    """Operations of one lane with a seq above `after`, in their order. Returns the rows, and whether there are more."""
    query = select(Operation).where(Operation.job_id == job_id, Operation.lane == lane, Operation.seq > after)
    rows = list(session.scalars(query.options(*WITHOUT_BYTES).order_by(Operation.seq).limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def newest(session: Session, job_id: str, *, before: str | None = None, limit: int = 20) -> tuple[list[Operation], bool]:
    """Operations of all lanes that came before the one with this id (None: the newest), newest first; of those that came
    together, the higher seq first. Returns the rows, and whether there are more. Raises InvalidRequest for an unknown id."""
    of_job = Operation.job_id == job_id
    query = select(Operation).where(of_job).options(*WITHOUT_BYTES)
    return descending(session, query, of_job, _PLACE, {"before": before}, limit=limit)


_PLACE = (Operation.created_at, Operation.seq, Operation.id)


def beginnings(session: Session, ids: Collection[str], size_bytes: int) -> dict[str, bytes]:
    """The first bytes of these operations' answers, by id, as far as there are any."""
    beginning = func.substr(Operation.answer, 1, size_bytes, type_=LargeBinary)
    query = select(Operation.id, beginning).where(Operation.id.in_(ids), Operation.answer.is_not(None))
    return {id_: bytes(raw) for id_, raw in session.execute(query)}


def finished(connection: Connection, ids: Collection[str]) -> set[str]:
    """Which of these no longer wait: answered, failed, or gone."""
    return set(ids) - set(connection.scalars(_STILL, {"ids": list(ids)}))


@dataclass(frozen=True)
class Outcome:
    """An operation, and what came of it."""

    id: str
    job_id: str
    lane: str
    seq: int
    kind: str
    status: State
    answer: bytes | None
    error: dict[str, Any] | None
    attempt: int | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    expires_at: datetime | None


def outcome(connection: Connection, project: str, operation_id: str) -> Outcome | None:
    """An operation of this project, whatever it stands at; None if there is none. Without the ORM: every poll asks for it."""
    row = connection.execute(_OUTCOME, {"one": operation_id, "of_project": project}).first()
    return None if row is None else Outcome(*row)


def outcomes(connection: Connection, ids: Collection[str]) -> tuple[dict[str, Outcome], set[str]]:
    """What came of these operations, by id, as far as they no longer wait; and which of them are gone."""
    rows = [Outcome(*row) for row in connection.execute(_OUTCOMES, {"ids": list(ids)})]
    return {row.id: row for row in rows if row.status != "waiting"}, set(ids) - {row.id for row in rows}


_OUTCOME = (
    select(*(_T.c[field.name] for field in fields(Outcome)))
    .join(table_of(Job), table_of(Job).c.id == _T.c.job_id)
    .where(_T.c.id == bindparam("one"), table_of(Job).c.project == bindparam("of_project"))
)
_OUTCOMES = select(*(_T.c[field.name] for field in fields(Outcome))).where(_T.c.id.in_(bindparam("ids", expanding=True)))
_STILL = select(_T.c.id).where(_T.c.id.in_(bindparam("ids", expanding=True)), _T.c.status == "waiting")


@dataclass(frozen=True)
class Load:
    """What waits in a session."""

    count: int
    size_bytes: int


def load(session: Session | Connection, job_id: str) -> Load:
    count, size = connection_of(session).execute(_LOAD, {"in_job": job_id}).one()
    return Load(count, int(size))


_WAITS = (_T.c.job_id == bindparam("in_job"), _T.c.status == "waiting")
_LOAD = select(func.count(), func.coalesce(func.sum(_T.c.size_bytes), 0)).where(*_WAITS)


def next_seq(session: Session, job_id: str, lane: str = ORDERED) -> int:
    """The seq after the highest one that was used."""
    query = select(func.coalesce(func.max(Operation.seq), 0)).where(Operation.job_id == job_id, Operation.lane == lane)
    return (session.scalar(query) or 0) + 1


def count(session: Session, job_id: str, lane: str = ORDERED) -> int:
    """How many operations of this lane there are: fewer than the highest seq where some never came."""
    query = select(func.count()).where(Operation.job_id == job_id, Operation.lane == lane)
    return session.scalar(query) or 0


def withdraw(session: Session, operation_id: str) -> None:
    """Forget an operation of an unordered lane that still waits. A worker that is at it notices soon."""
    waiting = (Operation.id == operation_id, Operation.lane != ORDERED, Operation.status == "waiting")
    session.execute(delete(Operation).where(*waiting), execution_options={"synchronize_session": False})


# ---------------------------------------------------------------- for the worker


@dataclass(frozen=True)
class Logged:
    """An operation that waits, as the worker needs it."""

    id: str
    job_id: str
    lane: str
    seq: int
    kind: str
    request: bytes
    cost: int
    attempt: int | None  # the attempt that was at it before, see `at_work`
    traceparent: str | None = None


def ready(connection: Connection, done: Mapping[str, int]) -> list[Logged]:
    """The waiting operations after seq `done[job_id]` of each session, in their order, up to a gap.

    Of each session the first one, and of those behind it at most AHEAD small ones.
    """
    found: list[Logged] = []
    for job_id, seq in done.items():
        rows = connection.execute(_READY, {"in_job": job_id, "after": seq, "most": seq + AHEAD}).all()
        found += [Logged(*row) for place, row in enumerate(rows, seq + 1) if row.seq == place]
    return found


AHEAD, SMALL_BYTES = 8, 2**16
_LOGGED = tuple(_T.c[field.name] for field in fields(Logged))
_SOON = (_T.c.seq > bindparam("after"), _T.c.seq <= bindparam("most"))
_READY = (
    select(*_LOGGED)
    .where(*_WAITS, _T.c.lane == ORDERED, *_SOON, or_(_T.c.size_bytes <= SMALL_BYTES, _T.c.seq == bindparam("after") + 1))
    .order_by(_T.c.seq)
)


def loose(connection: Connection, job_ids: Collection[str], *, known: Collection[str] = (), limit: int = 256) -> list[Logged]:
    """Waiting operations of the unordered lanes of these jobs, without those that are `known`; the oldest first."""
    rows = connection.execute(_LOOSE, {"jobs": list(job_ids), "known": list(known), "most": limit})
    return [Logged(*row) for row in rows]


# `lane > ""` is any other lane. With `!=` SQLite walks all operations of the session in the order of `created_at`.
_LOOSE = (
    select(*_LOGGED)
    .where(_T.c.job_id.in_(bindparam("jobs", expanding=True)), _T.c.lane > ORDERED, _T.c.status == "waiting")
    .where(_T.c.id.not_in(bindparam("known", expanding=True)))
    .order_by(_T.c.created_at, _T.c.id)
    .limit(bindparam("most"))
)


def since(session: Session, job_id: str, seq: int, *, limit: int = 64) -> list[Operation]:
    """At most `limit` ordered operations from `seq` on, with their requests, in their order: what a replay reads."""
    query = select(Operation).where(Operation.job_id == job_id, Operation.lane == ORDERED, Operation.seq >= seq)
    query = query.options(defer(Operation.answer)).order_by(Operation.seq).limit(limit)
    return list(session.scalars(query.execution_options(populate_existing=True)))


def answered_after(session: Session, job_id: str, seq: int) -> bool:
    """Whether an ordered operation behind this one was answered or failed."""
    behind = select(Operation.id).where(Operation.job_id == job_id, Operation.lane == ORDERED, Operation.seq > seq)
    return session.scalar(behind.where(Operation.status != "waiting").limit(1)) is not None


def has_waiting(session: Session, job_id: str, done: int) -> bool:
    """Whether there is an operation that could run now, where `done` is the last ordered one that has run."""
    waiting = select(Operation.id).where(Operation.job_id == job_id, Operation.status == "waiting")
    return session.scalar(waiting.where((Operation.lane != ORDERED) | (Operation.seq == done + 1)).limit(1)) is not None


def answer(
    session: Session | Connection, job_id: str, answered: Answered, *, attempt: int, now: datetime, expires_at: datetime
) -> bool:
    """Store what came of it. False if it was answered before, by this attempt or an earlier one: the first answer stays."""
    values: dict[str, Any] = {
        "one": answered.id,
        "in_job": job_id,
        "status": "done" if answered.error is None else "failed",
        "answer": answered.answer,
        "error": answered.error,
        "attempt": attempt,
        "started_at": None if answered.began is None else now - timedelta(seconds=monotonic() - answered.began),
        "finished_at": now,
        "expires_at": expires_at,
    }
    lane = connection_of(session).scalar(_ANSWER, values)
    if lane is None:
        return False
    if lane != ORDERED:  # nothing replays it
        _forget(session, Operation.id == answered.id)
    return True


_ANSWERED = ("status", "answer", "error", "attempt", "started_at", "finished_at", "expires_at")
_ANSWER = (
    update(_T)
    .where(_T.c.id == bindparam("one"), *_WAITS)
    .values({name: bindparam(name) for name in _ANSWERED})
    .returning(_T.c.lane)
)


def at_work(session: Session, operation_id: str, *, attempt: int) -> None:
    """Note that this attempt runs the operation, so that the next one knows, should it kill its worker. The first such note
    stays."""
    unmarked = (Operation.id == operation_id, Operation.status == "waiting", Operation.attempt.is_(None))
    session.execute(
        update(Operation).where(*unmarked).values(attempt=attempt), execution_options={"synchronize_session": False}
    )


def has_suspects(session: Session | Connection, job_id: str, attempt: int) -> bool:
    """Whether an operation waits that was at work when an attempt before this one died."""
    marked = (Operation.job_id == job_id, Operation.status == "waiting", Operation.attempt < attempt)
    return session.scalar(select(Operation.id).where(*marked).limit(1)) is not None


def forget_requests(session: Session, job_id: str, before: int) -> None:
    """Forget the requests of ordered operations below seq `before`: a snapshot holds what they did.

    Those of a session are always forgotten from its beginning on, so only what follows the last forgotten one is looked at.
    """
    below = (Operation.job_id == job_id, Operation.lane == ORDERED, Operation.seq < before)
    forgotten = select(Operation.seq).where(*below, Operation.request.is_(None)).order_by(Operation.seq.desc()).limit(1)
    _forget(session, *below, Operation.seq > (session.scalar(forgotten) or 0))


def _forget(session: Session | Connection, *where: Any) -> None:
    session.execute(update(Operation).where(*where).values(request=None), execution_options={"synchronize_session": False})


def expire(session: Session, now: datetime) -> int:
    """Forget old answers. Rows of ordered lanes stay, so that a repeat is recognised; others go. Returns how many."""
    old = select(Operation.id).where(Operation.expires_at < now).order_by(Operation.expires_at).limit(EXPIRED_AT_ONCE)
    ids = list(session.scalars(old))
    if ids:
        which = Operation.id.in_(ids)
        session.execute(
            delete(Operation).where(which, Operation.lane != ORDERED), execution_options={"synchronize_session": False}
        )
        emptied = update(Operation).where(which).values(answer=None, expires_at=None)
        session.execute(emptied, execution_options={"synchronize_session": False})
    return len(ids)


def fail_waiting(session: Session, job_id: str, error: dict[str, Any], *, now: datetime, expires_at: datetime) -> int:
    """Every waiting operation of a session that has ended fails with this error. Returns how many."""
    values = {"status": "failed", "error": error, "finished_at": now, "expires_at": expires_at, "request": None}
    waiting = update(Operation).where(Operation.job_id == job_id, Operation.status == "waiting").values(**values)
    failed = session.scalars(waiting.returning(Operation.id), execution_options={"synchronize_session": False})
    return len(list(failed))


def idle_with_work(session: Session) -> list[str]:
    """Ids of paused sessions that rest only because they were idle, and have a waiting operation all the same."""
    waiting = select(Operation.id).where(Operation.job_id == Job.id, Operation.status == "waiting").exists()
    query = select(Job.id).where(Job.kind.in_(KINDS), Job.status == "paused", Job.status_reason == "idle", waiting)
    return list(session.scalars(query.order_by(Job.id)))
