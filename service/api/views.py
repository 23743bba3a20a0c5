"""The JSON views of a job, shared by all routes that return one."""

from datetime import datetime
from typing import Annotated, Any, Literal, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection, Row
from sqlalchemy.orm import Session

from service.api.usage import UsageTotals
from service.edge.pages import Page
from service.jobs import moves
from service.states import Phase, Status, allowed_actions
from service.store import clock, operations, usage
from service.store.jobs import DOCUMENTS
from service.store.tables import Job

DERIVED = frozenset({"usage", "object", "metadata", "allowed_actions", "links"})  # not columns of the same name


class FailureView(BaseModel):
    """Why a job failed, paused or was last put back into the queue. All codes: docs/failures.md."""

    model_config = ConfigDict(extra="allow")

    code: Annotated[str, Field(description="for programs; stable")]
    detail: str
    category: Annotated[Literal["user", "infra", "internal"], Field(description="who can mend it")] = "internal"
    retryable: bool = False
    hint: str | None = None
    pointer: Annotated[str | None, Field(description="JSON pointer into the spec")] = None
    phase: str | None = None
    step: int | None = None
    attempt: int | None = None
    details: dict[str, Any] | None = None
    log_tail: Annotated[list[str] | None, Field(description="the attempt's last log lines, without secrets")] = None


class Links(BaseModel):
    """Where the rest of the job is."""

    events: str
    metrics: str
    rollouts: str
    checkpoints: str

    @classmethod
    def of(cls, job_id: str) -> Self:
        return cls(**{name: f"/v1/jobs/{job_id}/{name}" for name in cls.model_fields})


class JobSummary(BaseModel):
    """A job without its spec, as in lists."""

    id: str
    object: Literal["job"] = "job"
    kind: Literal["rl", "supervised", "session", "sampler"]
    name: str
    tags: list[str]
    metadata: dict[str, Any]
    status: Status
    status_reason: Annotated[str | None, Field(description="why it has this status, for example max_steps or lease_lost")]
    phase: Annotated[Phase | None, Field(description="what a running job is doing just now")]
    step: Annotated[int, Field(description="training steps that are done")]
    max_steps: int
    attempt: Annotated[int, Field(description="how often a worker has taken it")]
    error: FailureView | None
    result: Annotated[dict[str, Any] | None, Field(description="the last evaluation, the best checkpoint, why it ended")]
    spec_sha256: Annotated[str, Field(description="of the resolved spec")]
    data_sha256: Annotated[str, Field(description="of the rows")]
    parent_id: Annotated[str | None, Field(description="the job that it was forked from")]
    from_checkpoint_id: Annotated[str | None, Field(description="the checkpoint that it started from")]
    checkpoint_id: Annotated[str | None, Field(description="its newest checkpoint: where a resume or a fork goes on")]
    run_s: Annotated[float, Field(description="seconds of running, over all attempts; of the present one until now")]
    last_event: Annotated[int, Field(description="number of its newest event")]
    allowed_actions: Annotated[list[str], Field(description="what may be asked of it now")]
    created_at: datetime
    queued_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    links: Links

    @classmethod
    def columns(cls, job: Job | Row[Any], now: datetime) -> dict[str, Any]:
        """Its fields at the time `now`, by the clock of the leases."""
        columns = {name: getattr(job, name) for name in cls.model_fields if name not in DERIVED}
        forks = job.kind not in operations.KINDS
        allowed = [action for action in allowed_actions(Status(job.status)) if forks or action != "fork"]
        run_s = job.run_s + moves.running_s(job, now)
        return {
            **columns,
            "metadata": job.user_metadata,
            "allowed_actions": allowed,
            "run_s": run_s,
            "links": Links.of(job.id),
        }


class JobView(JobSummary):
    """A job."""

    spec: Annotated[dict[str, Any], Field(description="as it is run: every default filled in, the objective as its axes")]
    spec_sent: Annotated[dict[str, Any], Field(description="as it was sent")]
    resolved: Annotated[
        dict[str, Any], Field(description="what its worker found out: device, dtype, revision, versions, warnings")
    ]

    key_id: Annotated[str | None, Field(description="the API key that submitted it")]
    budget_tokens: Annotated[int | None, Field(description="what it may spend: tokens sampled and trained")]
    budget_worker_s: Annotated[float | None, Field(description="what it may spend: seconds of a worker")]
    usage: Annotated[UsageTotals, Field(description="what it has spent, as of its last commit")]

    @classmethod
    def read(cls, session: Session, job: Job) -> Self:
        """The job, with its data from other tables."""
        return cls(**cls.columns(job, clock.now(session)), usage=UsageTotals.of(usage.of_job(session, job.id)))

    @classmethod
    def stored(cls, connection: Connection, project: str, job_id: str) -> bytes:
        """The same as JSON. Its documents, which may be long, are passed on as they are stored. Raises NotFound."""
        job, spent = usage.shown(connection, project, job_id)
        fields = cls.columns(job, clock.now(connection))
        for name in DOCUMENTS:
            text = getattr(job, name)
            fields["metadata" if name == "user_metadata" else name] = None if text is None else orjson.Fragment(text)
        error = None if job.error is None else orjson.Fragment(FailureView(**job.error).model_dump_json())
        fields = {"id": job.id, "object": "job", **fields, "error": error, "usage": UsageTotals.of(spent)}
        return orjson.dumps(fields, default=BaseModel.model_dump, option=orjson.OPT_UTC_Z)

    @classmethod
    def new(cls, job: Job) -> Self:
        """A job in the transaction that creates it: it has spent nothing."""
        return cls(**cls.columns(job, job.created_at), usage=UsageTotals.of(usage.NO_TOTALS))


class JobPage(Page[JobSummary]):
    @classmethod
    def read(cls, session: Session, rows: list[Job], has_more: bool) -> Self:
        now = clock.now(session)
        return cls.of([JobSummary(**JobSummary.columns(row, now)) for row in rows], [row.id for row in rows], has_more)
