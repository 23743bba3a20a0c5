"""What stands out in a job's curves."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.edge.auth import CallerDep
from service.edge.context import ContextDep
from service.edge.problems import responses
from service.edge.router import Router
from service.signals import NEEDED, Curve, advise
from service.store import jobs, metrics
from service.store.tables import Job

router = Router(prefix="/v1/jobs/{job_id}/advice", tags=["jobs"])

POINTS = 400  # of each curve that is looked at; longer ones are put together


class AdviceView(BaseModel):
    """One thing that stands out. All rules: docs/advice.md."""

    model_config = ConfigDict(from_attributes=True)

    rule: str
    severity: Annotated[Literal["warning", "notice"], Field(description="warning: look at it now")]
    metric: Annotated[str, Field(description="the curve that shows it")]
    from_step: int
    to_step: int
    detail: Annotated[str, Field(description="what is seen, in numbers")]
    cause: Annotated[str, Field(description="the likely one")]
    remedy: str


class AdviceList(BaseModel):
    """The warnings first. Empty: nothing stands out."""

    object: Literal["list"] = "list"
    data: list[AdviceView]


@router.get("", responses=responses(404))
def read_advice(context: ContextDep, caller: CallerDep, job_id: str) -> AdviceList:
    """What stands out in the job's curves so far: collapse, entropy that is gone, length that is paid, no signal and so on."""
    with context.store.begin(readonly=True) as session:
        job = jobs.get(session, caller.project, job_id)
        limits, updates = job.spec.get("limits", {}), _updates(job)
        steps = int(limits.get("no_signal_steps", 20))
        curves = {name: Curve.of(s.step, s.value) for name, s in _curves(session, job_id, steps).items() if s.step}
    found = advise(curves, updates=updates, no_signal_steps=steps)
    return AdviceList(data=[AdviceView.model_validate(each) for each in found])


def _curves(session: Any, job_id: str, steps: int) -> dict[str, metrics.Series]:
    """The whole curves, put together where they are long; and the newest steps as they are, which signs are looked for in."""
    curves = metrics.series(session, job_id, NEEDED, points=POINTS)
    last = max((series.step[-1] for series in curves.values() if series.step), default=0)
    newest = metrics.series(session, job_id, NEEDED, from_step=max(0, last - steps + 1))
    for name, series in curves.items():
        tail = newest[name]
        kept = [i for i, step in enumerate(series.step) if not tail.step or step < tail.step[0]]
        series.step = [series.step[i] for i in kept] + tail.step
        series.value = [series.value[i] for i in kept] + tail.value
    return curves


def _updates(job: Job) -> int:
    """Optimizer steps of each rollout."""
    update = job.spec.get("update", {}) if job.kind == "rl" else {}
    return int(update.get("minibatches", 1)) * int(update.get("epochs", 1))
