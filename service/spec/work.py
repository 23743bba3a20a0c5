"""The sections that all kinds of work share, whoever runs the loop: name, model, resources, limits and seed."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from service.spec.model import ModelSpec
from service.spec.section import MOST_S, Section


class Budget(Section):
    """What the job may spend, over all attempts and with what was wasted; then it pauses as `budget_spent`."""

    tokens: Annotated[int | None, Field(ge=1, lt=2**62, description="the most tokens, sampled and trained together")] = None
    worker_s: Annotated[float | None, Field(gt=0, le=MOST_S, description="the most seconds of a worker")] = None


class WorkLimits(Section):
    """Where the work ends at the latest, whatever it is."""

    max_runtime_s: Annotated[
        float, Field(gt=0, le=MOST_S, description="the job fails after running for this many seconds, over all attempts")
    ] = 86_400
    max_attempts: Annotated[
        int,
        Field(
            ge=1,
            le=100,
            description="how many attempts may end in a crash or a retryable error without a new checkpoint in between",
        ),
    ] = 3
    deadline_s: Annotated[
        float | None,
        Field(
            gt=0,
            le=31_536_000,
            description="the job fails this many seconds after its submission, including the time it waited",
        ),
    ] = None
    budget: Annotated[Budget, Field(description="what the job may spend; it can be raised when it is resumed")] = Budget()
    stall_timeout_s: Annotated[
        float, Field(gt=0, le=MOST_S, description="an attempt is given up after this many seconds without progress")
    ] = 1800


MOST_GPUS = 64  # more than any machine has


class Resources(Section):
    """What the job runs on."""

    class_: Annotated[
        Literal["any", "cpu", "gpu"], Field(alias="class", description="the class of workers that may take the job")
    ] = "any"
    gpus: Annotated[
        int,
        Field(ge=1, le=MOST_GPUS, description="GPUs of one job, all of one machine; on a worker without GPUs: processes"),
    ] = 1
    sharding: Annotated[
        Literal["none", "optimizer", "full"],
        Field(
            description="what each of several GPUs holds a part of · none: nothing · optimizer: AdamW's moments, and the "
            "float32 masters of bfloat16 weights · full: these, the gradients and the weights (FSDP2), "
            "which are gathered whole to sample"
        ),
    ] = "none"
    priority: Annotated[
        int, Field(ge=0, le=100, description="of several queued jobs the one with the highest priority is taken first")
    ] = 50

    @model_validator(mode="after")
    def something_to_share(self) -> Self:
        if self.sharding != "none" and self.gpus == 1:
            raise ValueError(f"sharding: {self.sharding} is over several GPUs: ask for gpus: 2 or more, or leave sharding out")
        return self


class WorkSpec(Section):
    """What a job and a session have in common. Each adds its `limits`, which extend or are `WorkLimits`."""

    name: Annotated[str, Field(min_length=1, max_length=200, description="a name for people")] = "unnamed"
    tags: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=64)]],
        Field(max_length=32, description="labels by which lists can be filtered"),
    ] = Field(default_factory=list)
    metadata: Annotated[dict[str, Any], Field(description="your own data; it is stored and returned unchanged")] = Field(
        default_factory=dict
    )
    model: Annotated[ModelSpec, Field(description="the model that is trained")]
    resources: Annotated[Resources, Field(description="what the job runs on")] = Resources()
    seed: Annotated[int, Field(ge=0, lt=2**63, description="the seed from which every random draw of the job derives")] = 0
