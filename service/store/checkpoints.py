"""Checkpoints: rows that describe folders in the blob store. A deleted one loses its folder and keeps its row."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import case, or_, select
from sqlalchemy.orm import Session

from service.errors import Conflict, NotFound
from service.states import FINAL
from service.store import clock
from service.store.deletable import Deletable
from service.store.jobs import find
from service.store.tables import Alias, Checkpoint, Job

_rows = Deletable(Checkpoint)
get, hold, live_paths = _rows.get, _rows.hold, _rows.live_paths

# The order within a job, without any clock: an attempt continues from earlier ones, and a final checkpoint ends its step.
FURTHEST_FIRST = (Checkpoint.attempt.desc(), Checkpoint.step.desc(), Checkpoint.is_final.desc(), Checkpoint.id.desc())

Purpose = Literal["training", "sampler"]  # training: with the optimizer's state, so that training can go on from it
Kept = Literal["in_use", "pinned", "aliased"]  # why a checkpoint may not be deleted
DELETED = "(deleted)"  # in place of the name of one that is deleted as soon as no job needs it; nothing can be saved under it


@dataclass(frozen=True)
class CheckpointRow:
    """A checkpoint as a worker reports it. Its folder is already committed to the blob store at `path`."""

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
    name: str | None = None  # given by a session's owner
    purpose: Purpose = "training"
    user_metadata: dict[str, Any] | None = None
    ttl_s: float | None = None  # None: as the job's spec says


def create(session: Session, row: CheckpointRow, *, project: str, job_id: str, attempt: int, now: datetime) -> Checkpoint:
    columns = asdict(row)
    ttl_s = columns.pop("ttl_s")
    if ttl_s is None and row.name is None:
        ttl_s = session.scalar(select(Job.spec[("checkpoints", "ttl_s")].as_float()).where(Job.id == job_id))
    expires_at = None if ttl_s is None else now + timedelta(seconds=ttl_s)
    whose = {"project": project, "job_id": job_id, "attempt": attempt}
    checkpoint = Checkpoint(**columns, **whose, created_at=now, expires_at=expires_at)
    session.add(checkpoint)
    session.flush()
    return checkpoint


def page(
    session: Session, project: str, *, job_id: str | None = None, after: str | None = None, limit: int = 20
) -> tuple[list[Checkpoint], bool]:
    """Checkpoints of one job or of the project, newest first. Returns the rows and whether there are more."""
    of_one = () if job_id is None else (Checkpoint.job_id == job_id,)
    return _rows.page(session, project, *of_one, after=after, limit=limit)


def by_id(session: Session, ids: Sequence[str | None]) -> dict[str, Checkpoint]:
    """Those of these, deleted ones too, by their ids."""
    return {row.id: row for row in session.scalars(select(Checkpoint).where(Checkpoint.id.in_(ids)))}


def of_job(session: Session, job_id: str) -> list[Checkpoint]:
    """The job's checkpoints with an optimizer's state that are not deleted, the furthest first. A resume tries them in this
    order if some are broken."""
    query = select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.purpose == "training", _rows.there)
    return list(session.scalars(query.order_by(*FURTHEST_FIRST)))


def newest(session: Session, job_id: str) -> Checkpoint | None:
    """The job's furthest checkpoint of any purpose that is not deleted, or None."""
    query = select(Checkpoint).where(Checkpoint.job_id == job_id, _rows.there).order_by(*FURTHEST_FIRST).limit(1)
    return session.scalar(query)


def named(session: Session, job_id: str, purpose: Purpose, name: str) -> Checkpoint | None:
    """A session's checkpoint of this name that is not deleted, or None."""
    query = select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.purpose == purpose, Checkpoint.name == name)
    return session.scalar(query.where(_rows.there).order_by(Checkpoint.created_at.desc(), Checkpoint.id.desc()).limit(1))


def needed(session: Session, checkpoint_ids: list[str]) -> set[str]:
    """Those of these checkpoints from which an unfinished job resumes or starts."""
    query = select(Job.checkpoint_id, Job.from_checkpoint_id).where(
        Job.status.not_in(FINAL), or_(Job.checkpoint_id.in_(checkpoint_ids), Job.from_checkpoint_id.in_(checkpoint_ids))
    )
    return {
        checkpoint_id for pair in session.execute(query) for checkpoint_id in pair if checkpoint_id is not None
    }.intersection(checkpoint_ids)


def mark_deleted(session: Session, project: str, checkpoint_id: str, now: datetime) -> Checkpoint:
    """Mark it as deleted; the caller removes the folder after the commit. Raises NotFound, and Conflict if it may not go."""
    get(session, project, checkpoint_id)
    removed, kept = remove(session, [checkpoint_id], now, by_hand=True)
    if kept.get(checkpoint_id) == "in_use":
        raise Conflict(f"checkpoint {checkpoint_id} is needed by a job that has not ended", code="checkpoint_in_use")
    if kept.get(checkpoint_id) == "pinned":
        raise Conflict(f"checkpoint {checkpoint_id} is pinned", code="checkpoint_pinned", hint="unpin it first")
    if kept.get(checkpoint_id) == "aliased":
        names = aliases(session, [checkpoint_id]).get(checkpoint_id, [])
        raise Conflict(
            f"checkpoint {checkpoint_id} is what {' and '.join(names)} {'points' if len(names) == 1 else 'point'} at",
            code="checkpoint_aliased",
            hint="promote another checkpoint, or delete the alias",
            aliases=names,
        )
    if not removed:
        raise NotFound(f"no checkpoint {checkpoint_id} in this project")
    return removed[0]


def remove(
    session: Session, checkpoint_ids: list[str], now: datetime, *, by_hand: bool = False
) -> tuple[list[Checkpoint], dict[str, Kept]]:
    """Mark those as deleted that are not needed, pinned or promoted. Returns their rows, and by id why the others stay.

    Unless `by_hand`, those stay, too, that a rollback of an alias would promote.
    The caller removes the folders after the commit. The rows are locked: a job that is being created from one of them waits,
    and then sees that it is gone.
    """
    locked = select(Checkpoint).where(Checkpoint.id.in_(checkpoint_ids), _rows.there)
    locked = locked.order_by(Checkpoint.id).with_for_update().execution_options(populate_existing=True)
    rows = list(session.scalars(locked))
    kept = spared(session, rows, by_hand=by_hand)
    removed = [row for row in rows if row.id not in kept]
    for row in removed:
        row.deleted_at = now
    session.flush()
    return removed, kept


def spared(session: Session, rows: Sequence[Checkpoint], *, by_hand: bool = False) -> dict[str, Kept]:
    """Which of these may not be deleted, and why. `by_hand`: those that a rollback would promote may be."""
    ids = [row.id for row in rows]
    kept: dict[str, Kept] = dict.fromkeys(needed(session, ids), "in_use")
    for row in rows:
        if row.pinned_at is not None:
            kept[row.id] = "pinned"
    for row_id in aliases(session, ids, previous=not by_hand):
        kept[row_id] = "aliased"
    return kept


def aliases(session: Session, checkpoint_ids: Sequence[str], *, previous: bool = False) -> dict[str, list[str]]:
    """By checkpoint the aliases that point at it; `previous`: those, too, that would after a rollback."""
    found: dict[str, list[str]] = {}
    for column in (Alias.checkpoint_id, *([Alias.previous_id] if previous else [])):
        query = select(column, Alias.name).where(column.in_(checkpoint_ids)).order_by(Alias.name)
        for checkpoint_id, name in session.execute(query):
            found.setdefault(str(checkpoint_id), []).append(name)
    return found


def is_over(session: Session, row: Checkpoint) -> bool:
    """It was deleted, or its time is over, and it stays only as long as what uses it: nothing more may begin with it."""
    if row.name != DELETED and (row.expires_at is None or row.expires_at > clock.now(session)):
        return False
    return spared(session, [row]).get(row.id) not in ("pinned", "aliased")


def unname(row: Checkpoint, now: datetime) -> None:
    """Its name is free from now on. It stays until no job needs it and it is neither pinned nor promoted. It is none of the
    session's own snapshots, on which a replay may rely."""
    row.name, row.expires_at = DELETED, now


def pin(session: Session, project: str, checkpoint_id: str, pinned_at: datetime | None) -> Checkpoint:
    """Pin it, so that nothing deletes it; `pinned_at=None` unpins it. Raises NotFound if it is gone."""
    checkpoint = _rows.lock(session, project, checkpoint_id)
    checkpoint.pinned_at = pinned_at if checkpoint.pinned_at is None or pinned_at is None else checkpoint.pinned_at
    session.flush()
    return checkpoint


def chosen(
    session: Session,
    project: str,
    *,
    ids: Sequence[str] | None = None,
    job_id: str | None = None,
    created_before: datetime | None = None,
    keep_last: int = 0,
    final: bool = False,
    limit: int,
) -> tuple[list[Checkpoint], bool]:
    """At most `limit` checkpoints to delete, the oldest first, and whether there are more.

    It spares the furthest `keep_last` of each job, and final checkpoints unless `final`. The checkpoints of all deleted jobs
    count as one job, of which it spares the newest `keep_last`.
    """
    query = select(Checkpoint).where(Checkpoint.project == project, _rows.there)
    if job_id is not None:
        query = query.where(Checkpoint.job_id == job_id)
    seen = Counter[str | None]()
    rows: list[Checkpoint] = []
    of_no_job = case((Checkpoint.job_id.is_(None), Checkpoint.created_at)).desc()
    for row in session.scalars(query.order_by(Checkpoint.job_id, of_no_job, *FURTHEST_FIRST)):
        seen[row.job_id] += 1
        asked = (ids is None or row.id in ids) and (created_before is None or row.created_at < created_before)
        if asked and seen[row.job_id] > keep_last and (final or not row.is_final):
            rows.append(row)
    rows.sort(key=lambda row: (row.created_at, row.id))
    return rows[:limit], len(rows) > limit


def expired(session: Session, now: datetime, limit: int = 100) -> list[str]:
    """Ids of expired checkpoints that are neither pinned nor promoted, and that have a name or that no unfinished job but a
    sampler needs."""
    live = select(Job.id).where(
        Job.status.not_in(FINAL),
        Job.kind != "sampler",
        or_(Job.checkpoint_id == Checkpoint.id, Job.from_checkpoint_id == Checkpoint.id),
    )
    query = select(Checkpoint.id).where(Checkpoint.expires_at < now, _rows.there)
    promoted = (select(Alias.name).where(column == Checkpoint.id) for column in (Alias.checkpoint_id, Alias.previous_id))
    query = query.where(Checkpoint.pinned_at.is_(None), *(~each.exists() for each in promoted))
    query = query.where(or_(~live.exists(), Checkpoint.name != DELETED))
    return list(session.scalars(query.order_by(Checkpoint.expires_at).limit(limit)))


def lineage(session: Session, project: str, checkpoint_id: str) -> list[tuple[Checkpoint, Job | None]]:
    """The checkpoint, the one that its job started from, and so on back to a job that started from a base model.

    Deleted checkpoints are included, for their rows remain. A deleted job is None.
    """
    chain: dict[str, tuple[Checkpoint, Job | None]] = {}
    row: Checkpoint | None = get(session, project, checkpoint_id)
    while row is not None and row.project == project and row.id not in chain:
        job = None if row.job_id is None else find(session, row.job_id, light=True)
        chain[row.id] = (row, job)
        start = row.model.get("from_checkpoint")
        row = None if not start else session.get(Checkpoint, start["id"])
    return list(chain.values())
