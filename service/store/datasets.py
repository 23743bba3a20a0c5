"""Datasets: rows about JSONL files in the blob store."""

from datetime import datetime

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from service.errors import Conflict, NotFound
from service.states import FINAL
from service.store.paging import newest_first
from service.store.tables import Dataset, Job


def create(session: Session, dataset: Dataset) -> Dataset:
    session.add(dataset)
    session.flush()
    return dataset


def get(session: Session, project: str, dataset_id: str) -> Dataset:
    """A dataset of this project that was not deleted; NotFound else."""
    dataset = session.get(Dataset, dataset_id)
    if dataset is None or dataset.project != project or dataset.deleted_at is not None:
        raise NotFound(f"no dataset {dataset_id} in this project")
    return dataset


def page(session: Session, project: str, *, after: str | None = None, limit: int = 20) -> tuple[list[Dataset], bool]:
    """Newest first. Answers the rows and whether there is more."""
    query = select(Dataset).where(Dataset.project == project, Dataset.deleted_at.is_(None))
    return newest_first(session, query, project, Dataset.created_at, Dataset.id, after=after, limit=limit)


def users(session: Session, dataset_id: str) -> list[str]:
    """Ids of jobs that have not ended and read this dataset."""
    sources = [Job.spec[("data", part, "id")].as_string() for part in ("train", "eval")]
    query = select(Job.id).where(Job.status.not_in(FINAL), or_(*(source == dataset_id for source in sources)))
    return list(session.scalars(query.order_by(Job.id)))


def mark_deleted(session: Session, project: str, dataset_id: str, now: datetime) -> Dataset:
    """The row says deleted; the caller removes the file after the commit. Raises Conflict for one that a live job reads."""
    session.execute(select(Dataset.id).where(Dataset.id == dataset_id).with_for_update())
    dataset = get(session, project, dataset_id)
    if jobs := users(session, dataset_id):
        raise Conflict(f"dataset {dataset_id} is read by {', '.join(jobs)}; wait or cancel first", code="dataset_in_use")
    dataset.deleted_at = now
    session.flush()
    return dataset


def hold(session: Session, project: str, dataset_id: str) -> Dataset:
    """The dataset, kept from being deleted until this transaction ends; NotFound when it is gone."""
    query = select(Dataset).where(Dataset.id == dataset_id).with_for_update(read=True)
    session.scalar(query.execution_options(populate_existing=True))
    return get(session, project, dataset_id)


def live_paths(session: Session) -> set[str]:
    return set(session.scalars(select(Dataset.path).where(Dataset.deleted_at.is_(None))))
