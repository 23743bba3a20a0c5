"""What a request's `model` names: a checkpoint, an alias, a job or session by its newest checkpoint, or a base model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import NotFound
from service.sessions.sessions import base_of_checkpoint
from service.settings import Settings
from service.spec.aliases import is_alias
from service.store import aliases, checkpoints, jobs
from service.store.session import Store
from service.store.tables import Checkpoint
from service.validation import did_you_mean, shown

BUILT_IN = "tiny"


@dataclass(frozen=True)
class Target:
    """What is sampled: the version `checkpoint` of the sampler of `model`, or its base where that is None."""

    id: str  # the checkpoint or the base: what the answer calls the model
    model: dict[str, Any]  # a model section
    checkpoint: str | None
    row: Checkpoint | None = None  # what `id` is, unless it is a base


def model_folders(settings: Settings) -> list[Path]:
    """The operator's model folders that can be named. What looks like an alias is one, and never a folder."""
    folder = settings.local_models_dir
    paths = sorted(path.parent for path in folder.glob("*/config.json")) if folder.is_dir() else []
    return [path for path in paths if path.resolve().is_relative_to(folder.resolve()) and not is_alias(path.name)]


def target(store: Store, settings: Settings, project: str, name: str) -> Target:
    """Raises NotFound `model_not_found`, also for what belongs to another project."""
    if not name.startswith(("ckpt_", "job_")) and not is_alias(name):
        bases = [BUILT_IN, *(path.name for path in model_folders(settings))]
        if name not in bases and "/" not in name:
            near = did_you_mean(name, bases)
            listed = ", ".join(bases[:20])
            raise not_found(name, f"it is no checkpoint, no alias and none of the models here, which are {listed}{near}")
        return Target(name, {"source": name}, None)
    with store.begin(readonly=True) as session:
        try:
            if name.startswith("job_") and not is_alias(name):
                job = jobs.get(session, project, name)
                row = checkpoints.newest(session, job.id)
            else:
                row = aliases.checkpoint(session, project, name)
        except NotFound as error:
            why = error.detail if is_alias(name) else "there is no such one in this project"
            raise not_found(name, why) from None
        if row is not None and checkpoints.is_over(session, row):
            raise not_found(name, f"{row.id} was deleted, or its time (ttl_s) is over")
    if row is None:
        raise not_found(name, "it has no checkpoint yet", hint="save one, or name the base model")
    return Target(row.id, base_of_checkpoint(row.id, row.model, row.adapter), row.id if row.adapter == "lora" else None, row)


def not_found(name: str, why: str, *, hint: str | None = None) -> NotFound:
    return NotFound(f"the model {shown(name)!r} cannot be sampled: {why}", code="model_not_found", hint=hint)
