"""The curves of a job, column by column; and which there are."""

from typing import Annotated, Literal, Self

from fastapi import Query, Response
from pydantic import BaseModel, ConfigDict, Field

from service.edge.auth import CallerDep
from service.edge.context import ContextDep
from service.edge.problems import responses
from service.edge.router import Router
from service.metric_names import find
from service.store import jobs, metrics

router = Router(prefix="/v1/jobs/{job_id}/metrics", tags=["jobs"])


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


class MetricNameView(BaseModel):
    """A curve that the job has. What is known of it: docs/metrics.md."""

    name: str
    unit: Annotated[str, Field(description="1 is a plain number")]
    means: str
    better: Literal["up", "down", "neither"]
    drawn: Annotated[bool, Field(description="`ratchet metrics` draws it unless others are named")]


class MetricNames(BaseModel):
    object: Literal["list"] = "list"
    data: list[MetricNameView]


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


@router.get("/names", responses=responses(404))
def list_metric_names(context: ContextDep, caller: CallerDep, job_id: str) -> MetricNames:
    """The curves that the job has so far, by name."""
    with context.store.begin(readonly=True) as session:
        jobs.standing(session, caller.project, job_id)
        names = metrics.names(session, job_id)
    return MetricNames(data=[_described(name) for name in names])


def _described(name: str) -> MetricNameView:
    known = find(name)
    if known is None:
        return MetricNameView(name=name, unit="1", means="", better="neither", drawn=False)
    return MetricNameView(name=name, unit=known.unit, means=known.means, better=known.better, drawn=known.drawn)
