"""What a session is asked for with: the model that its owner trains by operations. A sampler has a model and no training."""

import hashlib
import json
from typing import Annotated, Literal

from pydantic import Field, field_validator

from service.spec.model import Full, ModelSpec
from service.spec.section import MOST_COUNTED, MOST_S
from service.spec.work import Resources, Section, WorkLimits, WorkSpec

MOST_STEPS = 10_000_000  # optimizer steps of a session, as of a managed job


class SessionCheckpoints(Section):
    """Snapshots, from which a session goes on after a crash. What lies between them is done again from its operations."""

    every_steps: Annotated[int, Field(ge=1, le=MOST_COUNTED, description="optimizer steps between snapshots")] = 20
    keep_last: Annotated[
        int,
        Field(
            ge=1,
            le=MOST_COUNTED,
            description="the newest so many are kept, so that a broken one can be done without; those with a name are all kept",
        ),
    ] = 2
    ttl_s: Annotated[
        float | None, Field(gt=0, le=315_360_000, description="each is deleted so long after it was saved; default: never")
    ] = None


class SessionLimits(WorkLimits):
    """Where the session ends at the latest."""

    max_runtime_s: Annotated[
        float, Field(gt=0, le=MOST_S, description="seconds in the hands of a worker, over all attempts; then the session fails")
    ] = 30 * 86_400


class SessionSpec(WorkSpec):
    """A training session: its owner sends the operations, the service holds model, optimizer and failures."""

    kind: Annotated[Literal["session"], Field(description="operations of its owner, one by one")] = "session"
    checkpoints: Annotated[SessionCheckpoints, Field(description="how often it is saved by itself")] = SessionCheckpoints()
    limits: Annotated[SessionLimits, Field(description="how long the session may go on")] = SessionLimits()

    @field_validator("resources", mode="after")
    @classmethod
    def one_gpu(cls, value: Resources) -> Resources:
        if value.gpus > 1:
            raise ValueError(f"a session runs on one GPU: leave gpus out, got {value.gpus}. A job can run on several")
        return value


class SamplerSpec(WorkSpec):
    """What samples the versions of one base for one project. It is made by the service, not asked for."""

    kind: Annotated[Literal["sampler"], Field(description="samples; trains nothing")] = "sampler"
    limits: Annotated[SessionLimits, Field(description="how long the sampler may go on")] = SessionLimits()


def base_key(model: ModelSpec) -> str | None:
    """Models with the same key have the same frozen weights, so that their adapters may share a process.

    `model` is resolved. None: all its weights are trained, so that it shares with nobody.
    """
    if isinstance(model.adapter, Full):
        return None
    facts = model.model_dump(mode="json", include={"source", "revision", "tiny", "dtype"})
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sampler_key(model: ModelSpec, checkpoint_id: str | None) -> str:
    """The `base_key` of the sampler of a model; of full weights each checkpoint is a base of its own."""
    frozen = base_key(model.model_copy(update={"adapter": None}))
    assert frozen is not None
    if checkpoint_id is None or not isinstance(model.adapter, Full):
        return frozen
    return hashlib.sha256(f"{frozen}/{checkpoint_id}".encode()).hexdigest()
