"""A page of jobs at a glance: what a list on a screen shows and refreshes every few seconds, in one cheap request."""

from datetime import datetime
from typing import Annotated, Literal

from fastapi import Query
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session

from service.api.jobs import JobsQuery
from service.api.views import FailureView, JobSummary
from service.edge.auth import CallerDep
from service.edge.context import ContextDep
from service.edge.pages import Page
from service.edge.router import Router
from service.metric_names import LOSS, LOSS_SUM, REWARD_MEAN
from service.states import FINAL, Phase, Status
from service.store import clock, jobs, keys, metrics, usage
from service.store.metrics import Series
from service.store.tables import Job
from service.validation import below

router = Router(prefix="/v1", tags=["jobs"])

POINTS = 32  # of a curve: so many places of the primary key are read, however long the job is
PACE_STEPS = 20  # the time left is told by the newest steps
CURVES: dict[str, tuple[str, ...]] = {
    "rl": (REWARD_MEAN,),
    "supervised": (LOSS,),
    "session": (REWARD_MEAN, LOSS_SUM),
    "sampler": (),
}


class CurveView(BaseModel):
    """A curve in few points: the values at evenly spaced steps, the newest one included."""

    name: str
    step: list[int]
    value: list[float | None]


class GlanceView(BaseModel):
    """A job as one line of a list."""

    id: str
    object: Literal["job.glance"] = "job.glance"
    kind: Literal["rl", "supervised", "session", "sampler"]
    name: str
    tags: list[str]
    status: Status
    status_reason: str | None
    phase: Phase | None
    step: int
    max_steps: int
    left_s: Annotated[
        float | None,
        Field(description="seconds until max_steps at the pace of its newest steps; null: not known"),
    ]
    attempt: int
    error: FailureView | None
    parent_id: str | None
    checkpoint_id: str | None
    last_event: int
    allowed_actions: list[str]
    key_id: Annotated[str | None, Field(description="the API key that submitted it")]
    key_name: Annotated[str | None, Field(description="what that key is called")]
    tokens: Annotated[int, Field(description="sampled and trained so far")]
    worker_s: Annotated[float, Field(description="seconds of a worker so far")]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    curve: Annotated[CurveView | None, Field(description="the reward, or the loss of a job without one; null: not asked for")]


class GlancePage(Page[GlanceView]):
    pass


class OverviewQuery(JobsQuery):
    id: Annotated[list[str], Field(max_length=100, description="only these jobs; repeatable")] = Field(default_factory=list)
    curves: Annotated[
        Literal["all", "live", "none"], Field(description="of which jobs a curve is wanted; live: that have not ended")
    ] = "all"


@router.get("/jobs:overview")
def read_overview(context: ContextDep, caller: CallerDep, query: Annotated[OverviewQuery, Query()]) -> GlancePage:
    """Jobs newest first, filtered as GET /v1/jobs, each with a small curve, the time that is left, and what it has spent."""
    filters = query.model_dump(exclude={"id", "curves"})
    with context.store.begin(readonly=True) as session, below("/query"):
        rows, has_more = jobs.page(session, caller.project, **filters, ids=query.id, light=True)
        spent = usage.of_jobs(session, [row.id for row in rows])
        names = keys.names(session, {row.key_id for row in rows if row.key_id is not None})
        now, data = clock.now(session), []
        for row in rows:
            wanted = query.curves == "all" or (query.curves == "live" and row.status not in FINAL)
            summary = JobSummary.columns(row, now)
            tokens, worker_s = spent.get(row.id, (0, 0.0))
            data.append(
                GlanceView(
                    **{name: summary[name] for name in GlanceView.model_fields if name in summary},
                    left_s=_left_s(session, row),
                    key_name=None if row.key_id is None else names.get(row.key_id),
                    key_id=row.key_id,
                    tokens=tokens,
                    worker_s=round(worker_s, 1),
                    curve=_curve(session, row) if wanted else None,
                )
            )
    return GlancePage.of(data, [row.id for row in rows], has_more)


def _curve(session: Session, job: Job) -> CurveView | None:
    for name in CURVES[job.kind]:
        found: Series = metrics.sampled(session, job.id, name, last=job.step, points=POINTS)
        if found.step:
            return CurveView(name=name, step=found.step, value=found.value)
    return None


def _left_s(session: Session, job: Job) -> float | None:
    if job.status != Status.RUNNING or job.kind not in ("rl", "supervised"):
        return None
    (name,) = CURVES[job.kind]
    pace = metrics.seconds_per_step(session, job.id, name, job.attempt, job.step - PACE_STEPS)
    return None if pace is None else round(pace * max(0, job.max_steps - job.step), 1)
