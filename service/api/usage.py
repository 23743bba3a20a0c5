"""Usage and budget of a project."""

from datetime import date, datetime
from typing import Annotated, Any, Literal, Self

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field

from service.api.days import Day
from service.api.keys import Project
from service.edge.auth import ADMIN_PROJECT, AdminDep, CallerDep
from service.edge.bodies import DocumentDep, documented
from service.edge.context import ContextDep
from service.edge.problems import BODY, responses
from service.edge.router import Router
from service.errors import Forbidden
from service.ids import utcnow
from service.spec.section import MOST_S, Section
from service.store import usage
from service.store.tables import Budget
from service.store.usage import Totals
from service.validation import parse

router = Router(prefix="/v1", tags=["usage"])

NOT_OURS = "another one's usage is not shown"
EVER = date(1970, 1, 1)


class WastedView(BaseModel):
    """Spent after an attempt's last checkpoint, and repeated or never used. The other sums include it."""

    sampled_tokens: int
    trained_tokens: int
    worker_s: float


class UsageTotals(BaseModel):
    """Sums of the ledger."""

    attempts: int
    tokens: Annotated[int, Field(description="sampled and trained")]
    sampled_tokens: int
    trained_tokens: int
    worker_s: Annotated[float, Field(description="seconds of a worker, over all phases")]
    phase_s: Annotated[dict[str, float], Field(description="seconds of a worker by phase")]
    wasted: WastedView

    @classmethod
    def of(cls, totals: Totals) -> Self:
        return cls(**_sums(totals))


def _sums(totals: Totals) -> dict[str, Any]:
    wasted = WastedView(
        sampled_tokens=totals.wasted_sampled_tokens,
        trained_tokens=totals.wasted_trained_tokens,
        worker_s=round(totals.wasted_s, 3),
    )
    return {
        "attempts": totals.attempts,
        "tokens": totals.tokens,
        "sampled_tokens": totals.sampled_tokens,
        "trained_tokens": totals.trained_tokens,
        "worker_s": round(totals.worker_s, 3),
        "phase_s": {phase: round(seconds, 3) for phase, seconds in totals.phase_s.items()},
        "wasted": wasted,
    }


class UsageGroup(UsageTotals):
    """Sums of one day, job, key or project."""

    group: Annotated[str | None, Field(description="YYYY-MM-DD, job_..., key_... or a project; null: no key is known")]


class UsageView(BaseModel):
    object: Literal["usage"] = "usage"
    project: Annotated[str | None, Field(description="null: all of them, grouped by project")]
    group_by: Literal["day", "job", "key", "project"]
    total: UsageTotals
    data: list[UsageGroup]


class UsageQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    from_: Annotated[Day | None, Field(alias="from", description="the first day (UTC)")] = None
    to: Annotated[Day | None, Field(description="the last day (UTC)")] = None
    job_id: Annotated[str | None, Field(max_length=40, description="only this job, also one that was deleted")] = None
    key_id: Annotated[str | None, Field(max_length=40, description="only jobs that were submitted with this key")] = None
    group_by: Annotated[
        Literal["day", "job", "key", "project"], Field(description=f"project: all of them, for keys of `{ADMIN_PROJECT}`")
    ] = "day"
    project: Annotated[Project | None, Field(description=f"another project, for keys of `{ADMIN_PROJECT}`")] = None


class BudgetRequest(Section):
    """What a project may spend from now on; jobs pause when it is spent."""

    project: Project
    tokens: Annotated[int | None, Field(ge=0, lt=2**62, description="sampled and trained; null: no bound")] = None
    worker_s: Annotated[float | None, Field(ge=0, le=MOST_S, description="seconds of workers; null: no bound")] = None
    since: Annotated[Day, Field(description="the day (UTC) from which on it is counted; default: all time")] = EVER


class BudgetView(BaseModel):
    object: Literal["budget"] = "budget"
    project: str
    tokens: int | None
    worker_s: float | None
    since: date
    updated_at: datetime | None
    spent: UsageTotals


class BudgetQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    project: Annotated[Project | None, Field(description=f"another project, for keys of `{ADMIN_PROJECT}`")] = None


@router.get("/usage", responses=responses(403))
def read_usage(context: ContextDep, caller: CallerDep, query: Annotated[UsageQuery, Query()]) -> UsageView:
    """What the project spent: as of the last commit of each running job."""
    project = caller.managed(query.project, NOT_OURS)
    if query.group_by == "project":
        if caller.project != ADMIN_PROJECT:
            raise Forbidden(f"this key belongs to project {caller.project}; {NOT_OURS}", hint=f"use a key of `{ADMIN_PROJECT}`")
        project = query.project
    filters: dict[str, Any] = {
        "first_day": None if query.from_ is None else query.from_.isoformat(),
        "last_day": None if query.to is None else query.to.isoformat(),
        "job_id": query.job_id,
        "key_id": query.key_id,
    }
    with context.store.begin(readonly=True) as session:
        total = usage.report(session, project, **filters)[0]
        groups = usage.report(session, project, group_by=query.group_by, **filters)
    data = [UsageGroup(**_sums(sums), group=sums.group) for sums in groups]
    return UsageView(project=project, group_by=query.group_by, total=UsageTotals.of(total), data=data)


@router.get("/budget", responses=responses(403))
def read_budget(context: ContextDep, caller: CallerDep, query: Annotated[BudgetQuery, Query()]) -> BudgetView:
    """What the project may spend, and what it has spent of it."""
    return _budget(context, caller.managed(query.project, NOT_OURS))


@router.put("/budget", responses=responses(403, *BODY), openapi_extra=documented("BudgetRequest"))
def set_budget(context: ContextDep, caller: AdminDep, document: DocumentDep) -> BudgetView:
    """Set a project's budget, with a key of the administrators' project. Owners must resume jobs that paused because of it."""
    if caller.project != ADMIN_PROJECT:
        raise Forbidden("a project does not set its own budget", hint=f"use a key of the project `{ADMIN_PROJECT}`")
    asked = parse(BudgetRequest, document.data)
    bounds = {"tokens": asked.tokens, "worker_s": asked.worker_s, "since": asked.since.isoformat()}
    with context.store.begin() as session:
        usage.set_budget(session, asked.project, **bounds, now=utcnow())
    return _budget(context, asked.project)


def _budget(context: ContextDep, project: str) -> BudgetView:
    with context.store.begin(readonly=True) as session:
        row = session.get(Budget, project) or Budget(project=project, since=EVER.isoformat())
        spent = usage.report(session, project, first_day=row.since)[0]
    return BudgetView(
        project=project,
        tokens=row.tokens,
        worker_s=row.worker_s,
        since=date.fromisoformat(row.since),
        updated_at=row.updated_at,
        spent=UsageTotals.of(spent),
    )
