"""Workers, each as it last reported."""

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from service.store.tables import Worker

ALIVE_WITHIN = timedelta(seconds=60)  # a worker seen within this time counts as alive
KEPT_FOR = timedelta(days=1)


def hello(session: Session, worker: Worker) -> None:
    """A worker has started, or started again under the same id."""
    session.merge(worker)
    session.flush()


def seen(session: Session, worker: Worker) -> None:
    """Note a sign of life. If the worker has no row (the store was away when it started, or it was away for a day), add it.

    A drain that is already set in the row stays set.
    """
    values: dict[str, Any] = {"last_seen_at": worker.last_seen_at, "memory": worker.memory}
    values |= {"draining": True} if worker.draining else {}
    living = update(Worker).where(Worker.id == worker.id).values(values)
    if session.scalar(living.returning(Worker.id), execution_options={"synchronize_session": False}) is None:
        hello(session, worker)


def set_draining(session: Session, worker_id: str) -> None:
    session.execute(update(Worker).where(Worker.id == worker_id).values(draining=True))


def is_draining(session: Session, worker_id: str) -> bool:
    return bool(session.scalar(select(Worker.draining).where(Worker.id == worker_id)))


def alive(session: Session, now: datetime) -> list[Worker]:
    """Workers that count as alive, draining ones too."""
    return list(session.scalars(select(Worker).where(Worker.last_seen_at >= now - ALIVE_WITHIN).order_by(Worker.id)))


def forget(session: Session, now: datetime) -> None:
    """Remove the rows of workers that are long gone."""
    session.execute(delete(Worker).where(Worker.last_seen_at < now - KEPT_FOR))


def forget_all(session: Session) -> None:
    session.execute(delete(Worker))


def goodbye(session: Session, worker_id: str) -> None:
    session.execute(delete(Worker).where(Worker.id == worker_id))
