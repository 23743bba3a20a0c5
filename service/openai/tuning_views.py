"""Jobs, events and checkpoints as OpenAI's clients see them."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field
from sqlalchemy.orm import Session

from service.edge.pages import Page
from service.metric_names import EVAL_LOSS, EVAL_REWARD_MEAN, LOSS
from service.openai.tuning import KEPT
from service.states import FINAL, Status
from service.store import checkpoints, usage
from service.store.tables import Checkpoint, Event, Job

STATUSES = {
    Status.VALIDATING: "validating_files",
    Status.PAUSING: "running",
    Status.CANCELLING: "running",
}
LEVELS = {"failure": "error", "warning": "warn", "step_skipped": "warn", "reward_errors": "warn"}


class TuningError(BaseModel):
    code: str
    message: str
    param: str | None = None


class FineTuningJobView(BaseModel):
    """A fine-tuning job, in OpenAI's form."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: None = None
    model: Annotated[str, Field(description="as it was asked for")]
    fine_tuned_model: Annotated[str | None, Field(description="its last checkpoint, when it has succeeded: samples as a model")]
    organization_id: Annotated[str, Field(description="the project")]
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    training_file: str
    validation_file: str | None
    result_files: list[str] = []
    trained_tokens: int | None
    error: TuningError | None
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    seed: int
    suffix: str | None
    metadata: dict[str, str]
    integrations: list[Any] = []

    @classmethod
    def of(cls, session: Session, job: Job) -> Self:
        kept = job.user_metadata[KEPT]
        request, hyperparameters = kept["request"], kept["hyperparameters"]
        ended, status = job.status in FINAL, Status(job.status)
        type_ = "supervised" if job.kind == "supervised" else "reinforcement"
        given = (request.get("method") or {}).get(type_) or {}
        method = {"type": type_, type_: {**given, "hyperparameters": hyperparameters}}
        last = checkpoints.newest(session, job.id) if status is Status.SUCCEEDED else None
        failure = job.error if status is Status.FAILED and job.error else None
        return cls(
            id=job.id,
            created_at=int(job.created_at.timestamp()),
            finished_at=None if job.finished_at is None else int(job.finished_at.timestamp()),
            model=request["model"],
            fine_tuned_model=None if last is None else last.id,
            organization_id=job.project,
            status=STATUSES.get(status, status.value),  # pyright: ignore[reportArgumentType]
            training_file=request["training_file"],
            validation_file=request.get("validation_file"),
            trained_tokens=usage.of_job(session, job.id).trained_tokens if ended else None,
            error=None if failure is None else TuningError(code=failure["code"], message=failure["detail"]),
            hyperparameters={name: hyperparameters[name] for name in ("n_epochs", "batch_size", "learning_rate_multiplier")},
            method=method,
            seed=request.get("seed") or 0,
            suffix=request.get("suffix"),
            metadata={name: value for name, value in job.user_metadata.items() if name != KEPT},
        )


class FineTuningJobPage(Page[FineTuningJobView]):
    pass


class FineTuningEventView(BaseModel):
    """An event of a job's log; of a step its metrics."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]

    @classmethod
    def of(cls, event: Event) -> Self:
        metrics = event.data.get("metrics") if event.type in ("step", "evaluation") else None
        return cls(
            id=event_id(event.job_id, event.seq),
            created_at=int(event.created_at.timestamp()),
            level=LEVELS.get(event.type, "info"),  # pyright: ignore[reportArgumentType]
            message=_said(event),
            type="message" if metrics is None else "metrics",
            data=event.data if metrics is None else {"step": event.data.get("step"), **_named(metrics), **metrics},
        )


class FineTuningEventPage(Page[FineTuningEventView]):
    pass


def event_id(job_id: str, seq: int) -> str:
    return f"evt_{job_id}_{seq}"


def _said(event: Event) -> str:
    data = event.data
    if event.type == "status_changed":
        return f"{data['from']} -> {data['to']}: {data['reason']}"
    if event.type in ("step", "evaluation"):
        shown = _named(data.get("metrics", {}))
        said = ", ".join(f"{name} {value:.4g}" for name, value in shown.items() if isinstance(value, int | float))
        return f"{event.type} {data.get('step')}" + (f": {said}" if said else "")
    return str(data.get("detail") or event.type.replace("_", " "))


def _named(metrics: dict[str, Any]) -> dict[str, Any]:
    """Those that have a name in OpenAI's API."""
    names = {
        LOSS: "train_loss",
        "reward/mean": "train_mean_reward",
        EVAL_LOSS: "valid_loss",
        EVAL_REWARD_MEAN: "valid_mean_reward",
    }
    return {name: metrics[ours] for ours, name in names.items() if metrics.get(ours) is not None}


class FineTuningCheckpointView(BaseModel):
    """A checkpoint of a job. Its id samples as a model."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, Any]

    @classmethod
    def of(cls, row: Checkpoint) -> Self:
        named = _named(row.metrics)
        if "valid_loss" in named:
            named["full_valid_loss"] = named["valid_loss"]
        return cls(
            id=row.id,
            created_at=int(row.created_at.timestamp()),
            fine_tuned_model_checkpoint=row.id,
            fine_tuning_job_id=row.job_id or "",
            step_number=row.step,
            metrics={"step": row.step, **named},
        )


class FineTuningCheckpointPage(Page[FineTuningCheckpointView]):
    pass
