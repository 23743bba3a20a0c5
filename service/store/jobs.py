"""Queries over jobs. Changes of status are in service.jobs.moves; nothing else writes `status`."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    Text,
    and_,
    bindparam,
    case,
    cast,
    delete,
    exists,
    func,
    or_,
    select,
    tuple_,
    type_coerce,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session, defer

from service.errors import NotFound
from service.ids import lacking
from service.states import FINAL, HELD, Status
from service.store.dialect import table_of
from service.store.paging import newest_first
from service.store.tables import Budget, Checkpoint, Job, Worker


def get(session: Session, project: str, job_id: str, *, lock: bool = False) -> Job:
    """A job of this project. Raises NotFound. `lock`: nobody else can change it until this transaction ends."""
    job = find(session, job_id, lock=lock)
    if job is None or job.project != project:
        raise NotFound(lacking("job", job_id))
    return job


def find(session: Session, job_id: str, *, lock: bool = False, light: bool = False) -> Job | None:
    """A job of any project, or None. `light`: load the specs, which may hold thousands of rows, only when they are used."""
    return session.scalar(_FIND[lock, light], {"job_id": job_id})


class SmallJob(NamedTuple):
    """What one of many small writes needs to know of its job, without the ORM."""

    id: str
    project: str
    kind: str
    key_id: str | None
    status: str
    status_reason: str | None
    phase: str | None
    attempt: int
    lease_owner: str | None
    step: int
    max_steps: int
    budget_tokens: int | None
    budget_worker_s: float | None
    crashes: int
    project_tokens: int | None  # of its project's budget, as are the next two; None if it has none
    project_worker_s: float | None
    project_since: str | None


def forgive(connection: Connection, job_id: str) -> None:
    """What killed its workers is over."""
    connection.execute(update(table_of(Job)).where(table_of(Job).c.id == job_id).values(crashes=0, retries=0))


def lock_small(connection: Connection, job_id: str) -> SmallJob | None:
    """A job of any project, locked, as it is now: what was read does not change with what is written."""
    row = connection.execute(_LOCK_SMALL, {"job_id": job_id}).first()
    return None if row is None else SmallJob(*row)


_ONE = select(Job).where(Job.id == bindparam("job_id")).execution_options(populate_existing=True)
_LIGHT = _ONE.options(defer(Job.spec), defer(Job.spec_sent))
_FIND = {  # by `lock` and `light`; built once, because that takes longer than to run them
    (False, False): _ONE,
    (False, True): _LIGHT,
    (True, False): _ONE.with_for_update(key_share=True),
    (True, True): _LIGHT.with_for_update(key_share=True),
}
_UNSHOWN = frozenset(
    {
        "priority",
        "resource_class",
        "wish",
        "wish_until",
        "lease_owner",
        "crashes",
        "retries",
        "updated_at",
        "not_before",
        "rung_at",
        "deadline_at",
        "base_key",
    }
)
DOCUMENTS = ("tags", "user_metadata", "spec_sent", "spec", "resolved", "result")  # which a row of SHOWN has as JSON
_ATTRIBUTES = {"user_metadata" if column.name == "metadata" else column.name: column for column in table_of(Job).c}
# A job of a project as it is shown: without the ORM, its worker and its place in the queue.
SHOWN = select(
    *(
        cast(column, Text).label(name) if name in DOCUMENTS else column
        for name, column in _ATTRIBUTES.items()
        if name not in _UNSHOWN
    )
).where(table_of(Job).c.id == bindparam("job_id"), table_of(Job).c.project == bindparam("project"))
_OF_PROJECT = {"project_tokens": "tokens", "project_worker_s": "worker_s", "project_since": "since"}  # columns of Budget
_LOCK_SMALL = (
    select(
        *(table_of(Budget).c[_OF_PROJECT[name]] if name in _OF_PROJECT else table_of(Job).c[name] for name in SmallJob._fields)
    )
    .select_from(table_of(Job).outerjoin(table_of(Budget), table_of(Budget).c.project == table_of(Job).c.project))
    .where(table_of(Job).c.id == bindparam("job_id"))
    .with_for_update(key_share=True, of=table_of(Job))
)


def hold(session: Session, project: str, job_id: str) -> None:
    """Prevent a job's deletion until this transaction ends, without blocking its worker. Raises NotFound."""
    query = select(Job.id).where(Job.id == job_id, Job.project == project)
    if session.scalar(query.with_for_update(read=True, key_share=True)) is None:
        raise NotFound(lacking("job", job_id))


def standing(session: Session | Connection, project: str, job_id: str) -> tuple[str, int]:
    """Status and number of the newest event, without loading the spec, which may be long. Raises NotFound."""
    row = session.execute(_STANDING, {"job_id": job_id, "project": project}).first()
    if row is None:
        raise NotFound(lacking("job", job_id))
    return row.status, row.last_event


_STANDING = select(Job.status, Job.last_event).where(Job.id == bindparam("job_id"), Job.project == bindparam("project"))


def page(
    session: Session,
    project: str,
    *,
    status: Collection[str] = (),
    kind: str | None = None,
    tag: str | None = None,
    name: str | None = None,
    ids: Collection[str] = (),
    after: str | None = None,
    limit: int = 20,
    light: bool = False,
) -> tuple[list[Job], bool]:
    """Jobs of the project, newest first, without their specs. `status`: any of these; `name`: a part of it, case ignored.

    `light`: also without what their workers resolved. Returns the rows and whether there are more.
    """
    query = select(Job).where(Job.project == project).options(defer(Job.spec), defer(Job.spec_sent))
    if light:
        query = query.options(defer(Job.resolved))
    if ids:
        query = query.where(Job.id.in_(list(ids)))
    if status:
        query = query.where(Job.status.in_(list(status)))
    if kind is not None:
        query = query.where(Job.kind == kind)
    if tag is not None:
        query = query.where(_has_tag(session, tag))
    if name is not None:
        query = query.where(Job.name.icontains(name, autoescape=True))
    return newest_first(session, query, project, Job.created_at, Job.id, after=after, limit=limit)


def _has_tag(session: Session, tag: str) -> ColumnElement[bool]:
    if session.get_bind().dialect.name == "postgresql":
        return type_coerce(Job.tags, JSONB).contains([tag])
    each = func.json_each(Job.tags).table_valued("value")
    return select(each.c.value).where(type_coerce(each.c.value, Text) == tag).exists()


def next_queued(session: Session, classes: Collection[str], now: datetime) -> Job | None:
    """The job to take next: highest priority, then longest in the queue. None if none may start now."""
    query = select(Job).where(Job.status == Status.QUEUED, Job.resource_class.in_(list(classes)), _is_due(now))
    return session.scalar(
        query.order_by(Job.priority.desc(), Job.queued_at, Job.id).limit(1).execution_options(populate_existing=True)
    )


def queued_of_base(session: Session, classes: Collection[str], base_key: str, now: datetime, limit: int) -> list[Job]:
    """Queued sessions and samplers of this base that may start now, in the order of the queue."""
    query = select(Job).where(Job.status == Status.QUEUED, Job.base_key == base_key, _is_due(now))
    query = query.where(Job.resource_class.in_(list(classes))).order_by(Job.priority.desc(), Job.queued_at, Job.id)
    return list(session.scalars(query.limit(limit).execution_options(populate_existing=True)))


def queued(connection: Connection, classes: Collection[str], base_key: str | None, now: datetime) -> tuple[bool, bool]:
    """Whether sessions or samplers of this base may start now, and whether other jobs may."""
    row = connection.execute(_QUEUED, {"classes": list(classes), "base_key": base_key or "", "now": now}).one()
    return bool(row.ours), bool(row.others)


_IN_QUEUE = (
    Job.status == Status.QUEUED,
    Job.resource_class.in_(bindparam("classes", expanding=True)),
    or_(Job.not_before.is_(None), Job.not_before <= bindparam("now")),
)
_QUEUED = select(
    exists().where(*_IN_QUEUE, Job.base_key == bindparam("base_key")).label("ours"),
    exists().where(*_IN_QUEUE, or_(Job.base_key.is_(None), Job.base_key != bindparam("base_key"))).label("others"),
)


def sampler(session: Session, project: str, base_key: str) -> Job | None:
    """The project's sampler of this base that has not ended, or None."""
    query = select(Job).where(Job.project == project, Job.kind == "sampler", Job.base_key == base_key)
    query = query.where(Job.status.not_in(FINAL)).order_by(Job.created_at, Job.id).limit(1)
    return session.scalar(query.execution_options(populate_existing=True))


def samplers_of(session: Session, checkpoint_ids: Collection[str]) -> list[Job]:
    """The samplers that have not ended of these checkpoints of all weights."""
    query = select(Job).where(Job.kind == "sampler", Job.from_checkpoint_id.in_(list(checkpoint_ids)))
    return list(session.scalars(query.where(Job.status.not_in(FINAL))))


def take_unheard(session: Session, resource_class: str, now: datetime, rung_before: datetime, limit: int) -> list[str]:
    """Take at most `limit` queued jobs of this class that may start now and had no ring since `rung_before`; mark them as rung.

    Returns their ids in queue order. Concurrent callers get different jobs.
    """
    silent = or_(Job.rung_at.is_(None), Job.rung_at < rung_before, Job.rung_at > now)  # > now: the clock was set back
    query = select(Job.id).where(Job.status == Status.QUEUED, Job.resource_class == resource_class, _is_due(now), silent)
    query = query.order_by(Job.priority.desc(), Job.queued_at, Job.id).limit(limit)
    taken = list(session.scalars(query.with_for_update(key_share=True, skip_locked=True)))
    _note_ring(session, taken, now)
    return taken


def unring(session: Session, job_ids: Collection[str]) -> None:
    """Undo the mark of `take_unheard`: the bell was not rung for these jobs after all."""
    _note_ring(session, job_ids, None)


def _note_ring(session: Session, job_ids: Collection[str], rung_at: datetime | None) -> None:
    noted = update(Job).where(Job.id.in_(job_ids), Job.status == Status.QUEUED).values(rung_at=rung_at)
    session.execute(noted, execution_options={"synchronize_session": False})


def classes_queued(session: Session, now: datetime) -> list[str]:
    """The classes of the jobs that may start now."""
    return list(session.scalars(select(Job.resource_class).where(Job.status == Status.QUEUED, _is_due(now)).distinct()))


def count_queued(session: Session, resource_class: str, now: datetime) -> int:
    """How many jobs of this class may start now."""
    query = select(func.count()).where(Job.status == Status.QUEUED, Job.resource_class == resource_class, _is_due(now))
    return session.scalar(query) or 0


def queued_since(session: Session, resource_class: str, now: datetime) -> datetime | None:
    """Since when the longest waiting job of this class could have started; None if none may start now."""
    since = case((Job.not_before > Job.queued_at, Job.not_before), else_=Job.queued_at)
    query = select(func.min(since)).where(Job.status == Status.QUEUED, Job.resource_class == resource_class, _is_due(now))
    return session.scalar(query)


def _is_due(now: datetime) -> ColumnElement[bool]:
    return or_(Job.not_before.is_(None), Job.not_before <= now)


def held(session: Session, *, owner: str | None = None, expired_at: datetime | None = None) -> list[str]:
    """Ids of jobs under a lease; with `owner` only its jobs, with `expired_at` only those whose lease had ended by then."""
    query = select(Job.id).where(Job.status.in_(HELD))
    if owner is not None:
        query = query.where(Job.lease_owner == owner)
    if expired_at is not None:
        query = query.where(or_(Job.lease_until.is_(None), Job.lease_until < expired_at))
    return list(session.scalars(query.order_by(Job.id)))


def in_hands_of(connection: Connection, owner: str) -> Sequence[Any]:
    """The jobs that this worker holds: rows of id, status and wish_until."""
    return connection.execute(_IN_HANDS_OF, {"owner": owner}).all()


_IN_HANDS_OF = (
    select(Job.id, Job.status, Job.wish_until)
    .where(Job.status.in_(HELD), Job.lease_owner == bindparam("owner"))
    .order_by(Job.id)
)


@dataclass(frozen=True)
class Renewed:
    """A job whose lease was renewed, and what its worker should know."""

    id: str
    attempt: int
    owner: str
    status: str
    wish: str | None
    draining: bool | None  # whether its worker drains; None if the worker is not in the table (any more)


def renew(session: Session, held: Collection[tuple[str, int, str]], until: Any, since: Mapping[str, Any]) -> list[Renewed]:
    """Renew the leases of these (id, attempt, owner) in one statement. Jobs that are no longer held so are left out.

    `since`: id -> when the job was claimed, as its worker counts back from now. `until` and `since` are times of `clock.at`.
    """
    draining = select(Worker.draining).where(Worker.id == Job.lease_owner).scalar_subquery()
    # The plain ids let both databases use the primary key; the triples select the rows.
    ours = (Job.id.in_([job_id for job_id, _, _ in held]), tuple_(Job.id, Job.attempt, Job.lease_owner).in_(list(held)))
    claimed = {"claimed_at": case(since, value=Job.id, else_=Job.claimed_at)} if since else {}
    columns = (Job.id, Job.attempt, Job.lease_owner, Job.status, Job.wish, draining)
    moved = update(Job).where(*ours).values(lease_until=until, **claimed).returning(*columns)
    return [Renewed(*row) for row in session.execute(moved, execution_options={"synchronize_session": False})]


def shorten_leases(session: Session, latest: datetime) -> None:
    """Cut leases off at `latest`. A longer one dates from before the clock was set back, and would hide a dead worker."""
    beyond = (Job.status.in_(HELD), Job.lease_until > latest)
    if session.scalar(select(Job.id).where(*beyond).limit(1)) is not None:
        shortened = update(Job).where(*beyond).values(lease_until=latest)
        session.execute(shortened, execution_options={"synchronize_session": False})


def disobeyed(session: Session, now: datetime) -> list[str]:
    """Ids of jobs whose worker should have paused or cancelled them before `now` and has not."""
    query = select(Job.id).where(Job.status.in_((Status.PAUSING, Status.CANCELLING)), Job.wish_until < now)
    return list(session.scalars(query.order_by(Job.id)))


def past_deadline(session: Session, now: datetime) -> list[str]:
    """Ids of unfinished jobs whose deadline has passed."""
    query = select(Job.id).where(Job.deadline_at < now, Job.status.not_in(FINAL))
    return sorted(session.scalars(query))  # not ORDER BY: SQLite would read the whole table in that order


def owners(session: Session) -> dict[str, Worker | None]:
    """Workers that hold jobs now, by id, each as it last reported; None for one that is not in the table (any more)."""
    query = select(Job.lease_owner).where(Job.status.in_(HELD), Job.lease_owner.is_not(None)).distinct()
    return {owner: session.get(Worker, owner) for owner in session.scalars(query) if owner is not None}


def held_by(session: Session, project: str) -> dict[str, list[str]]:
    """The project's jobs under a lease, by the worker that holds them."""
    query = select(Job.lease_owner, Job.id).where(Job.project == project, Job.status.in_(HELD)).order_by(Job.id)
    held: dict[str, list[str]] = {}
    for owner, job_id in session.execute(query):
        held.setdefault(owner or "", []).append(job_id)
    return held


@dataclass(frozen=True)
class Runtime:
    """How long a job has run, and how long it may run (limits.max_runtime_s)."""

    id: str
    status: str
    run_s: float  # in earlier attempts
    claimed_at: datetime | None
    lease_until: datetime | None
    allowed_s: float | None


def runtimes(session: Session, job_id: str | None = None) -> list[Runtime]:
    """Runtimes of jobs under a lease and of queued jobs that have run before; with `job_id` only of that job."""
    allowed_s = Job.spec[("limits", "max_runtime_s")].as_float()
    query = select(Job.id, Job.status, Job.run_s, Job.claimed_at, Job.lease_until, allowed_s).order_by(Job.id)
    query = query.where(or_(Job.status.in_(HELD), and_(Job.status == Status.QUEUED, Job.run_s > 0)))
    return [Runtime(*row) for row in session.execute(query if job_id is None else query.where(Job.id == job_id))]


def count_by_status(session: Session, project: str | None = None) -> dict[str, int]:
    query = select(Job.status, func.count()).group_by(Job.status)
    if project is not None:
        query = query.where(Job.project == project)
    return {row[0]: row[1] for row in session.execute(query)}


def remove(session: Session, job_id: str) -> None:
    """Delete the job with its events, metrics and rollouts. Its checkpoints stay, without a job.

    It first locks the job, to wait for a fork that holds it, and then its checkpoints in the order in which deleting
    checkpoints locks them. The DELETE alone would lock them in any order, and could deadlock with both.
    """
    session.execute(select(Job.id).where(Job.id == job_id).with_for_update())
    session.execute(select(Checkpoint.id).where(Checkpoint.job_id == job_id).order_by(Checkpoint.id).with_for_update())
    session.execute(delete(Job).where(Job.id == job_id))
