"""Alembic's entry: `service.store.session.upgrade(url)` in a program, `alembic` in a shell. SQLite and PostgreSQL."""

from typing import Any, Literal

import sqlalchemy as sa
from alembic import context
from alembic.autogenerate.api import AutogenContext
from sqlalchemy.dialects import postgresql

from service.settings import get_settings
from service.store.session import make_engine
from service.store.tables import Base, Json, UTCDateTime

LOCK = 7_228_324  # any number that no other program takes on the same PostgreSQL database


def render_item(kind: str, item: Any, autogen: AutogenContext) -> str | Literal[False]:
    """Migrations name types of SQLAlchemy, not of ours: those may change, a migration may not."""
    if kind == "type" and isinstance(item, UTCDateTime):
        return "sa.DateTime(timezone=True)"
    if kind == "type" and item is Json:
        autogen.imports.add("from sqlalchemy.dialects import postgresql")
        return 'sa.JSON().with_variant(postgresql.JSONB(), "postgresql")'
    return False


def compare_type(_context: Any, _inspected: Any, _column: Any, inspected_type: Any, wanted_type: Any) -> bool | None:
    """A JSON column that SQLAlchemy reads back as its dialect's own JSON is the same; None leaves the rest to Alembic."""
    if wanted_type is Json:
        return not isinstance(inspected_type, sa.JSON | postgresql.JSONB)
    return None


def configure(connection: sa.Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_item=render_item,
        compare_type=compare_type,
        compare_server_default=True,
        # SQLite cannot alter most things: a table is copied, the old one dropped.
        render_as_batch=connection.dialect.name == "sqlite",
        # Ours can do DDL in transactions on both: a migration that fails leaves nothing behind.
        transactional_ddl=True,
    )


def run() -> None:
    url = context.config.attributes.get("url") or get_settings().sql_url
    # Without foreign keys: on SQLite, dropping the old copy of a table would delete the rows that refer to it.
    engine = make_engine(url, foreign_keys=False)
    try:
        with engine.begin() as connection:
            # Copies that start together wait here; SQLite's BEGIN IMMEDIATE does the same.
            if connection.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))
            configure(connection)
            context.run_migrations()
            if connection.dialect.name == "sqlite" and (broken := connection.exec_driver_sql("PRAGMA foreign_key_check").all()):
                raise RuntimeError(f"the migration broke references between tables: {broken[:10]}")
    finally:
        engine.dispose()


if context.is_offline_mode():
    raise SystemExit("alembic --sql is not supported: migrations look at the database that they change")
run()
