"""Sessions and samplers as jobs: how they are made."""

from typing import Any

from sqlalchemy.exc import IntegrityError

from service.doorbell import Doorbell
from service.errors import FieldError, NotFound
from service.jobs.lifecycle import create_job
from service.jobs.resolve import Resolved, sha256_of
from service.jobs.resolve_model import resolve_model
from service.settings import Settings
from service.spec.model import CheckpointRef, ModelSpec
from service.spec.session import MOST_STEPS, SamplerSpec, SessionSpec, base_key, sampler_key
from service.spec.storable import not_storable
from service.store import jobs, operations
from service.store.session import Store
from service.store.tables import Job
from service.validation import invalid

NO_DATA = sha256_of({})


def resolve_session(store: Store, settings: Settings, project: str, spec: SessionSpec | SamplerSpec) -> Resolved:
    """Look up everything that the spec names. Raises InvalidRequest with one FieldError for each fault."""
    errors: list[FieldError] = not_storable(spec.model_dump(by_alias=True))
    if errors:
        raise invalid(errors)
    with store.begin(readonly=True) as session:
        model, _ = resolve_model(session, settings, project, spec.model, errors)
    if errors:
        raise invalid(errors)
    full = spec.model_copy(update={"model": model}).model_dump(mode="json", by_alias=True)
    start = model.from_checkpoint
    key = base_key(model) if isinstance(spec, SessionSpec) else sampler_key(model, None if start is None else start.id)
    return Resolved(
        spec=full,
        spec_sha256=sha256_of(full),
        data_sha256=NO_DATA,
        kind=spec.kind,
        max_steps=MOST_STEPS,
        from_checkpoint_id=None if start is None else start.id,
        estimates={},
        base_key=key,
    )


def sampler_of(
    store: Store, doorbell: Doorbell, settings: Settings, project: str, model: dict[str, Any], *, key_id: str | None = None
) -> Job:
    """The project's sampler of this model, made if there is none. Raises InvalidRequest.

    `model`: a model section. Of LoRA only the base counts, whose versions a `sample` names by their checkpoints; of full
    weights each checkpoint (from_checkpoint) is a base of its own.
    """
    parsed = ModelSpec.model_validate(model)
    spec = SamplerSpec(name=f"sampler of {parsed.source or 'a checkpoint'}"[:200], model=parsed)
    resolved = resolve_session(store, settings, project, spec)
    assert resolved.base_key is not None
    with store.begin(readonly=True) as session:
        there = jobs.sampler(session, project, resolved.base_key)
    if there is not None:
        return there
    try:
        return create_job(store, doorbell, project=project, sent=spec.model_dump(mode="json"), resolved=resolved, key_id=key_id)
    except IntegrityError:  # another request made it meanwhile, unless it was something else
        with store.begin(readonly=True) as session:
            there = jobs.sampler(session, project, resolved.base_key)
        if there is None:
            raise
        return there


def base_of_checkpoint(checkpoint_id: str, model: dict[str, Any], adapter: str) -> dict[str, Any]:
    """The model section of the sampler that samples this checkpoint: its base, or itself if it has all weights."""
    if adapter == "full":
        return {**model, "from_checkpoint": CheckpointRef(id=checkpoint_id).model_dump()}
    return {**model, "from_checkpoint": None, "adapter": None}


def get(store: Store, project: str, job_id: str) -> Job:
    """A session or sampler of this project. Raises NotFound."""
    with store.begin(readonly=True) as session:
        job = jobs.find(session, job_id)
        if job is None or job.project != project or job.kind not in operations.KINDS:
            raise NotFound(f"no session {job_id} in this project")
        return job
