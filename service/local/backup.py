"""Backup of a live system: a snapshot of the SQL database, and every blob that it names. And restoring it.

Blobs never change: they appear by a rename before a row names them, and are removed only after the row says that they are
deleted. So blobs are copied first, then the database in one snapshot, then the blobs that were added in between. If retention
removed one of those meanwhile, another snapshot is taken, until nothing that it names is missing. Each round copies only new
blobs, so later rounds are short.
"""

import json
import logging
import os
import shutil
import sqlite3
import zlib
from contextlib import ExitStack, closing, suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, BadZipFile, ZipFile

import psycopg
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from psycopg import sql
from sqlalchemy import Connection, Engine, MetaData, Table, inspect, make_url, text
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from service.errors import RatchetError
from service.jobs import moves
from service.settings import Settings
from service.states import HELD, Status
from service.store import checkpoints, datasets, jobs, workers
from service.store.blobs import Blobs
from service.store.bucket import Bucket, blob_of
from service.store.session import Store, alembic_config, make_engine, open_store, upgrade
from service.store.tables import Base
from service.validation.words import counted

log = logging.getLogger(__name__)

FACTS, BLOBS, SQLITE, POSTGRESQL = "backup.json", "blobs", "ratchet.db", "ratchet.zip"
REVISION, CSV = "revision", ".csv"  # in ratchet.zip
COMING = ".restoring"  # among the blobs: those of a restore that has not come to its end
CHUNK_BYTES = 2**20
ROUNDS = 20
NAMED = "SELECT path FROM checkpoints WHERE deleted_at IS NULL UNION SELECT path FROM datasets WHERE deleted_at IS NULL"


class BackupFailed(RatchetError):
    code = "backup_failed"


# ---------------------------------------------------------------- copying


def backup(settings: Settings, folder: Path) -> dict[str, Any]:
    """Copy everything into a new folder. Returns backup.json. Raises BackupFailed, and then nothing of it is left."""
    if folder.exists() and any(folder.iterdir()):
        raise BackupFailed(f"{folder} is not empty; a backup takes a new folder")
    url = make_url(settings.sql_url)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
        raise BackupFailed(f"no system has run in {settings.data_dir}: {url.database} is not there")
    with ExitStack() as undo:
        try:
            if not folder.exists():
                folder.mkdir(parents=True, mode=0o700)
                undo.callback(_remove, [folder])
            undo.callback(_take_out, folder)
            facts = _backup(settings, folder)
        except OSError as error:
            raise BackupFailed(f"there is no backup: {folder} cannot be written: {error.strerror or error}") from error
        except (sqlite3.Error, psycopg.Error, SQLAlchemyError) as error:
            reason = getattr(error, "orig", error)
            raise BackupFailed(f"there is no backup: the database could not be copied: {reason}") from error
        except RatchetError as error:
            raise BackupFailed(f"there is no backup: {error}") from error
        undo.pop_all()
    return facts


def _take_out(folder: Path) -> None:
    """Remove what a backup has written that did not come to its end."""
    shutil.rmtree(folder / BLOBS, ignore_errors=True)
    for name in (FACTS, SQLITE, POSTGRESQL):
        _remove([folder / name, folder / f"{name}.tmp"])


def _backup(settings: Settings, folder: Path) -> dict[str, Any]:
    store = open_store(settings)
    try:
        return _copy_all(store, settings, folder)
    finally:
        store.close()


def _copy_all(store: Store, settings: Settings, folder: Path) -> dict[str, Any]:
    copy = Blobs(folder / BLOBS)
    snapshot = _snapshot_sqlite if make_url(settings.sql_url).get_backend_name() == "sqlite" else _snapshot_postgresql
    for number in range(1, ROUNDS + 1):
        _copy_blobs(store.blobs, copy, live_paths(store))
        made_at = store.now()
        named = snapshot(settings.sql_url, folder)
        _copy_blobs(store.blobs, copy, named)
        missing = {path for path in named if not copy.path(path).exists()}
        lost = missing & live_paths(store)  # still named and missing: lost before the backup, not removed meanwhile
        if missing == lost:
            break
        log.info("round %d: %d blobs were removed while they were copied", number, len(missing - lost))
    else:
        raise BackupFailed(f"checkpoints are removed faster than they are copied: tried {ROUNDS} times")
    for path in copy.unclaimed(named):
        copy.delete(path)
    facts = {"made_at": made_at.isoformat(), "blobs": len(named - lost), "lost": sorted(lost), "rounds": number}
    coming = folder / f"{FACTS}.tmp"
    _write(coming, json.dumps(facts, indent=2).encode())
    coming.rename(folder / FACTS)  # the last of it
    return facts


def live_paths(store: Store) -> set[str]:
    with store.begin(readonly=True) as session:
        return checkpoints.live_paths(session) | datasets.live_paths(session)


def _copy_blobs(source: Blobs, copy: Blobs, paths: set[str]) -> None:
    """Copy each blob completely or not at all. Blobs that are already copied, or that are gone, are skipped."""
    for path in sorted(paths):
        if copy.path(path).exists():
            continue
        folder = copy.temporary_dir()
        try:
            if source.bucket is not None and not source.path(path).exists():
                if not source.bucket.get(path, folder / "blob"):
                    raise FileNotFoundError(path)
            elif source.path(path).is_dir():
                shutil.copytree(source.path(path), folder / "blob")
            else:
                shutil.copyfile(source.path(path), folder / "blob")
            copy.commit_dir(folder / "blob", path)
        except (FileNotFoundError, shutil.Error) as error:  # copytree collects what it misses
            if source.path(path).exists():
                raise BackupFailed(f"{path} could not be copied: {_reason(error)}") from error
            log.debug("%s is gone", path)  # removed meanwhile
        finally:
            copy.discard(folder)


def _reason(error: OSError) -> object:
    """Of copytree's error, which lists every file, only what happened to the first one."""
    files = error.args[0] if isinstance(error, shutil.Error) else []
    return files[0][2] if isinstance(files, list) and files else error


def _snapshot_sqlite(url: str, folder: Path) -> set[str]:
    """Take a snapshot with SQLite's online backup, without stopping writers. Returns the blobs that it names."""
    target = folder / f"{SQLITE}.tmp"
    target.unlink(missing_ok=True)
    with closing(sqlite3.connect(str(make_url(url).database), timeout=60)) as live, closing(sqlite3.connect(target)) as copy:
        live.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")  # one file, without a log beside it
        named = {row[0] for row in copy.execute(NAMED)}
    target.rename(folder / SQLITE)
    return named


def _snapshot_postgresql(url: str, folder: Path) -> set[str]:
    """Take a snapshot by COPY of every table in one REPEATABLE READ transaction, without stopping writers."""
    target = folder / f"{POSTGRESQL}.tmp"
    engine = make_engine(url)
    options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
    try:
        with (
            engine.connect().execution_options(**options) as connection,
            connection.begin(),
            ZipFile(target, "w", ZIP_DEFLATED, compresslevel=1) as archive,
        ):
            archive.writestr(REVISION, _revision(connection, url))
            _speak_plainly(connection)
            for table in Base.metadata.sorted_tables:
                _copy_out(connection, table, archive)
            named = set(connection.scalars(text(NAMED)))
    finally:
        engine.dispose()
    target.rename(folder / POSTGRESQL)
    return named


def _revision(connection: Connection, url: str) -> str:
    """The version of the tables. Raises BackupFailed if it is not this program's, because the columns would differ."""
    revision = MigrationContext.configure(connection).get_current_revision()
    ours = ScriptDirectory.from_config(alembic_config(url)).get_current_head()
    if revision is None or revision != ours:
        raise BackupFailed(
            f"the tables are at version {revision}, this program's at {ours}; take the ratchet that runs on them"
        )
    return revision


def _speak_plainly(connection: Connection) -> None:
    """Set formats that every server reads back without change, whatever the database's own settings are."""
    for line in ("client_encoding = UTF8", "datestyle = ISO", "timezone = UTC", "extra_float_digits = 1"):
        connection.exec_driver_sql(f"SET LOCAL {line}")


def _copy_out(connection: Connection, table: Table, archive: ZipFile) -> None:
    columns = sql.SQL(", ").join(sql.Identifier(column.name) for column in table.columns)
    statement = sql.SQL("COPY {} ({}) TO STDOUT (FORMAT csv, HEADER)").format(sql.Identifier(table.name), columns)
    with (
        _cursor(connection) as cursor,
        cursor.copy(statement) as rows,
        archive.open(f"{table.name}{CSV}", "w", force_zip64=True) as file,
    ):
        for row in rows:
            file.write(row)


def _copy_in(connection: Connection, archive: ZipFile, name: str) -> None:
    with archive.open(name) as file:
        header = file.readline()  # the names of the columns, which PostgreSQL would skip
        columns = sql.SQL(", ").join(sql.Identifier(column) for column in header.decode().strip().split(","))
        table = sql.Identifier(name.removesuffix(CSV))
        with (
            _cursor(connection) as cursor,
            cursor.copy(sql.SQL("COPY {} ({}) FROM STDIN (FORMAT csv)").format(table, columns)) as rows,
        ):
            while chunk := file.read(CHUNK_BYTES):
                rows.write(chunk)


def _cursor(connection: Connection) -> psycopg.Cursor[Any]:
    """psycopg's cursor, because SQLAlchemy has no COPY."""
    driver: Any = connection.connection.driver_connection
    return driver.cursor()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------- starting again


def restore(settings: Settings, folder: Path) -> dict[str, Any]:
    """Restore a backup into the empty database and the data directory without blobs that these settings name.

    Jobs that were running at the time of the backup are queued as of that time; a worker continues them from their last
    checkpoints. Returns backup.json, and the ids of those jobs. Raises BackupFailed, and then the database and the data
    directory are as empty as before.
    """
    facts = _facts(folder)
    blobs = settings.blobs_dir
    _refuse_blobs(blobs)
    is_sqlite = make_url(settings.sql_url).get_backend_name() == "sqlite"
    (_check_sqlite if is_sqlite else _check_postgresql)(settings.sql_url, folder)
    _fill_bucket(settings, folder / BLOBS)
    with ExitStack() as undo:
        try:
            _copy_back(folder / BLOBS, blobs, undo)
            (_restore_sqlite if is_sqlite else _restore_postgresql)(settings.sql_url, folder, undo)
            upgrade(settings.sql_url)
            store = open_store(settings)
            undo.callback(store.close)
            queued = _settle(store, datetime.fromisoformat(facts["made_at"]))
        except CommandError as error:  # Alembic does not know the version of the tables
            raise BackupFailed(f"the backup was made by another version of ratchet, take that one: {error}") from error
        except shutil.Error as error:
            raise BackupFailed(f"the blobs could not be copied: {_reason(error)}") from error
        except OSError as error:
            raise BackupFailed(f"{settings.data_dir} cannot be written: {error.strerror or error}") from error
        except SQLAlchemyError as error:
            raise BackupFailed(f"the database cannot be written: {getattr(error, 'orig', error)}") from error
        undo.pop_all()
    store.close()
    return {**facts, "queued": queued}


def _copy_back(copy: Path, blobs: Path, undo: ExitStack) -> None:
    """Copy the backup's blobs into a folder of the one that they belong in, which may be a link or a mount point, and then move
    them up by renames: a restore that is killed leaves none that look whole, or no database that names them."""
    if not copy.is_dir():
        return
    if not blobs.exists():
        blobs.mkdir(parents=True)
        undo.callback(_remove, [blobs])
    coming = blobs / COMING
    undo.callback(shutil.rmtree, coming, ignore_errors=True)
    shutil.rmtree(coming, ignore_errors=True)  # of a restore that was killed
    shutil.copytree(copy, coming)
    _refuse_blobs(blobs)  # again: a service may have been started there meanwhile
    for folder in sorted(coming.iterdir()):
        ours = [blobs / path.relative_to(coming) for path in (folder, *folder.rglob("*"))]
        folder.rename(blobs / folder.name)
        undo.callback(_remove, ours)
    coming.rmdir()


def _refuse_blobs(blobs: Path) -> None:
    if blobs.exists() and any(path.name != COMING for path in blobs.iterdir()):
        raise BackupFailed(f"{blobs} is not empty; a restore takes a new data directory")


def _remove(paths: list[Path]) -> None:
    """Remove files and folders, except folders that hold others."""
    for path in sorted(paths, reverse=True):  # what is in a folder comes before it
        with suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink()


def _fill_bucket(settings: Settings, copy: Path) -> None:
    """Upload the backup's blobs, before anything else is written: it can be repeated. Raises BackupFailed if the bucket holds
    blobs of another database: the sweep of the restored one would delete them."""
    if settings.blob_url is None:
        return
    bucket = Bucket(settings.blob_url)
    files = (file.relative_to(copy).as_posix() for file in copy.rglob("*") if file.is_file())
    ours = {blob for file in files if (blob := blob_of(file))}
    _, others = bucket.blobs(ours)
    if others:
        raise BackupFailed(
            f"{settings.blob_url} holds {counted(len(others), 'blob')} that this backup does not know, such as {min(others)}; "
            "restore into another prefix (RATCHET_BLOB_URL), or the restored service would delete them"
        )
    for blob in sorted(ours):
        bucket.put(copy / blob, blob)


def _facts(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / FACTS).read_bytes())
    except FileNotFoundError:
        raise BackupFailed(f"{folder} is no finished backup: it has no {FACTS}") from None


def _check_sqlite(url: str, folder: Path) -> None:
    for path in _sqlite_files(Path(str(make_url(url).database))):
        if path.exists():
            raise _exists(path)
    if not (folder / SQLITE).exists():
        raise BackupFailed(f"{folder} holds no SQLite database; it restores into PostgreSQL (RATCHET_DATABASE_URL)")


def _restore_sqlite(url: str, folder: Path, undo: ExitStack) -> None:
    target = Path(str(make_url(url).database))
    target.parent.mkdir(parents=True, exist_ok=True)
    coming = target.with_suffix(".restoring")
    undo.callback(coming.unlink, missing_ok=True)
    shutil.copyfile(folder / SQLITE, coming)
    try:
        _appear(coming, target, undo)
    except FileExistsError:  # a service was started there while the blobs were copied
        raise _exists(target) from None
    coming.unlink()


def _sqlite_files(database: Path) -> list[Path]:
    return [database, *(database.with_name(database.name + end) for end in ("-wal", "-shm"))]


def _exists(path: Path) -> BackupFailed:
    return BackupFailed(f"{path} exists; a restore makes a new database")


def _appear(coming: Path, target: Path, undo: ExitStack) -> None:
    """Make a file appear under another name. Raises FileExistsError, and then what is there stays as it is."""

    def take_back() -> None:
        for path in _sqlite_files(target):
            path.unlink(missing_ok=True)

    try:
        os.link(coming, target)
        undo.callback(take_back)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        with target.open("xb") as made, coming.open("rb") as content:
            undo.callback(take_back)
            shutil.copyfileobj(content, made)


def _check_postgresql(url: str, folder: Path) -> None:
    """Before anything is written: that the tables are whole and the database is empty."""
    if not (folder / POSTGRESQL).exists():
        raise BackupFailed(f"{folder} holds no PostgreSQL tables; it restores into SQLite (no RATCHET_DATABASE_URL)")
    engine = make_engine(url)
    try:
        _refuse_tables(engine)
        with ZipFile(folder / POSTGRESQL) as archive:
            if damaged := archive.testzip():
                raise BadZipFile(damaged)
    except (BadZipFile, zlib.error) as error:
        raise BackupFailed(f"{folder / POSTGRESQL} is damaged: {error}") from error
    except OperationalError as error:
        raise BackupFailed(f"the database cannot be used ({error.orig}); make an empty one first") from error
    finally:
        engine.dispose()


def _refuse_tables(engine: Engine) -> None:
    if inspect(engine).get_table_names():
        raise BackupFailed("the database is not empty; a restore takes a new one")


def _restore_postgresql(url: str, folder: Path, undo: ExitStack) -> None:
    engine = make_engine(url)
    try:
        _refuse_tables(engine)  # again: a service may have been started there while the blobs were copied
        undo.callback(_empty, url)
        with ZipFile(folder / POSTGRESQL) as archive:
            upgrade(url, archive.read(REVISION).decode())
            with engine.begin() as connection:
                _speak_plainly(connection)
                for name in archive.namelist():  # in the order of writing: referenced tables come first
                    if name.endswith(CSV):
                        _copy_in(connection, archive, name)
    except psycopg.Error as error:
        raise BackupFailed(f"the tables could not be written: {error}") from error
    finally:
        engine.dispose()


def _empty(url: str) -> None:
    """Drop every table of a database that had none before this restore."""
    engine = make_engine(url)
    with suppress(SQLAlchemyError):
        tables = MetaData()
        tables.reflect(engine)
        tables.drop_all(engine)
    engine.dispose()


def _settle(store: Store, made_at: datetime) -> list[str]:
    """End the attempts of the old system's workers as of the time of the backup. Returns the ids of their jobs."""
    with store.begin() as session:
        workers.forget_all(session)
        settled: list[str] = []
        for job_id in jobs.held(session):
            job = jobs.find(session, job_id, lock=True, light=True)
            assert job is not None and job.status in HELD
            moves.end(session, job, Status.QUEUED, "restored", made_at)
            settled.append(job_id)
    return settled
