"""The database's clock, used for leases, queues and expiry. The clocks of the other machines need not agree with it."""

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Interval, func, literal, select
from sqlalchemy.orm import Session

from service import ids


def now(asking: Session | Connection) -> datetime:
    """The time now, as aware UTC. SQLite has no clock of its own; there it is the clock of the one machine.

    It does not use PostgreSQL's now(), which stays at the transaction's start, however long that waited for a lock.
    """
    if not _tells_time(asking):
        return ids.utcnow()
    return asking.execute(select(func.clock_timestamp())).scalar_one().astimezone(UTC)


def at(session: Session, after: timedelta) -> Any:
    """The time `after` from now, for use inside a statement: it needs no query of its own."""
    return func.clock_timestamp() + literal(after, Interval) if _tells_time(session) else ids.utcnow() + after


def _tells_time(asking: Session | Connection) -> bool:
    bind: Any = asking.get_bind() if isinstance(asking, Session) else asking
    return bind.dialect.name == "postgresql"
