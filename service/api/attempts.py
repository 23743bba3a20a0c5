"""The attempts at a job, from the ledger."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from service.edge.auth import CallerDep
from service.edge.context import ContextDep
from service.edge.problems import responses
from service.edge.router import Router
from service.store import jobs, usage

router = Router(prefix="/v1/jobs/{job_id}/attempts", tags=["jobs"])


class AttemptView(BaseModel):
    """What one attempt did, and what it ended with."""

    object: Literal["attempt"] = "attempt"
    attempt: Annotated[int, Field(description="1, 2, 3 ...; 0 stands for the queue, where a job may fail, too")]
    steps: int
    sampled_tokens: int
    trained_tokens: int
    phase_s: Annotated[dict[str, float], Field(description="seconds of a worker by phase")]
    queued_s: Annotated[float, Field(description="how long the job waited for it")]
    wasted_s: Annotated[float, Field(description="seconds whose work was lost with it")]
    failure: Annotated[str | None, Field(description="the code of the error that it ended with: docs/failures.md")]


class AttemptList(BaseModel):
    object: Literal["list"] = "list"
    data: list[AttemptView]


@router.get("", responses=responses(404))
def list_attempts(context: ContextDep, caller: CallerDep, job_id: str) -> AttemptList:
    """Every attempt of a worker at the job, the oldest first."""
    with context.store.begin(readonly=True) as session:
        jobs.standing(session, caller.project, job_id)
        rows = usage.attempts(session, job_id)
    return AttemptList(data=[AttemptView.model_validate(row, from_attributes=True) for row in rows])
