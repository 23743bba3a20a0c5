"""The curves of a job, column by column."""

from typing import Annotated, Literal, Self

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from service.edge.auth import CallerDep
from service.edge.context import ContextDep
from service.edge.problems import responses
from service.store import jobs, metrics

router = APIRouter(prefix="/v1/jobs/{job_id}/metrics", tags=["jobs"])


class SeriesView(BaseModel):
    """One curve. If points were merged, `value` is their mean, and `min` and `max` keep every spike."""

    step: list[int]
    value: Annotated[list[float | None], Field(description="null where it was not finite")]
    min: list[float | None] | None = None
    max: list[float | None] | None = None

    @classmethod
    def of(cls, series: metrics.Series) -> Self:
        return cls.model_validate(series, from_attributes=True)


class MetricsView(BaseModel):
    """Curves by name."""

    object: Literal["metrics"] = "metrics"
    job_id: str
    series: dict[str, SeriesView]


class MetricsQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Annotated[list[str], Field(max_length=100, description="for example reward/mean; repeatable; default: all")] = Field(
        default_factory=list
    )
    from_step: Annotated[int, Field(ge=0, lt=2**31, description="the first step")] = 0
    to_step: Annotated[int | None, Field(ge=0, lt=2**31, description="the last step")] = None
    newest: Annotated[int | None, Field(ge=1, le=10_000, description="only this many of the newest points of each curve")] = (
        None
    )
    points: Annotated[int, Field(ge=1, le=10_000, description="at most this many points of each curve")] = 1000


@router.get("", response_model=MetricsView, response_model_exclude_none=True, responses=responses(404))
def read_metrics(context: ContextDep, caller: CallerDep, job_id: str, query: Annotated[MetricsQuery, Query()]) -> Response:
    """Curves by name and range of steps. A curve with more than `points` points is downsampled; `min` and `max` keep spikes."""
    with context.store.begin(readonly=True) as session:
        jobs.standing(session, caller.project, job_id)
        curves = metrics.series(session, job_id, query.name, **query.model_dump(exclude={"name"}))
    view = MetricsView(job_id=job_id, series={name: SeriesView.of(series) for name, series in curves.items()})
    return Response(view.model_dump_json(exclude_none=True), media_type="application/json")
