"""The event log of a job, numbered 1, 2, 3 ... without gaps. Numbers come from the job's row, which serialises writers."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session

from service.errors import NotFound
from service.store import clock
from service.store.tables import Event, Job


def append(session: Session, job_id: str, type_: str, data: dict[str, Any], *, now: datetime | None = None) -> int:
    """Write one event, in the transaction of the change that it reports. Returns its number. Raises NotFound (no job)."""
    return append_all(session, job_id, [(type_, data)], now=now)


def append_all(
    session: Session, job_id: str, events: Sequence[tuple[str, dict[str, Any]]], *, now: datetime | None = None
) -> int:
    """Write events in order. Returns the number of the last one. Raises NotFound (no job)."""
    now = now or clock.now(session)
    taken = update(Job).where(Job.id == job_id).values(last_event=Job.last_event + len(events), updated_at=now)
    last = session.scalar(taken.returning(Job.last_event), execution_options={"synchronize_session": False})
    if last is None:
        raise NotFound(f"no job {job_id}")
    _write(session, job_id, last - len(events) + 1, events, now)
    return last


def begin(session: Session, job: Job, events: Sequence[tuple[str, dict[str, Any]]], *, now: datetime) -> None:
    """Add a new job together with its first events."""
    job.last_event = len(events)
    session.add(job)
    session.flush()
    _write(session, job.id, 1, events, now)


def _write(session: Session, job_id: str, first: int, events: Sequence[tuple[str, dict[str, Any]]], now: datetime) -> None:
    rows = [
        {"job_id": job_id, "seq": first + i, "type": type_, "data": data, "created_at": now}
        for i, (type_, data) in enumerate(events)
    ]
    session.execute(insert(Event.__table__), rows)


def after(session: Session, job_id: str, seq: int, limit: int = 1000) -> list[Event]:
    """The events that follow number `seq`, oldest first."""
    query = select(Event).where(Event.job_id == job_id, Event.seq > seq)
    return list(session.scalars(query.order_by(Event.seq).limit(limit)))
