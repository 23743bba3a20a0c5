"""The audit log: changes that requests made, newest first."""

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, delete, insert, select
from sqlalchemy.orm import Session

from service.ids import new_id
from service.store import clock
from service.store.dialect import connection_of, table_of
from service.store.paging import newest_first
from service.store.tables import AuditEntry

KEPT_FOR = timedelta(days=400)
EXPIRED_AT_ONCE = 1000


def note(session: Session | Connection, **columns: Any) -> None:
    """Write an entry: project, key_id, action, object_id, status, request_id."""
    connection_of(session).execute(_NOTE, {"id": new_id("aud"), "created_at": clock.now(session), **columns})


_NOTE = insert(table_of(AuditEntry))


def page(
    session: Session, project: str, *, key_id: str | None, object_id: str | None, after: str | None, limit: int
) -> tuple[list[AuditEntry], bool]:
    """Entries of the project, of one key or about one object. Returns the rows and whether there are more."""
    query = select(AuditEntry).where(AuditEntry.project == project)
    if key_id is not None:
        query = query.where(AuditEntry.key_id == key_id)
    if object_id is not None:
        query = query.where(AuditEntry.object_id == object_id)
    return newest_first(session, query, project, AuditEntry.created_at, AuditEntry.id, after=after, limit=limit)


def expire(session: Session, now: datetime) -> None:
    """Delete old entries, so many at a time."""
    old = select(AuditEntry.id).where(AuditEntry.created_at < now - KEPT_FOR).limit(EXPIRED_AT_ONCE)
    session.execute(delete(AuditEntry).where(AuditEntry.id.in_(old)), execution_options={"synchronize_session": False})
