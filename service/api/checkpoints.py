"""Checkpoints: listed, read, downloaded, deleted."""

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from service.api.archive import archive_of
from service.api.auth import CallerDep
from service.api.context import ContextDep
from service.api.pages import Page, PageQuery
from service.api.problems import files_missing, responses
from service.ids import utcnow
from service.store import checkpoints, jobs
from service.store.tables import Checkpoint
from service.validation import below

router = APIRouter(prefix="/v1", tags=["checkpoints"])


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

    @classmethod
    def of(cls, row: Checkpoint) -> Self:
        return cls.model_validate(row, from_attributes=True)


class CheckpointPage(Page[CheckpointView]):
    pass


class CheckpointsQuery(PageQuery):
    job_id: Annotated[str | None, Field(max_length=40, description="only of this job")] = None


@router.get("/checkpoints", responses=responses(404))
def list_checkpoints(context: ContextDep, caller: CallerDep, query: Annotated[CheckpointsQuery, Query()]) -> CheckpointPage:
    """Checkpoints of the project, or of one job, newest first."""
    with context.store.begin(readonly=True) as session, below("/query"):
        if query.job_id is not None:
            jobs.standing(session, caller.project, query.job_id)
        rows, has_more = checkpoints.page(session, caller.project, **query.model_dump())
    return CheckpointPage.of([CheckpointView.of(row) for row in rows], [row.id for row in rows], has_more)


@router.get("/jobs/{job_id}/checkpoints", responses=responses(404))
def list_job_checkpoints(
    context: ContextDep, caller: CallerDep, job_id: str, query: Annotated[PageQuery, Query()]
) -> CheckpointPage:
    """Checkpoints of one job, newest first."""
    return list_checkpoints(context, caller, CheckpointsQuery(job_id=job_id, **query.model_dump()))


@router.get("/checkpoints/{checkpoint_id}", responses=responses(404))
def read_checkpoint(context: ContextDep, caller: CallerDep, checkpoint_id: str) -> CheckpointView:
    with context.store.begin(readonly=True) as session:
        return CheckpointView.of(checkpoints.get(session, caller.project, checkpoint_id))


@router.get(
    "/checkpoints/{checkpoint_id}/archive",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}}}} | responses(404),
)
def download_checkpoint(context: ContextDep, caller: CallerDep, checkpoint_id: str) -> StreamingResponse:
    """All files of the checkpoint as a tar archive, below a folder named after it."""
    with context.store.begin(readonly=True) as session:
        checkpoint = checkpoints.get(session, caller.project, checkpoint_id)
    folder = context.store.blobs.path(checkpoint.path)
    if not folder.is_dir():
        raise files_missing(f"checkpoint {checkpoint_id}")
    archive = archive_of(folder, checkpoint.id)
    headers = {"Content-Length": str(archive.size), "Content-Disposition": f'attachment; filename="{checkpoint.id}.tar"'}
    return StreamingResponse(archive.stream(), media_type="application/x-tar", headers=headers)


@router.delete("/checkpoints/{checkpoint_id}", status_code=204, response_class=Response, responses=responses(404, 409))
def delete_checkpoint(context: ContextDep, caller: CallerDep, checkpoint_id: str) -> None:
    """Delete a checkpoint, unless a job that has not ended needs it."""
    with context.store.begin() as session:
        path = checkpoints.mark_deleted(session, caller.project, checkpoint_id, utcnow()).path
    context.store.blobs.delete(path)  # should this process die here, the sweep removes the files
