"""The store: one engine, one way to open a transaction, one folder of blobs. Query modules never commit."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from service.settings import Settings
from service.store import clock
from service.store.blobs import Blobs
from service.store.bucket import Bucket
from service.store.values import dumps

BUSY_TIMEOUT_S = 20  # how long SQLite waits for another writer
# A vanished server must be noticed well before a lease ends, not after TCP's default of two hours.
# A process that hangs in the middle of a transaction must not lock the job's row for longer than its lease.
POSTGRES_OPTIONS = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "tcp_user_timeout": 15_000,
    "options": "-c idle_in_transaction_session_timeout=20s",
}
MAX_OVERFLOW = 35  # together with the pool's 5, one connection for each of the API's 40 threads
# hide_parameters: values from callers and models appear in no error text, and so in no log.
COMMON: dict[str, Any] = {"max_overflow": MAX_OVERFLOW, "json_serializer": dumps, "hide_parameters": True}
READONLY, UNSYNCED = "ratchet_readonly", "ratchet_unsynced"  # execution options, read by the begin hook below
DELIVERIES = "ratchet_deliveries"  # in a connection's info: its transaction has put something into the outbox of webhooks


class Store:
    """The database and the blobs. Safe to share between threads; each process opens its own."""

    def __init__(self, engine: Engine, blobs: Blobs) -> None:
        self.engine = engine
        self.blobs = blobs
        self.on_deliveries: Callable[[], object] = lambda: None  # after a commit with new deliveries: ring whoever sends them
        self._reading = engine.execution_options(**{READONLY: True, "postgresql_readonly": True})
        self._unsynced = engine.execution_options(**{UNSYNCED: True})

    @contextmanager
    def begin(self, *, readonly: bool = False) -> Iterator[Session]:
        """One transaction: commits when the block ends, rolls back when it raises.

        Rows stay readable afterwards (nothing expires on commit). A readonly transaction refuses writes. On SQLite a writing
        transaction waits for other writers at its first statement; a readonly one does not wait.
        """
        told = False
        with Session(self._reading if readonly else self.engine, expire_on_commit=False) as session, session.begin():
            yield session
            told = not readonly and session.in_transaction() and session.connection().info.pop(DELIVERIES, False)
        if told:
            self.on_deliveries()

    @contextmanager
    def write(self, *, synced: bool = True) -> Iterator[Connection]:
        """A writing transaction without a Session: for the one that every step makes.

        synced  False: SQLite does not wait for the disk, and who tells anybody of it must call `sync` before. Other processes
                see it at once: if the power fails, it is lost, but so are they, for they run on the same machine, and what
                they wrote, for later commits come later in the log. PostgreSQL waits all the same
        """
        with (self.engine if synced else self._unsynced).connect() as connection, connection.begin():
            yield connection
            told = connection.info.pop(DELIVERIES, False)
        if told:
            self.on_deliveries()

    @contextmanager
    def look(self) -> Iterator[Connection]:
        """A readonly transaction without a Session, at a third of the cost: for the one query that every request makes."""
        with self._reading.connect() as connection, connection.begin():
            yield connection

    def sync(self) -> None:
        """Return when everything that was committed is on the disk. It holds no lock, as a commit would."""
        if self.engine.dialect.name != "sqlite":
            return
        try:
            log = os.open(f"{self.engine.url.database}-wal", os.O_RDONLY)
        except FileNotFoundError:  # it was all moved into the database, which SQLite waits for; or there is no file at all
            return
        try:
            os.fsync(log)
        finally:
            os.close(log)

    def now(self) -> datetime:
        """The time by the clock of the leases, see `clock`."""
        with self.look() as connection:
            return clock.now(connection)

    def close(self) -> None:
        self.engine.dispose()


def open_store(settings: Settings) -> Store:
    """Open the store; it connects lazily. Tables are not created or migrated here, see `upgrade`."""
    bucket = None if settings.blob_url is None else Bucket(settings.blob_url)
    return Store(make_engine(settings.sql_url), Blobs(settings.blobs_dir, bucket))


def make_engine(url: str, *, foreign_keys: bool = True) -> Engine:
    """An engine for SQLite or PostgreSQL (psycopg 3). `foreign_keys=False` is for migrations, which rebuild SQLite's tables."""
    parsed = make_url(url)
    backend = parsed.get_backend_name()
    if backend == "postgresql":
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        engine = create_engine(parsed, pool_pre_ping=True, connect_args=POSTGRES_OPTIONS, **COMMON)
        event.listen(engine, "handle_error", _without_values)
        event.listen(engine, "rollback", _without_deliveries)
        return engine
    if backend == "sqlite":
        if parsed.database not in (None, "", ":memory:"):
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT_S}, **COMMON)
        _teach_sqlite(engine, foreign_keys=foreign_keys)
        event.listen(engine, "rollback", _without_deliveries)
        return engine
    raise ValueError(f"RATCHET_DATABASE_URL must be a sqlite:/// or postgresql+psycopg:// URL, got {parsed.drivername}://")


def _without_values(context: ExceptionContext) -> None:
    """Keep only the first line of a PostgreSQL error: the lines after it (DETAIL, CONTEXT) quote whole rows and documents."""
    for error in (context.original_exception, context.sqlalchemy_exception):
        if error is not None and error.args and isinstance(error.args[0], str):
            error.args = (error.args[0].partition("\n")[0], *error.args[1:])


def _without_deliveries(connection: Connection) -> None:
    if not connection.invalidated:  # else its info is gone with it
        connection.info.pop(DELIVERIES, None)


def _teach_sqlite(engine: Engine, *, foreign_keys: bool) -> None:
    """Real transactions for SQLite. Writers queue at BEGIN, because a reader that becomes a writer fails without waiting."""

    @event.listens_for(engine, "connect")
    def on_connect(dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
        dbapi_connection.isolation_level = None  # the driver must not begin transactions by itself
        cursor = dbapi_connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")  # a committed step survives a power cut
        cursor.execute(f"PRAGMA foreign_keys={'ON' if foreign_keys else 'OFF'}")
        cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_S * 1000}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        options = connection.get_execution_options()
        readonly, unsynced = options.get(READONLY, False), options.get(UNSYNCED, False)
        raw: Any = connection.connection.driver_connection
        # What cannot fail goes past SQLAlchemy, which takes longer for it than SQLite.
        if connection.info.get(READONLY) is not readonly:
            raw.execute(f"PRAGMA query_only={'ON' if readonly else 'OFF'}").close()
            connection.info[READONLY] = readonly
        if connection.info.get(UNSYNCED, False) is not unsynced:
            raw.execute(f"PRAGMA synchronous={'NORMAL' if unsynced else 'FULL'}").close()
            connection.info[UNSYNCED] = unsynced
        if readonly:
            raw.execute("BEGIN").close()
        else:
            connection.exec_driver_sql("BEGIN IMMEDIATE")


def upgrade(url: str, revision: str = "head") -> None:
    """Upgrade the database to `revision` with Alembic. Processes that start together wait for each other."""
    from alembic import command  # imported here: the worker's children never migrate

    command.upgrade(alembic_config(url), revision)


def downgrade(url: str, revision: str) -> None:
    """Undo migrations down to `revision`; `base` undoes all. The data of their tables and columns is lost."""
    from alembic import command

    command.downgrade(alembic_config(url), revision)


def alembic_config(url: str) -> Any:
    """Alembic's Config for the migrations that are installed with this package."""
    from alembic.config import Config

    import migrations

    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent).replace("%", "%%"))
    config.attributes["url"] = url
    return config
