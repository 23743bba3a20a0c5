import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from threading import Thread
from traceback import format_exception
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError
from sqlalchemy import Connection, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, StatementError

from service.ids import utcnow
from service.settings import Settings
from service.store import events, jobs, keys
from service.store.session import Store, make_engine
from service.store.tables import ApiKey, Event, Job, Worker

NewJob = Callable[..., Job]


def test_a_block_that_raises_leaves_nothing_behind(store: Store) -> None:
    def act() -> None:
        with store.begin() as session:
            keys.create(session, project="p", name="n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        act()
    with store.begin(readonly=True) as session:
        assert keys.page(session, "p") == []


def test_rows_can_be_read_after_the_transaction(store: Store) -> None:
    with store.begin() as session:
        key, text = keys.create(session, project="p", name="n")
    assert (key.name, key.ends_with) == ("n", text[-4:])


def test_a_readonly_transaction_refuses_writes(store: Store) -> None:
    with pytest.raises(DBAPIError), store.begin(readonly=True) as session:
        keys.create(session, project="p", name="n")
    with store.begin() as session:  # and the connection is not spoilt for others
        keys.create(session, project="p", name="n")


def test_times_come_back_aware_and_in_utc(store: Store, new_job: NewJob) -> None:
    job = new_job()
    eastern = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=timezone(timedelta(hours=5)))
    with store.begin() as session:
        session.execute(update(Job).where(Job.id == job.id).values(not_before=eastern))
    with store.begin(readonly=True) as session:
        found = jobs.get(session, "default", job.id).not_before
    assert found == eastern
    assert found is not None
    assert found.utcoffset() == timedelta(0)


def test_naive_times_are_refused(store: Store, new_job: NewJob) -> None:
    job = new_job()
    with pytest.raises(StatementError, match="naive datetime"), store.begin() as session:
        session.execute(update(Job).where(Job.id == job.id).values(not_before=utcnow().replace(tzinfo=None)))


def test_events_of_an_unknown_job_cannot_exist(store: Store) -> None:
    with pytest.raises(IntegrityError), store.begin() as session:
        session.add(Event(job_id="job_none", seq=1, type="x", data={}, created_at=utcnow()))


def test_deleting_a_job_takes_its_events(store: Store, new_job: NewJob) -> None:
    job = new_job()
    with store.begin() as session:
        assert len(events.after(session, job.id, 0)) == 2
        jobs.remove(session, job.id)
    with store.begin(readonly=True) as session:
        assert events.after(session, job.id, 0) == []


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_sqlite_writers_queue_and_readers_do_not_wait(store: Store) -> None:
    order: list[str] = []

    def write() -> None:
        with store.begin() as session:
            keys.create(session, project="p", name="b")
            order.append("second writer")

    with store.begin() as session:
        keys.create(session, project="p", name="a")
        second = Thread(target=write)
        second.start()
        started = time.monotonic()
        with store.begin(readonly=True) as reading:
            assert reading.scalars(select(ApiKey)).all() == []
        assert time.monotonic() - started < 1
        time.sleep(0.2)
        order.append("first writer")
    second.join()
    assert order == ["first writer", "second writer"]


def test_only_the_transaction_that_says_so_does_not_wait_for_the_disk(store: Store) -> None:
    asked, waits, does_not = "PRAGMA synchronous", 2, 1
    if store.engine.dialect.name == "postgresql":
        with store.look() as connection:
            asked = "SHOW synchronous_commit"
            waits = does_not = connection.exec_driver_sql(asked).scalar()  # as the server is set
    with store.write(synced=False) as connection:
        assert connection.exec_driver_sql(asked).scalar() == does_not
    with store.write() as connection:  # of the same pool
        assert connection.exec_driver_sql(asked).scalar() == waits
    with store.begin() as session:
        assert session.connection().exec_driver_sql(asked).scalar() == waits


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_postgres_ends_a_transaction_whose_client_is_frozen_before_a_lease_ends(store: Store, settings: Settings) -> None:
    """Else its row would stay locked, and every reconciler would wait for it, with all other jobs."""
    shown = "SELECT extract(epoch FROM current_setting('idle_in_transaction_session_timeout')::interval)"
    with store.begin(readonly=True) as session:
        assert 0 < session.execute(text(shown)).scalar_one() < settings.lease_self_stop_s


def test_other_databases_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sqlite:/// or postgresql\+psycopg://"):
        make_engine("mysql://x/y")


@pytest.mark.parametrize("url", ["", "foo", "mysql://u:planted@x/y", "postgresql://", "//:planted@"])
def test_a_database_url_that_names_none_is_refused_with_the_settings(url: str) -> None:
    """Before anything is opened, and without the value: it may hold a password."""
    with pytest.raises(
        ValidationError, match=r"must be postgresql\+psycopg://USER:PASSWORD@HOST/NAME or sqlite:///FILE"
    ) as refused:
        Settings(database_url=SecretStr(url))
    assert "planted" not in str(refused.value)


@pytest.mark.parametrize("kind", ["not null", "taken", "unknown"])
def test_what_was_to_be_stored_stands_in_no_error(store: Store, new_job: NewJob, kind: str) -> None:
    """PostgreSQL adds whole rows to its messages, SQLAlchemy the parameters of a statement."""
    job = new_job()
    said = {"type": "PLANTED-1", "data": {"note": "PLANTED-2"}, "created_at": utcnow()}
    statement = {
        "not null": insert(Worker).values(id="w", host="PLANTED-1", pid=1, device="PLANTED-2", resource_classes=["PLANTED-3"]),
        "taken": insert(Event).values(job_id=job.id, seq=1, **said),
        "unknown": insert(Event).values(job_id="job_PLANTED", seq=1, **said),
    }[kind]
    with pytest.raises(IntegrityError) as broken, store.begin() as session:
        session.execute(statement)
    text = "".join(format_exception(broken.value))
    assert "PLANTED" not in text
    assert ("workers" if kind == "not null" else "events") in text  # it still says what it was about


def test_a_lost_connection_hides_no_error(store: Store) -> None:
    def lose(begin: Callable[[], Any]) -> None:
        with begin() as opened:
            (opened if isinstance(opened, Connection) else opened.connection()).invalidate()
            raise ConnectionError("lost")

    for begin in (store.write, store.begin):
        with pytest.raises(ConnectionError, match="lost"):
            lose(begin)
    assert store.now()
