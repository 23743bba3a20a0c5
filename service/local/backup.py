"""A copy of a live system: the SQL store as of one moment, and every blob that it names. And starting again from it.

Blobs never change: they appear by a rename before the row that names them, and go after the row says that they are deleted.
So blobs are copied first, then the SQL store in one snapshot, then the blobs that came in between. Retention may have removed
some of those meanwhile; then the snapshot is taken anew, until nothing that it names is missing. Each round has only to
copy what is new, so the last ones are short.
"""

import json
import logging
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import inspect, make_url, text
from sqlalchemy.exc import OperationalError

from service.errors import RatchetError
from service.ids import utcnow
from service.jobs import moves
from service.jobs.state import HELD, Status
from service.settings import Settings
from service.store import checkpoints, datasets, jobs, workers
from service.store.blobs import Blobs
from service.store.session import Store, make_engine, open_store, upgrade

log = logging.getLogger(__name__)

FACTS, BLOBS, SQLITE, POSTGRESQL = "backup.json", "blobs", "ratchet.db", "ratchet.dump"
ROUNDS = 20
NAMED = "SELECT path FROM checkpoints WHERE deleted_at IS NULL UNION SELECT path FROM datasets WHERE deleted_at IS NULL"


class BackupFailed(RatchetError):
    code = "backup_failed"


# ---------------------------------------------------------------- copying


def backup(settings: Settings, folder: Path) -> dict[str, Any]:
    """Copy everything into a new folder. Returns what backup.json says. Raises BackupFailed, and the folder is no backup."""
    if folder.exists() and any(folder.iterdir()):
        raise BackupFailed(f"{folder} is not empty; a backup takes a new folder")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    store = open_store(settings)
    try:
        return _backup(store, settings, folder)
    finally:
        store.close()


def _backup(store: Store, settings: Settings, folder: Path) -> dict[str, Any]:
    copy = Blobs(folder / BLOBS)
    snapshot = _snapshot_sqlite if make_url(settings.sql_url).get_backend_name() == "sqlite" else _snapshot_postgresql
    for number in range(1, ROUNDS + 1):
        _copy_blobs(store.blobs, copy, live_paths(store))
        made_at = utcnow()
        named = snapshot(settings.sql_url, folder)
        _copy_blobs(store.blobs, copy, named)
        missing = {path for path in named if not copy.path(path).exists()}
        lost = missing & live_paths(store)  # named here and now, and not there: not removed meanwhile, but lost before
        if missing == lost:
            break
        log.info("round %d: %d blobs were removed while they were copied", number, len(missing - lost))
    else:
        raise BackupFailed(f"checkpoints are removed faster than they are copied: tried {ROUNDS} times")
    for path in copy.unclaimed(named):
        copy.delete(path)
    facts = {"made_at": made_at.isoformat(), "blobs": len(named - lost), "lost": sorted(lost), "rounds": number}
    _write(folder / FACTS, json.dumps(facts, indent=2).encode())
    return facts


def live_paths(store: Store) -> set[str]:
    with store.begin(readonly=True) as session:
        return checkpoints.live_paths(session) | datasets.live_paths(session)


def _copy_blobs(source: Blobs, copy: Blobs, paths: set[str]) -> None:
    """Each as a whole or not at all; those that are there already, and those that are gone, are passed over."""
    for path in sorted(paths):
        if copy.path(path).exists():
            continue
        folder = copy.temporary_dir()
        try:
            if source.path(path).is_dir():
                shutil.copytree(source.path(path), folder / "blob")
                copy.commit_dir(folder / "blob", path)
            else:
                shutil.copyfile(source.path(path), folder / "blob")
                copy.commit_file(folder / "blob", path)
        except (FileNotFoundError, shutil.Error):  # removed meanwhile; copytree collects what it misses
            log.debug("%s is gone", path)
        finally:
            copy.discard(folder)


def _snapshot_sqlite(url: str, folder: Path) -> set[str]:
    """SQLite's own online backup: one moment, without stopping writers. Returns the blobs that it names."""
    target = folder / f"{SQLITE}.tmp"
    target.unlink(missing_ok=True)
    with closing(sqlite3.connect(str(make_url(url).database), timeout=60)) as live, closing(sqlite3.connect(target)) as copy:
        live.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")  # one file, without a log beside it
        named = {row[0] for row in copy.execute(NAMED)}
    target.rename(folder / SQLITE)
    return named


def _snapshot_postgresql(url: str, folder: Path) -> set[str]:
    """pg_dump, in the same snapshot in which the names are read."""
    engine = make_engine(url)
    try:
        with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection, connection.begin():
            snapshot = connection.scalar(text("SELECT pg_export_snapshot()"))
            named = set(connection.scalars(text(NAMED)))
            target = folder / f"{POSTGRESQL}.tmp"
            _run("pg_dump", url, "--format=custom", "--no-owner", f"--snapshot={snapshot}", f"--file={target}")
    finally:
        engine.dispose()
    target.rename(folder / POSTGRESQL)
    return named


def _run(program: str, url: str, *arguments: str) -> None:
    """A client program of PostgreSQL. The password goes through the environment, where other users do not see it."""
    parsed = make_url(url)
    plain = parsed.set(drivername="postgresql", password=None).render_as_string(hide_password=False)
    environment = {**os.environ, **({"PGPASSWORD": str(parsed.password)} if parsed.password is not None else {})}
    try:
        done = subprocess.run(
            [program, *arguments, f"--dbname={plain}"], env=environment, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise BackupFailed(f"{program} is not on the PATH; it comes with PostgreSQL's client tools") from None
    if done.returncode:
        raise BackupFailed(f"{program} failed: {done.stderr.strip()[-1000:]}")


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------- starting again


def restore(settings: Settings, folder: Path) -> dict[str, Any]:
    """Put a backup where these settings point: an empty database and a data directory without blobs.

    Jobs that ran when it was made are queued, as of that moment; a worker takes them up at their last checkpoint. Returns
    what backup.json says, and the ids of those jobs.
    """
    facts = _facts(folder)
    blobs = settings.blobs_dir
    if blobs.exists() and any(blobs.iterdir()):
        raise BackupFailed(f"{blobs} is not empty; a restore takes a new data directory")
    restore_sql: dict[bool, Callable[[str, Path], None]] = {True: _restore_sqlite, False: _restore_postgresql}
    restore_sql[make_url(settings.sql_url).get_backend_name() == "sqlite"](settings.sql_url, folder)
    if (folder / BLOBS).is_dir():
        shutil.copytree(folder / BLOBS, blobs, dirs_exist_ok=True)
    upgrade(settings.sql_url)
    store = open_store(settings)
    try:
        return {**facts, "queued": _settle(store, datetime.fromisoformat(facts["made_at"]))}
    finally:
        store.close()


def _facts(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / FACTS).read_bytes())
    except FileNotFoundError:
        raise BackupFailed(f"{folder} is no finished backup: it has no {FACTS}") from None


def _restore_sqlite(url: str, folder: Path) -> None:
    target = Path(str(make_url(url).database))
    if target.exists():
        raise BackupFailed(f"{target} exists; a restore makes a new database")
    if not (folder / SQLITE).exists():
        raise BackupFailed(f"{folder} holds no SQLite database; it restores into PostgreSQL (RATCHET_DATABASE_URL)")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / SQLITE, target.with_suffix(".restoring"))
    target.with_suffix(".restoring").rename(target)


def _restore_postgresql(url: str, folder: Path) -> None:
    if not (folder / POSTGRESQL).exists():
        raise BackupFailed(f"{folder} holds no PostgreSQL dump; it restores into SQLite (no RATCHET_DATABASE_URL)")
    engine = make_engine(url)
    try:
        tables = inspect(engine).get_table_names()
    except OperationalError as error:
        raise BackupFailed(f"the database cannot be used ({error.orig}); make an empty one first") from error
    finally:
        engine.dispose()
    if tables:
        raise BackupFailed("the database is not empty; a restore takes a new one")
    _run("pg_restore", url, "--no-owner", "--exit-on-error", "--single-transaction", str(folder / POSTGRESQL))


def _settle(store: Store, made_at: datetime) -> list[str]:
    """No worker of the old system works for this one; its attempts ended when the copy was made."""
    with store.begin() as session:
        workers.forget_all(session)
        settled: list[str] = []
        for job_id in jobs.held(session):
            job = jobs.find(session, job_id, lock=True, light=True)
            assert job is not None and job.status in HELD
            moves.end(session, job, Status.QUEUED, "restored", made_at)
            settled.append(job_id)
    return settled
