"""Queries over clients of the Tinker wire, their models and samplers, and over the checkpoints that those have by name."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import ColumnElement, Connection, Select, and_, bindparam, func, or_, select, update
from sqlalchemy.orm import Session

from service.errors import NotFound
from service.store.checkpoints import DELETED, named
from service.store.dialect import table_of
from service.store.tables import Checkpoint, TinkerModel, TinkerSampler, TinkerSession

Row = TypeVar("Row", TinkerSession, TinkerModel, TinkerSampler)

RESERVED = "_"  # names that a checkpoint's owner gives do not begin with it
EPHEMERAL = f"{RESERVED}sampler."  # of a checkpoint for one sampling client: lists do not show it
SEEN_EVERY = timedelta(seconds=5)  # a heartbeat is written at most so often
WORDS: Mapping[type[Any], str] = {TinkerSession: "session", TinkerModel: "training run", TinkerSampler: "sampler"}


@dataclass(frozen=True)
class Listed:
    """One page of a list, and how many there are in all."""

    rows: list[Any]
    total: int


def get(session: Session, kind: type[Row], project: str, row_id: str) -> Row:
    """A row of this project. Raises NotFound."""
    row = session.get(kind, row_id, populate_existing=True)
    if row is None or row.project != project:
        raise NotFound(f"no {WORDS[kind]} {row_id[:80]} in this project")
    return row


def find(session: Session, kind: type[Row], project: str, row_id: str) -> Row | None:
    row = session.get(kind, row_id, populate_existing=True)
    return row if row is not None and row.project == project else None


class Run(NamedTuple):
    """What most requests need to know of a training run."""

    id: str
    session_id: str
    job_id: str | None
    base_model: str


_RUN = select(*(table_of(TinkerModel).c[name] for name in Run._fields)).where(
    table_of(TinkerModel).c.id == bindparam("run"), table_of(TinkerModel).c.project == bindparam("of")
)


def run(connection: Connection, project: str, model_id: str) -> Run:
    """A training run of this project, read without the ORM: every step asks for it. Raises NotFound."""
    row = connection.execute(_RUN, {"run": model_id, "of": project}).first()
    if row is None:
        raise NotFound(f"no {WORDS[TinkerModel]} {model_id[:80]} in this project")
    return Run(*row)


def seen(session: Session, client: TinkerSession, now: datetime) -> None:
    if client.seen_at < now - SEEN_EVERY:
        client.seen_at = now


def silent(connection: Connection, job_ids: Collection[str], since: datetime) -> set[str]:
    """Which of these sessions belong to clients that were not heard of since then."""
    rows = connection.scalars(_SILENT, {"jobs": list(job_ids), "since": since})
    return {job_id for job_id in rows if job_id is not None}


_SILENT = (
    select(TinkerModel.job_id)
    .join(TinkerSession, TinkerSession.id == TinkerModel.session_id)
    .where(TinkerModel.job_id.in_(bindparam("jobs", expanding=True)), TinkerSession.seen_at < bindparam("since"))
)


def finish(session: Session, client_id: str, how: dict[str, Any], now: datetime) -> bool:
    """Mark it as finished. False if it was before: the first reason stays."""
    unfinished = (TinkerSession.id == client_id, TinkerSession.finished_at.is_(None))
    marked = update(TinkerSession).where(*unfinished).values(finished_at=now, finish=how).returning(TinkerSession.id)
    return session.scalar(marked, execution_options={"synchronize_session": False}) is not None


def models_of(session: Session, client_id: str) -> list[TinkerModel]:
    query = select(TinkerModel).where(TinkerModel.session_id == client_id)
    return list(session.scalars(query.order_by(TinkerModel.created_at, TinkerModel.id)))


def samplers_of(session: Session, client_id: str) -> list[TinkerSampler]:
    query = select(TinkerSampler).where(TinkerSampler.session_id == client_id)
    return list(session.scalars(query.order_by(TinkerSampler.created_at, TinkerSampler.id)))


def model_of_job(session: Session, job_id: str) -> TinkerModel | None:
    return session.scalar(select(TinkerModel).where(TinkerModel.job_id == job_id))


def listed(session: Session, kind: type[Row], project: str, *where: Any, offset: int, limit: int) -> Listed:
    """Rows of this project, the newest first."""
    return _page(session, select(kind).where(kind.project == project, *where), kind, offset, limit)


def _page(session: Session, query: Select[Any], kind: Any, offset: int, limit: int) -> Listed:
    total = session.scalar(select(func.count()).select_from(query.subquery())) or 0
    rows = session.scalars(query.order_by(kind.created_at.desc(), kind.id.desc()).offset(offset).limit(limit))
    return Listed(list(rows), total)


# ---------------------------------------------------------------- checkpoints


def _shown(*models: ColumnElement[bool]) -> Select[Any]:
    """The checkpoints of these models that have a name of their owner's and are not deleted. A copy has one, and no job."""
    trained = select(TinkerModel.job_id).where(TinkerModel.job_id.is_not(None), *models)
    copied = select(TinkerModel.checkpoint_id).where(TinkerModel.checkpoint_id.is_not(None), *models)
    theirs = and_(Checkpoint.job_id.in_(trained), func.substr(Checkpoint.name, 1, len(EPHEMERAL)) != EPHEMERAL)
    query = select(Checkpoint).where(or_(theirs, Checkpoint.id.in_(copied)))
    return query.where(Checkpoint.deleted_at.is_(None), Checkpoint.name != DELETED)  # nor without a name


def checkpoints_of(session: Session, model: TinkerModel) -> list[Checkpoint]:
    """The model's named checkpoints, the newest first."""
    query = _shown(TinkerModel.id == model.id)
    return list(session.scalars(query.order_by(Checkpoint.created_at.desc(), Checkpoint.id.desc())))


def checkpoints_of_project(session: Session, project: str, *, offset: int, limit: int) -> Listed:
    """Named checkpoints of all models of a project, the newest first."""
    return _page(session, _shown(TinkerModel.project == project), Checkpoint, offset, limit)


def models_with(session: Session, rows: Sequence[Checkpoint]) -> dict[str, TinkerModel]:
    """The model of each of these checkpoints, by its id."""
    trained, copied = {row.job_id for row in rows if row.job_id}, [row.id for row in rows if not row.job_id]
    query = select(TinkerModel).where(or_(TinkerModel.job_id.in_(trained), TinkerModel.checkpoint_id.in_(copied)))
    models = {model.job_id or model.checkpoint_id: model for model in session.scalars(query)}
    return {row.id: models[row.job_id or row.id] for row in rows}


def checkpoint_named(session: Session, model: TinkerModel, purpose: Any, name: str) -> Checkpoint | None:
    """The model's checkpoint of this name that is not deleted, or None."""
    if model.job_id is not None:
        return named(session, model.job_id, purpose, name)
    return next((row for row in checkpoints_of(session, model) if (row.purpose, row.name) == (purpose, name)), None)


def named_count(session: Session, client_id: str) -> tuple[int, int]:
    """How many named checkpoints a client's models have, and their bytes."""
    found = _shown(TinkerModel.session_id == client_id).subquery()
    count, size = session.execute(select(func.count(), func.coalesce(func.sum(found.c.size_bytes), 0))).one()
    return count, int(size)
