"""Checkpoints: listed, read, downloaded, deleted."""

from datetime import datetime, timedelta
from typing import Annotated, Any, Literal, Self

from fastapi import Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sqlalchemy.orm import Session

from service.api.archive import archive_of
from service.edge import audit
from service.edge.auth import CallerDep
from service.edge.bodies import DocumentDep, documented
from service.edge.context import ContextDep
from service.edge.pages import Page, PageQuery
from service.edge.problems import BODY, files_missing, responses
from service.edge.router import Router
from service.errors import NotFound
from service.ids import utcnow
from service.jobs.lease import best_checkpoint
from service.spec.section import Section
from service.store import aliases, checkpoints, clock, jobs
from service.store.tables import Checkpoint, Job
from service.validation import below, parse

router = Router(prefix="/v1", tags=["checkpoints"])

DELETED_AT_ONCE = 1000
OPTIMIZER = "optimizer.safetensors"  # the file of a checkpoint that is needed to resume, and for nothing else


class CheckpointView(BaseModel):
    """Weights (a plain peft adapter or a plain transformers folder) with all that a resume needs."""

    id: str
    object: Literal["checkpoint"] = "checkpoint"
    job_id: Annotated[str | None, Field(description="null when the job was deleted")]
    step: int
    attempt: int
    adapter: Literal["lora", "full"]
    model: Annotated[dict[str, Any], Field(description="the model section of the job's spec")]
    size_bytes: int
    manifest_sha256: Annotated[str, Field(description="of the manifest, which has a sha256 of each file")]
    metrics: Annotated[dict[str, Any], Field(description="the evaluation at this step, if there was one")]
    has_optimizer: bool
    is_final: Annotated[bool, Field(description="saved at the end of the job")]
    created_at: datetime
    pinned_at: Annotated[datetime | None, Field(description="since when it is pinned: nothing deletes it")]
    expires_at: Annotated[datetime | None, Field(description="when it is deleted, unless it is pinned or needed then")]
    aliases: Annotated[list[str], Field(description="those that point at it: while there are any, nothing deletes it")]

    @classmethod
    def of(cls, row: Checkpoint, aliases: list[str]) -> Self:
        names = cls.model_fields.keys() - {"object", "aliases"}
        return cls(**{name: getattr(row, name) for name in names}, aliases=aliases)

    @classmethod
    def read(cls, session: Session, *rows: Checkpoint) -> list[Self]:
        """How these look, with the aliases that point at them."""
        pointing = checkpoints.aliases(session, [row.id for row in rows])
        return [cls.of(row, pointing.get(row.id, [])) for row in rows]


class CheckpointPage(Page[CheckpointView]):
    pass


class DeleteRequest(Section):
    """The checkpoints to delete. Give at least one of `ids`, `job_id` and `older_than_s`; a checkpoint must match all given."""

    ids: Annotated[
        list[Annotated[str, Field(max_length=40)]] | None,
        Field(min_length=1, max_length=1000, description="delete these checkpoints"),
    ] = None
    job_id: Annotated[str | None, Field(max_length=40, description="delete checkpoints of this job")] = None
    older_than_s: Annotated[
        float | None,
        Field(ge=0, le=3_153_600_000, description="delete checkpoints that were saved more than this many seconds ago"),
    ] = None
    keep_last: Annotated[int, Field(ge=0, le=1000, description="spare this many of the newest checkpoints of each job")] = 0
    final: Annotated[bool, Field(description="also delete those that were saved at the end of a job")] = False
    dry_run: Annotated[bool, Field(description="only say what would be deleted")] = True

    @model_validator(mode="after")
    def something_is_named(self) -> Self:
        if self.ids is None and self.job_id is None and self.older_than_s is None:
            raise ValueError("say which: `ids`, `job_id` or `older_than_s`")
        return self


class KeptView(BaseModel):
    id: str
    reason: Annotated[
        Literal["in_use", "pinned", "aliased"],
        Field(description="in_use: by a job that has not ended; aliased: an alias points at it"),
    ]


class DeletedView(BaseModel):
    """The checkpoints that were deleted, or would be."""

    object: Literal["checkpoints.deleted"] = "checkpoints.deleted"
    dry_run: bool
    data: list[CheckpointView]
    size_bytes: Annotated[int, Field(description="of all of them")]
    kept: Annotated[list[KeptView], Field(description="checkpoints that match and are not deleted")]
    has_more: Annotated[bool, Field(description="ask again for the rest")]


class AncestorView(BaseModel):
    """One checkpoint on the way back to the base model."""

    checkpoint_id: str
    step: int
    adapter: Literal["lora", "full"]
    created_at: datetime
    deleted_at: datetime | None
    job_id: Annotated[str | None, Field(description="null when the job was deleted")]
    job_name: str | None
    spec_sha256: str | None
    data_sha256: str | None


class BaseView(BaseModel):
    source: Annotated[str | None, Field(description="model.source of the first job")]
    revision: Annotated[str | None, Field(description="the commit that it was resolved to")]


class LineageView(BaseModel):
    """Where a checkpoint comes from."""

    object: Literal["lineage"] = "lineage"
    data: Annotated[list[AncestorView], Field(description="from the checkpoint itself back to the first")]
    base: Annotated[BaseView, Field(description="the model that the first job started from")]
    complete: Annotated[bool, Field(description="false when a checkpoint on the way is not known any more")]


class ArchiveQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    optimizer: Annotated[bool, Field(description="false: without the optimizer's state, which only a resume needs")] = True


class CheckpointsQuery(PageQuery):
    job_id: Annotated[str | None, Field(max_length=40, description="only of this job")] = None


@router.get("/checkpoints", responses=responses(404))
def list_checkpoints(context: ContextDep, caller: CallerDep, query: Annotated[CheckpointsQuery, Query()]) -> CheckpointPage:
    """Checkpoints of the project, or of one job, newest first."""
    with context.store.begin(readonly=True) as session, below("/query"):
        if query.job_id is not None:
            jobs.standing(session, caller.project, query.job_id)
        rows, has_more = checkpoints.page(session, caller.project, **query.model_dump())
        views = CheckpointView.read(session, *rows)
    return CheckpointPage.of(views, [row.id for row in rows], has_more)


@router.get("/jobs/{job_id}/checkpoints", responses=responses(404))
def list_job_checkpoints(
    context: ContextDep, caller: CallerDep, job_id: str, query: Annotated[PageQuery, Query()]
) -> CheckpointPage:
    """Checkpoints of one job, newest first."""
    return list_checkpoints(context, caller, CheckpointsQuery(job_id=job_id, **query.model_dump()))


@router.get("/jobs/{job_id}/checkpoints/best", responses=responses(404))
def read_best_checkpoint(context: ContextDep, caller: CallerDep, job_id: str) -> CheckpointView:
    """The job's checkpoint with the best evaluation, by the rule of its spec: early_stopping, else keep_best, else the highest
    mean reward, else the lowest loss. 404 if none of those that are left was evaluated when it was saved."""
    with context.store.begin(readonly=True) as session:
        best = best_checkpoint(session, jobs.get(session, caller.project, job_id))
        if best is None:
            detail = f"no checkpoint of {job_id} was evaluated when it was saved"
            raise NotFound(detail, hint="checkpoints.keep_best saves the best")
        return CheckpointView.read(session, best)[0]


@router.get("/checkpoints/{checkpoint_id}", responses=responses(404))
def read_checkpoint(context: ContextDep, caller: CallerDep, checkpoint_id: str) -> CheckpointView:
    """A checkpoint by its id, or by an alias that points at it."""
    with context.store.begin(readonly=True) as session:
        return CheckpointView.read(session, aliases.checkpoint(session, caller.project, checkpoint_id))[0]


@router.get(
    "/checkpoints/{checkpoint_id}/archive",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}}}} | responses(404),
)
def download_checkpoint(
    context: ContextDep, caller: CallerDep, checkpoint_id: str, query: Annotated[ArchiveQuery, Query()]
) -> StreamingResponse:
    """The files of the checkpoint (by its id or an alias) as a tar archive, below a folder named after its id."""
    with context.store.begin(readonly=True) as session:
        checkpoint = aliases.checkpoint(session, caller.project, checkpoint_id)
    folder = context.store.blobs.fetch(checkpoint.path)
    if not folder.is_dir():
        raise files_missing(f"checkpoint {checkpoint_id}")
    archive = archive_of(folder, checkpoint.id, without=() if query.optimizer else (OPTIMIZER,))
    headers = {"Content-Length": str(archive.size), "Content-Disposition": f'attachment; filename="{checkpoint.id}.tar"'}
    return StreamingResponse(archive.stream(), media_type="application/x-tar", headers=headers)


@router.post("/checkpoints/{checkpoint_id}/pin", responses=responses(404))
def pin_checkpoint(context: ContextDep, caller: CallerDep, checkpoint_id: str) -> CheckpointView:
    """Keep a checkpoint whatever its job's retention, its time to live, or a deletion says."""
    with context.store.begin() as session:
        return CheckpointView.read(session, checkpoints.pin(session, caller.project, checkpoint_id, utcnow()))[0]


@router.post("/checkpoints/{checkpoint_id}/unpin", responses=responses(404))
def unpin_checkpoint(context: ContextDep, caller: CallerDep, checkpoint_id: str) -> CheckpointView:
    """Allow a pinned checkpoint to be removed again."""
    with context.store.begin() as session:
        return CheckpointView.read(session, checkpoints.pin(session, caller.project, checkpoint_id, None))[0]


@router.get("/checkpoints/{checkpoint_id}/lineage", responses=responses(404))
def read_lineage(context: ContextDep, caller: CallerDep, checkpoint_id: str) -> LineageView:
    """The checkpoint (by its id or an alias), the one that its job started from, and so on back to the base model."""
    with context.store.begin(readonly=True) as session:
        chain = checkpoints.lineage(session, caller.project, aliases.checkpoint(session, caller.project, checkpoint_id).id)
    (oldest, first) = chain[-1]
    revision = oldest.model.get("revision") if first is None else first.resolved.get("revision")
    return LineageView(
        data=[_ancestor(row, job) for row, job in chain],
        base=BaseView(source=oldest.model.get("source"), revision=revision),
        complete=not oldest.model.get("from_checkpoint"),
    )


def _ancestor(row: Checkpoint, job: Job | None) -> AncestorView:
    names = ("step", "adapter", "created_at", "deleted_at", "job_id")
    about_job = {f"{name}": getattr(job, name, None) for name in ("spec_sha256", "data_sha256")}
    return AncestorView(
        checkpoint_id=row.id, job_name=getattr(job, "name", None), **about_job, **{name: getattr(row, name) for name in names}
    )


@router.post("/checkpoints:delete", responses=responses(*BODY), openapi_extra=documented("DeleteRequest"))
def delete_checkpoints(context: ContextDep, caller: CallerDep, document: DocumentDep, request: Request) -> DeletedView:
    """Delete many at once. By default a dry run. Keeps those that are pinned, or that an unfinished job or an alias needs."""
    asked = parse(DeleteRequest, document.data)
    filters = asked.model_dump(include={"ids", "job_id", "keep_last", "final"})
    with context.store.begin(readonly=asked.dry_run) as session:
        now = clock.now(session)
        before = None if asked.older_than_s is None else now - timedelta(seconds=asked.older_than_s)
        rows, more = checkpoints.chosen(session, caller.project, **filters, created_before=before, limit=DELETED_AT_ONCE)
        if asked.dry_run:
            kept = checkpoints.spared(session, rows, by_hand=True)
            removed = [row for row in rows if row.id not in kept]
        else:
            removed, kept = checkpoints.remove(session, [row.id for row in rows], now, by_hand=True)
    if asked.dry_run:
        audit.changed_nothing(request.scope)
    else:
        for row in removed:
            context.store.blobs.delete(row.path)
    return DeletedView(
        dry_run=asked.dry_run,
        data=[CheckpointView.of(row, []) for row in removed],
        size_bytes=sum(row.size_bytes for row in removed),
        kept=[KeptView(id=row_id, reason=reason) for row_id, reason in sorted(kept.items())],
        has_more=more,
    )


@router.delete("/checkpoints/{checkpoint_id}", status_code=204, response_class=Response, responses=responses(404, 409))
def delete_checkpoint(context: ContextDep, caller: CallerDep, checkpoint_id: str) -> None:
    """Delete a checkpoint, unless it is pinned, or a job that has not ended or an alias needs it."""
    with context.store.begin() as session:
        path = checkpoints.mark_deleted(session, caller.project, checkpoint_id, utcnow()).path
    context.store.blobs.delete(path)  # if this process dies here, the sweep removes the files
