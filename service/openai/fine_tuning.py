"""OpenAI's fine-tuning jobs: a translation onto jobs. The same jobs are under /v1/jobs, with everything that they can do."""

import re
from typing import Annotated, Any

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field

from service.edge.auth import Caller, CallerDep
from service.edge.bodies import DocumentDep, TurnDep, documented
from service.edge.context import Context, ContextDep
from service.edge.idempotency import IdempotencyKeyDep, once
from service.edge.router import Router
from service.errors import FieldError, InvalidRequest, NotFound
from service.jobs import lifecycle
from service.openai.face import responses
from service.openai.files import BODY, READS
from service.openai.tuning import KEPT, TAG, FineTuningRequest, in_the_request, spec_of
from service.openai.tuning_views import (
    FineTuningCheckpointPage,
    FineTuningCheckpointView,
    FineTuningEventPage,
    FineTuningEventView,
    FineTuningJobPage,
    FineTuningJobView,
    event_id,
)
from service.rewards.references import resolve_and_read
from service.spec.job import JobSpec
from service.store import checkpoints, events, jobs
from service.store.tables import Job
from service.validation import below, invalid, parse

router = Router(prefix="/v1/fine_tuning/jobs", tags=["openai"])

EXAMPLE = {
    "model": "tiny",
    "training_file": "ds_01k0000000000000000000000",
    "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}},
}


class TuningQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    after: Annotated[str | None, Field(max_length=128, description="last_id of the page before")] = None
    limit: Annotated[int, Field(ge=1, le=100, description="how many at most")] = 20


@router.post(
    "",
    response_model=FineTuningJobView,
    responses=responses(*READS, *BODY, 404, 409),
    openapi_extra=documented("FineTuningRequest", EXAMPLE),
)
def create_fine_tuning_job(
    context: ContextDep, caller: CallerDep, document: DocumentDep, turn_to_check: TurnDep, idempotency_key: IdempotencyKeyDep
) -> Any:
    """Queue a job that fine-tunes a model on an uploaded file, supervised or by reinforcement."""
    request = parse(FineTuningRequest, document.data)
    with once(context.store, caller, idempotency_key, route="POST /v1/fine_tuning/jobs", body_sha256=document.sha256) as turn:
        if turn.replay is not None:
            return turn.replay
        sent = spec_of(context.store, context.settings, caller.project, request, document.data)
        try:
            resolved = resolve_and_read(context.store, context.settings, caller.project, parse(JobSpec, sent))
            job = lifecycle.create_job(
                context.store,
                context.doorbell,
                project=caller.project,
                sent=sent,
                resolved=resolved,
                key_id=caller.key_id,
                also=lambda session, job: turn.complete(session, FineTuningJobView.of(session, job), 200),
            )
        except InvalidRequest as error:
            raise in_the_request(error) from error
    return _view(context, job)


@router.get("", responses=responses(*READS))
def list_fine_tuning_jobs(context: ContextDep, caller: CallerDep, query: Annotated[TuningQuery, Query()]) -> FineTuningJobPage:
    """The jobs that were made here, newest first."""
    with context.store.begin(readonly=True) as session, below("/query"):
        rows, more = jobs.page(session, caller.project, tag=TAG, after=query.after, limit=query.limit)
        data = [FineTuningJobView.of(session, row) for row in rows if KEPT in row.user_metadata]
    return FineTuningJobPage.of(data, [row.id for row in rows], more)


@router.get("/{fine_tuning_job_id}", responses=responses(*READS, 404))
def retrieve_fine_tuning_job(context: ContextDep, caller: CallerDep, fine_tuning_job_id: str) -> FineTuningJobView:
    return _view(context, _job(context, caller, fine_tuning_job_id))


@router.post("/{fine_tuning_job_id}/cancel", responses=responses(*READS, 404, 409))
def cancel_fine_tuning_job(context: ContextDep, caller: CallerDep, fine_tuning_job_id: str) -> FineTuningJobView:
    """End a job. What was learnt since its last checkpoint is lost."""
    job = _job(context, caller, fine_tuning_job_id)
    return _view(context, lifecycle.cancel(context.store, context.doorbell, caller.project, job.id))


@router.post("/{fine_tuning_job_id}/pause", responses=responses(*READS, 404, 409))
def pause_fine_tuning_job(context: ContextDep, caller: CallerDep, fine_tuning_job_id: str) -> FineTuningJobView:
    """Let a job rest; a running one is `running` until it has saved a checkpoint, and then `paused`."""
    job = _job(context, caller, fine_tuning_job_id)
    return _view(context, lifecycle.pause(context.store, context.doorbell, caller.project, job.id))


@router.post("/{fine_tuning_job_id}/resume", responses=responses(*READS, 404, 409))
def resume_fine_tuning_job(context: ContextDep, caller: CallerDep, fine_tuning_job_id: str) -> FineTuningJobView:
    """Queue a paused job; it goes on from its last checkpoint."""
    job = _job(context, caller, fine_tuning_job_id)
    return _view(context, lifecycle.resume(context.store, context.doorbell, caller.project, job.id))


@router.get("/{fine_tuning_job_id}/events", responses=responses(*READS, 404))
def list_fine_tuning_events(
    context: ContextDep, caller: CallerDep, fine_tuning_job_id: str, query: Annotated[TuningQuery, Query()]
) -> FineTuningEventPage:
    """The job's events, newest first."""
    job = _job(context, caller, fine_tuning_job_id)
    before = job.last_event + 1
    if query.after is not None:
        found = re.fullmatch(re.escape(event_id(job.id, 0)[:-1]) + r"(\d{1,9})", query.after, re.ASCII)
        if found is None:
            detail = f"`after` must be the id of an event of this job, got {query.after!r}"
            raise invalid([FieldError("/query/after", detail, "unknown_cursor", query.after)])
        before = int(found[1])
    with context.store.begin(readonly=True) as session:
        rows = events.before(session, job.id, before, query.limit + 1)
    data = [FineTuningEventView.of(row) for row in rows[: query.limit]]
    return FineTuningEventPage.of(data, [event.id for event in data], len(rows) > query.limit)


@router.get("/{fine_tuning_job_id}/checkpoints", responses=responses(*READS, 404))
def list_fine_tuning_checkpoints(
    context: ContextDep, caller: CallerDep, fine_tuning_job_id: str, query: Annotated[TuningQuery, Query()]
) -> FineTuningCheckpointPage:
    """The job's checkpoints, newest first. Each samples as a model."""
    job = _job(context, caller, fine_tuning_job_id)
    with context.store.begin(readonly=True) as session, below("/query"):
        rows, more = checkpoints.page(session, caller.project, job_id=job.id, after=query.after, limit=query.limit)
    return FineTuningCheckpointPage.of([FineTuningCheckpointView.of(row) for row in rows], [row.id for row in rows], more)


def _job(context: Context, caller: Caller, job_id: str) -> Job:
    with context.store.begin(readonly=True) as session:
        job = jobs.get(session, caller.project, job_id)
    if KEPT not in job.user_metadata:
        raise NotFound(f"no job {job_id} in this project")
    return job


def _view(context: Context, job: Job) -> FineTuningJobView:
    with context.store.begin(readonly=True) as session:
        return FineTuningJobView.of(session, job)
