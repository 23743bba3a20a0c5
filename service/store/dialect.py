"""INSERT ... ON CONFLICT. SQLite and PostgreSQL share its syntax, but SQLAlchemy has it in two modules."""

from typing import Any

from sqlalchemy import Table
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, Session


def insert(session: Session, table: type[DeclarativeBase]) -> Any:
    """An INSERT of this session's dialect, with `on_conflict_do_update` and `on_conflict_do_nothing`."""
    return {"postgresql": postgresql.insert, "sqlite": sqlite.insert}[session.get_bind().dialect.name](table)


def upsert(session: Session, table: type[DeclarativeBase], rows: list[dict[str, Any]], *, newest: str) -> None:
    """Insert rows. A row whose primary key exists replaces the old row if its `newest` column is larger or equal."""
    if not rows:
        return
    definition = table.__table__
    assert isinstance(definition, Table)
    statement = insert(session, table)
    key = [column.name for column in definition.primary_key]
    changed = {column.name: statement.excluded[column.name] for column in definition.columns if column.name not in key}
    wins = statement.excluded[newest] >= definition.c[newest]
    session.execute(statement.on_conflict_do_update(index_elements=key, set_=changed, where=wins), rows)
