"""Checkpoints: rows about folders in the blob store. A deleted one keeps its row for a while; its folder goes."""

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from service.errors import Conflict, NotFound
from service.store.jobs import FINAL
from service.store.paging import newest_first
from service.store.tables import Checkpoint, Job


@dataclass(frozen=True)
class CheckpointRow:
    """A checkpoint as a worker hands it in, its folder already committed to the blob store at `path`."""

    id: str
    step: int
    adapter: str  # lora | full
    model: dict[str, Any]
    path: str
    size_bytes: int
    manifest_sha256: str
    metrics: dict[str, Any]
    has_optimizer: bool
    is_final: bool


def create(session: Session, row: CheckpointRow, *, project: str, job_id: str, attempt: int, now: datetime) -> Checkpoint:
    checkpoint = Checkpoint(**asdict(row), project=project, job_id=job_id, attempt=attempt, created_at=now)
    session.add(checkpoint)
    session.flush()
    return checkpoint


def get(session: Session, project: str, checkpoint_id: str) -> Checkpoint:
    """A checkpoint of this project that was not deleted; NotFound else."""
    checkpoint = session.get(Checkpoint, checkpoint_id)
    if checkpoint is None or checkpoint.project != project or checkpoint.deleted_at is not None:
        raise NotFound(f"no checkpoint {checkpoint_id} in this project")
    return checkpoint


def page(
    session: Session, project: str, *, job_id: str | None = None, after: str | None = None, limit: int = 20
) -> tuple[list[Checkpoint], bool]:
    """Newest first, of one job or of the project. Answers the rows and whether there is more."""
    query = select(Checkpoint).where(Checkpoint.project == project, Checkpoint.deleted_at.is_(None))
    if job_id is not None:
        query = query.where(Checkpoint.job_id == job_id)
    return newest_first(session, query, project, Checkpoint.created_at, Checkpoint.id, after=after, limit=limit)


def of_job(session: Session, job_id: str) -> list[Checkpoint]:
    """All that are there, the newest first: what a resume tries in turn, should one turn out to be broken."""
    query = select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.deleted_at.is_(None))
    return list(session.scalars(query.order_by(Checkpoint.created_at.desc(), Checkpoint.id.desc())))


def needed(session: Session, checkpoint_ids: list[str]) -> set[str]:
    """Those from which a job that has not ended resumes, or starts."""
    query = select(Job.checkpoint_id, Job.from_checkpoint_id).where(
        Job.status.not_in(FINAL), or_(Job.checkpoint_id.in_(checkpoint_ids), Job.from_checkpoint_id.in_(checkpoint_ids))
    )
    return {one for pair in session.execute(query) for one in pair if one is not None}.intersection(checkpoint_ids)


def mark_deleted(session: Session, project: str, checkpoint_id: str, now: datetime) -> Checkpoint:
    """The row says deleted; the caller removes the folder after the commit. Raises Conflict for one that a live job needs."""
    # The lock makes a job that is just being created from this checkpoint wait, and then see that it is gone.
    session.execute(select(Checkpoint.id).where(Checkpoint.id == checkpoint_id).with_for_update())
    checkpoint = get(session, project, checkpoint_id)
    if needed(session, [checkpoint_id]):
        raise Conflict(f"checkpoint {checkpoint_id} is needed by a job that has not ended", code="checkpoint_in_use")
    checkpoint.deleted_at = now
    session.flush()
    return checkpoint


def hold(session: Session, project: str, checkpoint_id: str) -> Checkpoint:
    """The checkpoint, kept from being deleted until this transaction ends; NotFound when it is gone."""
    query = select(Checkpoint).where(Checkpoint.id == checkpoint_id).with_for_update(read=True)
    session.scalar(query.execution_options(populate_existing=True))
    return get(session, project, checkpoint_id)


def live_paths(session: Session) -> set[str]:
    return set(session.scalars(select(Checkpoint.path).where(Checkpoint.deleted_at.is_(None))))
