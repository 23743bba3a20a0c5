"""Datasets: rows that describe JSONL files in the blob store."""

from datetime import datetime

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from service.errors import Conflict
from service.states import FINAL
from service.store.deletable import Deletable
from service.store.tables import Dataset, Job

_rows = Deletable(Dataset)
get, hold, page, live_paths = _rows.get, _rows.hold, _rows.page, _rows.live_paths


def create(session: Session, dataset: Dataset) -> Dataset:
    session.add(dataset)
    session.flush()
    return dataset


def users(session: Session, dataset_id: str) -> list[str]:
    """Ids of unfinished jobs that read this dataset."""
    sources = [Job.spec[("data", part, "id")].as_string() for part in ("train", "eval")]
    query = select(Job.id).where(Job.status.not_in(FINAL), or_(*(source == dataset_id for source in sources)))
    return list(session.scalars(query.order_by(Job.id)))


def mark_deleted(session: Session, project: str, dataset_id: str, now: datetime) -> Dataset:
    """Mark it as deleted; the caller removes the file after the commit. Raises Conflict if an unfinished job reads it."""
    dataset = _rows.lock(session, project, dataset_id)
    if jobs := users(session, dataset_id):
        raise Conflict(f"dataset {dataset_id} is read by {', '.join(jobs)}; wait or cancel first", code="dataset_in_use")
    dataset.deleted_at = now
    session.flush()
    return dataset
