"""Jobs to try the store with."""

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import TypeAdapter

from job_specs import SUPERVISED
from service.doorbell import Doorbell
from service.jobs.lifecycle import create_job
from service.jobs.resolve import Resolved
from service.spec.job import JobSpec
from service.store.session import Store
from service.store.tables import Job

SPEC = SUPERVISED | {"name": "a job", "tags": ["small"], "limits": {"max_steps": 10}}
NewJob = Callable[..., Job]


def make_job(
    store: Store,
    doorbell: Doorbell,
    *,
    project: str = "default",
    parent_id: str | None = None,
    from_checkpoint_id: str | None = None,
    **spec: Any,
) -> Job:
    """A queued job; keywords replace sections of the spec."""
    parsed: Any = TypeAdapter(JobSpec).validate_python({**SPEC, **spec})
    full = parsed.model_dump(mode="json", by_alias=True)
    resolved = Resolved(
        spec=full,
        spec_sha256="0" * 64,
        data_sha256="1" * 64,
        kind=full["kind"],
        max_steps=full["limits"]["max_steps"],
        from_checkpoint_id=from_checkpoint_id,
        estimates={},
    )
    sent = {**SPEC, **spec}
    return create_job(store, doorbell, project=project, sent=sent, resolved=resolved, parent_id=parent_id)


@pytest.fixture
def new_job(store: Store, doorbell: Doorbell) -> NewJob:
    return lambda **spec: make_job(store, doorbell, **spec)


@pytest.fixture
def job_maker() -> NewJob:
    """For tests that bring a store and a doorbell of their own."""
    return make_job
