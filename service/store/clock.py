"""The one clock of leases, queues and what ends by itself: the database's. The machines around it may disagree as they like."""

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Interval, func, literal, select
from sqlalchemy.orm import Session

from service import ids


def now(asking: Session | Connection) -> datetime:
    """Aware UTC. SQLite has no clock of its own: it is the machine's on which everything runs then.

    Not PostgreSQL's now(), which stands still from the transaction's start, however long that waited for a lock.
    """
    if not _tells_time(asking):
        return ids.utcnow()
    return asking.execute(select(func.clock_timestamp())).scalar_one().astimezone(UTC)


def at(session: Session, after: timedelta) -> Any:
    """So long after now, to stand in a statement: no question of its own."""
    return func.clock_timestamp() + literal(after, Interval) if _tells_time(session) else ids.utcnow() + after


def _tells_time(asking: Session | Connection) -> bool:
    bind: Any = asking.get_bind() if isinstance(asking, Session) else asking
    return bind.dialect.name == "postgresql"
