"""INSERT ... ON CONFLICT. SQLite and PostgreSQL share its syntax, but SQLAlchemy has it in two modules.

Statements that run often are built once, with `for_both` and bind parameters: to build one takes longer than to run it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import Connection, Table
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, Session

INSERTS: Mapping[str, Callable[..., Any]] = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}


def insert(session: Session, table: type[DeclarativeBase]) -> Any:
    """An INSERT of this session's dialect, with `on_conflict_do_update` and `on_conflict_do_nothing`."""
    return INSERTS[name_of(session)](table)


def for_both(build: Callable[[Callable[..., Any]], Any]) -> dict[str, Any]:
    """A statement for each dialect, by its name. `build` gets the dialect's `insert`."""
    return {name: build(insert_) for name, insert_ in INSERTS.items()}


def name_of(session: Session | Connection) -> str:
    return session.dialect.name if isinstance(session, Connection) else session.get_bind().dialect.name


def connection_of(session: Session | Connection) -> Connection:
    """For statements on tables. What the session holds back goes before them."""
    if isinstance(session, Connection):
        return session
    session.flush()
    return session.connection()


def table_of(mapped: type[DeclarativeBase]) -> Table:
    """The table behind a mapped class: statements on it skip what the ORM does for each row."""
    table = mapped.__table__
    assert isinstance(table, Table)
    return table


def replacing(mapped: type[DeclarativeBase], *, newest: str) -> dict[str, Any]:
    """INSERTs, by dialect, whose rows replace rows of the same primary key if their `newest` column is larger or equal."""
    table = table_of(mapped)
    key = [column.name for column in table.primary_key]

    def build(insert_: Callable[..., Any]) -> Any:
        statement = insert_(table)
        changed = {column.name: statement.excluded[column.name] for column in table.columns if column.name not in key}
        wins = statement.excluded[newest] >= table.c[newest]
        return statement.on_conflict_do_update(index_elements=key, set_=changed, where=wins)

    return for_both(build)
