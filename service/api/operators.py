"""What works and what waits: the workers, and the queue."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from service.doorbell import CLASSES
from service.edge.auth import CallerDep
from service.edge.context import ContextDep
from service.edge.pages import Page
from service.edge.router import Router
from service.store import clock, jobs, workers

router = Router(prefix="/v1", tags=["workers"])


class WorkerView(BaseModel):
    """A worker, as it last reported."""

    id: str
    object: Literal["worker"] = "worker"
    device: str
    resource_classes: Annotated[list[str], Field(description="the jobs that it takes; none: it answers loss requests")]
    draining: Annotated[bool, Field(description="it takes no further work")]
    started_at: datetime
    last_seen_at: datetime
    memory: Annotated[dict[str, Any] | None, Field(description="bytes: process; with a GPU gpu_used and gpu_total")]
    job_ids: Annotated[list[str], Field(description="jobs of your project that it holds")]


class WorkerPage(Page[WorkerView]):
    pass


class WaitingView(BaseModel):
    """Jobs of all projects that may start now and have no worker yet."""

    jobs: int
    oldest_wait_s: float | None


class QueueView(BaseModel):
    object: Literal["queue"] = "queue"
    jobs: Annotated[dict[str, int], Field(description="jobs of your project by status")]
    waiting: Annotated[
        dict[str, WaitingView], Field(description="by the class of worker that they need; gpu:4: one with four GPUs")
    ]


@router.get("/workers")
def list_workers(context: ContextDep, caller: CallerDep) -> WorkerPage:
    """The workers that were seen within the last minute. They are shared by all projects."""
    with context.store.begin(readonly=True) as session:
        alive = workers.alive(session, clock.now(session))
        held = jobs.held_by(session, caller.project)
        shown = WorkerView.model_fields.keys() - {"object", "job_ids"}
        views = [WorkerView(**{name: getattr(row, name) for name in shown}, job_ids=held.get(row.id, [])) for row in alive]
    return WorkerPage.of(views, [view.id for view in views])


@router.get("/queue")
def read_queue(context: ContextDep, caller: CallerDep) -> QueueView:
    """How many jobs there are, and how long they wait."""
    with context.store.begin(readonly=True) as session:
        now = clock.now(session)
        waiting = {}
        for name in dict.fromkeys([*CLASSES, *jobs.classes_queued(session, now)]):
            since = jobs.queued_since(session, name, now)
            wait_s = None if since is None else max(0.0, (now - since).total_seconds())
            waiting[name] = WaitingView(jobs=jobs.count_queued(session, name, now), oldest_wait_s=wait_s)
        return QueueView(jobs=jobs.count_by_status(session, caller.project), waiting=waiting)
