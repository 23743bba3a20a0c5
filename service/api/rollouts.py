"""The sampled groups of a job, with their rewards."""

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from fastapi import Query
from pydantic import BaseModel, Field

from service.edge.auth import CallerDep
from service.edge.context import ContextDep
from service.edge.pages import Page, PageQuery
from service.edge.problems import responses
from service.edge.router import Router
from service.store import jobs, rollouts
from service.store.tables import Rollout

router = Router(prefix="/v1/jobs/{job_id}/rollouts", tags=["jobs"])


class RolloutView(BaseModel):
    """A prompt, the answers sampled for it, and their rewards."""

    id: Annotated[str, Field(description="STEP.SPLIT.GROUP")]
    object: Literal["rollout"] = "rollout"
    job_id: str
    split: Literal["train", "eval"]
    step: int
    group_index: int
    prompt: str
    reference: Annotated[str | None, Field(description="the right answer, where the data has one")]
    samples: Annotated[
        list[dict[str, Any]],
        Field(description="each answer with its reward, scores, advantage; by_token: docs/dashboard.md"),
    ]
    created_at: datetime

    @classmethod
    def of(cls, row: Rollout) -> Self:
        columns = {name: getattr(row, name) for name in cls.model_fields if name not in ("id", "object")}
        return cls(id=rollouts.cursor(row), **columns)


class RolloutPage(Page[RolloutView]):
    pass


class RolloutsQuery(PageQuery):
    after: Annotated[
        str | None, Field(pattern=r"^[0-9]{1,9}\.(train|eval)\.[0-9]{1,9}$", description="last_id of the page before")
    ] = None
    split: Annotated[Literal["train", "eval"] | None, Field(description="only these")] = None
    step: Annotated[int | None, Field(ge=0, lt=2**31, description="only of this step")] = None


@router.get("", responses=responses(404))
def list_rollouts(context: ContextDep, caller: CallerDep, job_id: str, query: Annotated[RolloutsQuery, Query()]) -> RolloutPage:
    """Sampled groups that were kept (log_rollouts), the newest step first."""
    with context.store.begin(readonly=True) as session:
        jobs.standing(session, caller.project, job_id)
        rows, has_more = rollouts.page(
            session, job_id, split=query.split, step=query.step, after=query.after, limit=query.limit
        )
    views = [RolloutView.of(row) for row in rows]
    return RolloutPage.of(views, [view.id for view in views], has_more)
