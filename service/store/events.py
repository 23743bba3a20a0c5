"""The event log of a job, numbered 1, 2, 3 ... without gaps. Numbers come from the job's row, which serialises writers."""

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, bindparam, func, insert, select, update
from sqlalchemy.orm import Session
from sqlalchemy.sql.schema import ScalarElementColumnDefault

from service.errors import NotFound
from service.store import clock, webhooks
from service.store.dialect import connection_of, table_of
from service.store.tables import Event, Job


def append(session: Session, job_id: str, type_: str, data: dict[str, Any], *, now: datetime | None = None) -> int:
    """Write one event, in the transaction of the change that it reports. Returns its number. Raises NotFound (no job)."""
    return append_all(session, job_id, [(type_, data)], now=now)


def append_all(
    session: Session | Connection,
    job_id: str,
    events: Sequence[tuple[str, dict[str, Any]]],
    *,
    now: datetime | None = None,
    step: int | None = None,
    phase: str | None = None,
) -> int:
    """Write events in order, and what webhooks hear of them; with `step` or `phase` set the job's. Returns the number of the
    last one.

    Raises NotFound (no job).
    """
    now = now or clock.now(session)
    taken = {"of_job": job_id, "count": len(events), "now": now, "to_step": step, "to_phase": phase}
    row = connection_of(session).execute(_TAKE, taken).first()
    if row is None:
        raise NotFound(f"no job {job_id}")
    last, project = row
    _write(session, job_id, project, last - len(events) + 1, events, now)
    return last


def begin(session: Session, job: Job, events: Sequence[tuple[str, dict[str, Any]]], *, now: datetime) -> None:
    """Add a new job, whose columns without a value get their defaults, together with its first events.

    It is written as it is, without the ORM: `job` does not belong to the session, and later changes to it are not written.
    """
    job.last_event = len(events)
    for name, default in _DEFAULTS.items():
        if getattr(job, name) is None:
            setattr(job, name, default)
    connection_of(session).execute(_ADD, {column: getattr(job, name) for name, column in _COLUMNS.items()})
    _write(session, job.id, job.project, 1, events, now)


def _write(
    session: Session | Connection,
    job_id: str,
    project: str,
    first: int,
    events: Sequence[tuple[str, dict[str, Any]]],
    now: datetime,
) -> None:
    """The events, and what webhooks hear of them."""
    rows = [
        {"job_id": job_id, "seq": first + i, "type": type_, "data": data, "created_at": now}
        for i, (type_, data) in enumerate(events)
    ]
    if rows:
        connection_of(session).execute(_WRITE, rows)
    webhooks.tell(session, project, job_id, first, events, now)


def before(session: Session, job_id: str, seq: int | None, limit: int, without: Collection[str] = ()) -> list[Event]:
    """The events before number `seq` (None: the newest), newest first; types in `without` are left out."""
    query = select(Event).where(Event.job_id == job_id)
    if seq is not None:
        query = query.where(Event.seq < seq)
    if without:
        query = query.where(Event.type.not_in(list(without)))
    return list(session.scalars(query.order_by(Event.seq.desc()).limit(limit)))


def after(session: Session | Connection, job_id: str, seq: int, limit: int = 1000) -> Sequence[Any]:
    """The events that follow number `seq`, oldest first: rows with the columns of Event."""
    return session.execute(_AFTER, {"job_id": job_id, "seq": seq, "limit": limit}).all()


# Built once: to build such statements takes longer than to run them.
_JOBS = table_of(Job)
_TAKE = (
    update(_JOBS)
    .where(_JOBS.c.id == bindparam("of_job"))
    .values(
        last_event=_JOBS.c.last_event + bindparam("count"),
        updated_at=bindparam("now"),
        step=func.coalesce(bindparam("to_step", type_=_JOBS.c.step.type), _JOBS.c.step),
        phase=func.coalesce(bindparam("to_phase", type_=_JOBS.c.phase.type), _JOBS.c.phase),
    )
    .returning(_JOBS.c.last_event, _JOBS.c.project)
)
_COLUMNS = {"user_metadata" if column.name == "metadata" else column.name: column.name for column in _JOBS.c}  # by attribute
_DEFAULTS = {column.name: column.default.arg for column in _JOBS.c if isinstance(column.default, ScalarElementColumnDefault)}
_ADD = insert(_JOBS)
_WRITE = insert(table_of(Event))
_AFTER = (
    select(*table_of(Event).columns)
    .where(Event.job_id == bindparam("job_id"), Event.seq > bindparam("seq"))
    .order_by(Event.seq)
    .limit(bindparam("limit"))
)
