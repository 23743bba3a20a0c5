"""Routes to create, list, follow, pause, resume, cancel, fork and delete jobs."""

from collections.abc import Callable
from time import monotonic
from typing import Annotated, Any, Literal

from fastapi import Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from service.api.events import MAX_SEQ
from service.api.examples import JOB_SPEC
from service.api.views import JobPage, JobView
from service.edge import audit
from service.edge.auth import Caller, CallerDep
from service.edge.bodies import DocumentDep, OptionalDocumentDep, ShowTurnDep, TurnDep, documented
from service.edge.context import Context, ContextDep
from service.edge.idempotency import IdempotencyKeyDep, Once, once
from service.edge.pages import PageQuery
from service.edge.problems import BODY, responses
from service.edge.router import Router
from service.edge.tails import POLL_S
from service.errors import Conflict
from service.jobs import lifecycle
from service.jobs.fork import forked_spec
from service.jobs.lifecycle import CANCEL_GRACE_S
from service.rewards.references import resolve_and_read
from service.spec.job import JobSpec
from service.spec.model import CheckpointRef
from service.spec.section import Section
from service.spec.work import Budget
from service.states import FINAL, Status
from service.store import jobs, operations
from service.store.tables import Job
from service.validation import below, parse

router = Router(prefix="/v1/jobs", tags=["jobs"])


class JobsQuery(PageQuery):
    status: Annotated[list[Status], Field(description="only jobs with this status; may be repeated")] = Field(
        default_factory=list
    )
    kind: Literal["rl", "supervised", "session", "sampler"] | None = None
    tag: Annotated[str | None, Field(max_length=200, description="only jobs with this tag")] = None
    name: Annotated[
        str | None, Field(max_length=200, description="only jobs with this text in their name; case is ignored")
    ] = None


class WaitQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    wait_s: Annotated[
        float, Field(ge=0, le=60, description="long poll: wait up to this many seconds for something to happen")
    ] = 0
    after_event: Annotated[
        int | None,
        Field(ge=0, le=MAX_SEQ, description="the `last_event` that you know; default: the newest one now"),
    ] = None


Grace = Annotated[float, Field(ge=0, le=86_400, description="seconds after which a worker that has not obeyed is killed")]


class PauseRequest(Section):
    """How long the job may take to pause."""

    grace_seconds: Annotated[
        Grace | None,
        Field(description="seconds after which a worker that has not obeyed is killed; default: it may finish its step"),
    ] = None


class CancelRequest(Section):
    """What is kept of a running job, and how long it may take to end."""

    final_checkpoint: Annotated[
        Literal["save", "none"], Field(description="none: what was learnt since its last checkpoint is lost")
    ] = "none"
    grace_seconds: Grace = CANCEL_GRACE_S


class ResumeRequest(Section):
    """The job's new budget, which includes what it has already spent."""

    budget: Annotated[
        Budget | None, Field(description="replaces the parts that it names; null removes the bound of a part")
    ] = None


class ForkRequest(Section):
    """The changes of the new job."""

    from_checkpoint: Annotated[
        str | CheckpointRef | None, Field(description="where it starts; default: the parent's newest checkpoint")
    ] = None
    spec: Annotated[
        dict[str, Any], Field(description="merged into the parent's spec as it was sent (RFC 7396: null removes a key)")
    ] = Field(default_factory=dict)


@router.post(
    "", status_code=201, response_model=JobView, responses=responses(409, *BODY), openapi_extra=documented("JobSpec", JOB_SPEC)
)
def create_job(
    request: Request,
    context: ContextDep,
    caller: CallerDep,
    document: DocumentDep,
    turn_to_check: TurnDep,
    idempotency_key: IdempotencyKeyDep,
) -> Any:
    """Check a spec, resolve it, and queue the job."""
    with once(context.store, caller, idempotency_key, route="POST /v1/jobs", body_sha256=document.sha256) as turn:
        if turn.replay is not None:
            return turn.replay
        return _create(request, context, caller, document.data, turn)


@router.post(
    "/{job_id}/fork",
    status_code=201,
    response_model=JobView,
    responses=responses(404, 409, *BODY),
    openapi_extra=documented("ForkRequest", required=False),
)
def fork_job(
    http: Request,
    context: ContextDep,
    caller: CallerDep,
    job_id: str,
    document: OptionalDocumentDep,
    turn_to_check: TurnDep,
    idempotency_key: IdempotencyKeyDep,
) -> Any:
    """Queue a new job that continues from this one, with any changes. The parent is not changed."""
    request = parse(ForkRequest, document.data)
    with context.store.begin(readonly=True) as session:
        parent = jobs.get(session, caller.project, job_id)
    if parent.kind in operations.KINDS:
        raise Conflict(
            f"{job_id} is a {parent.kind}; only jobs of kind rl and supervised can be forked",
            code="not_forkable",
            hint="start another session (POST /v1/sessions) or a job with one of its checkpoints as model.from_checkpoint",
        )
    start = request.from_checkpoint
    start = start.model_dump(mode="json") if isinstance(start, CheckpointRef) else start
    with once(
        context.store, caller, idempotency_key, route=f"POST /v1/jobs/{parent.id}/fork", body_sha256=document.sha256
    ) as turn:
        if turn.replay is not None:
            return turn.replay
        sent = forked_spec(parent, start, request.spec)
        with below("/spec"):
            return _create(http, context, caller, sent, turn, parent_id=parent.id)


def _create(
    request: Request, context: Context, caller: Caller, sent: dict[str, Any], turn: Once, *, parent_id: str | None = None
) -> Response:
    resolved = resolve_and_read(context.store, context.settings, caller.project, parse(JobSpec, sent))
    job = lifecycle.create_job(
        context.store,
        context.doorbell,
        project=caller.project,
        sent=sent,
        resolved=resolved,
        parent_id=parent_id,
        key_id=caller.key_id,
        also=completed(request, turn),
    )
    return Response(JobView.new(job).model_dump_json(), 201, media_type="application/json")


def completed(request: Request, turn: Once) -> Callable[[Session, Job], None]:
    """What the transaction that makes a job does beside: the audit log's entry, and the answer for an Idempotency-Key."""

    def complete(session: Session, job: Job) -> None:
        audit.tell_with(session, request.scope, 201, job.id)
        if turn.claim is not None:
            turn.complete(session, JobView.new(job))

    return complete


def _view(context: Context, job: Job) -> JobView:
    with context.store.begin(readonly=True) as session:
        return JobView.read(session, job)


@router.get("")
def list_jobs(context: ContextDep, caller: CallerDep, query: Annotated[JobsQuery, Query()]) -> JobPage:
    """Jobs without their specs, newest first."""
    with context.store.begin(readonly=True) as session, below("/query"):
        rows, has_more = jobs.page(session, caller.project, **query.model_dump())
        return JobPage.read(session, rows, has_more)


@router.get("/{job_id}", response_model=JobView, responses=responses(404))
async def read_job(
    request: Request, context: ContextDep, caller: CallerDep, job_id: str, query: Annotated[WaitQuery, Query()]
) -> Response:
    """A job. With `wait_s` the answer comes when `last_event` passes `after_event`, the job has ended, or time is up."""
    await _wait(request, context, caller, job_id, query)
    async with context.views.turn(caller.key_id):
        return await run_in_threadpool(_answer, context, caller, job_id)


async def _wait(request: Request, context: Context, caller: Caller, job_id: str, query: WaitQuery) -> None:
    """Woken by signals; between two looks it holds neither a thread, nor a connection, nor its key's share."""
    if not query.wait_s:
        return
    deadline, known = monotonic() + query.wait_s, query.after_event
    with context.open_answers.hold(caller.key_id), context.signals.watch(job_id) as bell:
        while (left := deadline - monotonic()) > 0 and not context.stopping.is_set():
            if await request.is_disconnected():
                return
            status, last_event = await run_in_threadpool(_standing, context, caller, job_id)
            known = last_event if known is None else known
            if last_event > known or status in FINAL:
                return
            async with caller.share.resting():
                await bell.wait(min(left, POLL_S))


def _standing(context: Context, caller: Caller, job_id: str) -> tuple[Status, int]:
    with context.store.look() as connection:
        status, last_event = jobs.standing(connection, caller.project, job_id)
    return Status(status), last_event


def _answer(context: Context, caller: Caller, job_id: str) -> Response:
    """In a thread: a spec with thousands of inline rows takes a while."""
    with context.store.look() as connection:
        return Response(JobView.stored(connection, caller.project, job_id), media_type="application/json")


@router.post("/{job_id}/pause", responses=responses(404, 409, *BODY), openapi_extra=documented("PauseRequest", required=False))
def pause_job(
    context: ContextDep, caller: CallerDep, job_id: str, document: OptionalDocumentDep, turn_to_show: ShowTurnDep
) -> JobView:
    """Let the job rest: a queued one at once, a running one when it has saved a checkpoint."""
    grace_s = parse(PauseRequest, document.data).grace_seconds
    return _view(context, lifecycle.pause(context.store, context.doorbell, caller.project, job_id, grace_s=grace_s))


@router.post(
    "/{job_id}/resume", responses=responses(404, 409, *BODY), openapi_extra=documented("ResumeRequest", required=False)
)
def resume_job(
    context: ContextDep, caller: CallerDep, job_id: str, document: OptionalDocumentDep, turn_to_show: ShowTurnDep
) -> JobView:
    """Queue a paused job again; it goes on from its newest checkpoint."""
    asked = parse(ResumeRequest, document.data).budget
    budget = None if asked is None else asked.model_dump(exclude_unset=True)
    return _view(context, lifecycle.resume(context.store, context.doorbell, caller.project, job_id, budget=budget))


@router.post(
    "/{job_id}/cancel", responses=responses(404, 409, *BODY), openapi_extra=documented("CancelRequest", required=False)
)
def cancel_job(
    context: ContextDep, caller: CallerDep, job_id: str, document: OptionalDocumentDep, turn_to_show: ShowTurnDep
) -> JobView:
    """End the job. What it has saved, measured and sampled is kept."""
    asked = parse(CancelRequest, document.data)
    how = {"save": asked.final_checkpoint == "save", "grace_s": asked.grace_seconds}
    return _view(context, lifecycle.cancel(context.store, context.doorbell, caller.project, job_id, **how))


@router.delete("/{job_id}", status_code=204, response_class=Response, responses=responses(404, 409))
def delete_job(context: ContextDep, caller: CallerDep, job_id: str) -> None:
    """Remove a job that has ended, with its events, metrics and rollouts. Its checkpoints stay."""
    lifecycle.delete(context.store, caller.project, job_id)
