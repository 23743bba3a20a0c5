"""Resolves the model section: what the source names, and the settings that a checkpoint fixes."""

import os
import re
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from service.errors import FieldError, NotFound
from service.jobs import hub
from service.jobs.model_folder import context_of, pickled_weights, read_config
from service.settings import Settings
from service.spec.aliases import is_alias
from service.spec.model import Full, Lora, ModelSpec, TinyConfig
from service.store import aliases, checkpoints
from service.store.session import Store
from service.validation import did_you_mean

HUB_ANSWERS_WITHIN_S = 1.0
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)


def resolve_model(
    session: Session, settings: Settings, project: str, model: ModelSpec, errors: list[FieldError]
) -> tuple[ModelSpec, int | None]:
    """The section with everything filled in, and the context length in tokens if it is known before loading."""
    source = None if model.source is None else _source(model.source, settings)
    if model.from_checkpoint is not None:
        model = _from_checkpoint(session, project, model, source, errors)
        source = model.source
    if source is None:
        return model, None
    adapter = model.adapter or (Full() if source == "tiny" else Lora())
    tiny = (model.tiny or TinyConfig()) if source == "tiny" else None
    model = model.model_copy(update={"source": source, "adapter": adapter, "tiny": tiny})
    if tiny is not None:
        return model, tiny.context
    starts_from_weights = model.from_checkpoint is not None and isinstance(adapter, Full)
    return model, None if starts_from_weights else _context(source, model.revision, settings, errors)


def tokenizer_folder(store: Store, project: str, model: ModelSpec) -> Path | None:
    """The folder from which the worker will load the tokenizer, for a resolved model; None if it is not on this machine."""
    if model.source == "tiny":
        return None
    if model.from_checkpoint is not None and isinstance(model.adapter, Full):
        with store.begin(readonly=True) as session:
            checkpoint = checkpoints.get(session, project, model.from_checkpoint.id)
        folder = store.blobs.fetch(checkpoint.path) / "model"
    else:
        folder = Path(model.source or "")
    return folder if folder.is_absolute() and folder.is_dir() else None


def _source(name: str, settings: Settings) -> str:
    """A folder as its absolute path, everything else as it is. Of two the operator's is meant, not the working directory's."""
    if name == "tiny":
        return name
    if name.startswith(("/", "./", "../", "~")):
        return os.path.abspath(os.path.expanduser(name))
    models = Path(os.path.abspath(settings.local_models_dir))
    here = [models / name] + [models.parent / name] * name.startswith(f"{models.name}/")
    for local in map(os.path.abspath, here):
        if os.path.isdir(local) and models in Path(local).parents and _may_be_named(local, settings):
            return local
    return os.path.abspath(name) if settings.takes_any_model_folder and os.path.isdir(name) else name


def _may_be_named(folder: str | Path, settings: Settings) -> bool:
    """Whether any folder may be, or it is inside the operator's models directory, even after following links."""
    if settings.takes_any_model_folder:
        return True
    return Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(settings.local_models_dir))


def _context(source: str, revision: str | None, settings: Settings, errors: list[FieldError]) -> int | None:
    """Look at what the source names, and into it where it is a folder.

    A hub id is looked up where the workers run on this machine, as they do where any of its folders may be named. Others
    are left to the worker, which may have them cached or reach further.
    """
    if not source.startswith("/"):
        if HUB_ID.fullmatch(source) is None:
            detail = f"{source!r} is neither `tiny`, nor a folder, nor the form of a hub id"
            detail += "; if it is an alias, name it as model.from_checkpoint" if is_alias(source) else ""
            errors.append(_not_found(source, detail, settings))
        elif settings.takes_any_model_folder and (why := hub.why_not(source, revision, within_s=HUB_ANSWERS_WITHIN_S)):
            detail = f"{source!r} is neither a folder on the service's machine nor a hub id that it can reach: {why}"
            errors.append(_not_found(source, detail, settings))
        return None
    folder = Path(source)
    if not _may_be_named(source, settings):  # the same error whether it exists or not
        detail = f"{source} is none of the operator's models, which lie in {settings.local_models_dir}"
        errors.append(_not_found(source, detail, settings))
        return None
    if not os.path.isdir(folder):
        errors.append(_not_found(source, f"there is no folder {source} on the service's machine", settings))
        return None
    try:
        config = read_config(folder)
        pickled = pickled_weights(folder, config)
    except ValueError as error:
        errors.append(_not_found(source, f"the folder {source} cannot be loaded: {error}", settings))
        return None
    if pickled:
        errors.append(FieldError("/model/source", f"{source}: {pickled}", "model_pickled", source))
    return context_of(config)


def _not_found(source: str, detail: str, settings: Settings) -> FieldError:
    folders = (path for path in settings.local_models_dir.glob("*") if path.is_dir() and _may_be_named(path, settings))
    known = ["tiny", *sorted(path.name for path in folders)]
    near = did_you_mean(Path(source).name, known)
    detail = f"{detail}{near}; here are: {', '.join(known[:20])}; or name a hub id such as org/model"
    return FieldError("/model/source", detail, "model_not_found", source, known)


def _from_checkpoint(
    session: Session, project: str, model: ModelSpec, source: str | None, errors: list[FieldError]
) -> ModelSpec:
    """The checkpoint's own model section, with the settings that the spec may change. An alias becomes its checkpoint's id."""
    assert model.from_checkpoint is not None
    pointer = "/model/from_checkpoint"
    try:
        checkpoint = aliases.checkpoint(session, project, model.from_checkpoint.id)
    except NotFound as error:
        errors.append(FieldError(f"{pointer}/id", error.detail, "checkpoint_not_found", model.from_checkpoint.id))
        return model
    base = ModelSpec.model_validate({**checkpoint.model, "from_checkpoint": None})
    if model.from_checkpoint.load == "weights+optimizer" and not checkpoint.has_optimizer:
        detail = f"{checkpoint.id} holds no optimizer state; use load: weights"
        errors.append(FieldError(f"{pointer}/load", detail, "no_optimizer", model.from_checkpoint.load))
    sent = {"source": source, "revision": model.revision, "tiny": model.tiny, "adapter": _comparable(model.adapter)}
    own = {"source": base.source, "revision": base.revision, "tiny": base.tiny, "adapter": _comparable(base.adapter)}
    for name, value in sent.items():
        if value is not None and value != own[name]:
            detail = (
                f"differs from what {checkpoint.id} was trained with, which is {_plain(own[name])}; leave it out to take that"
            )
            errors.append(FieldError(f"/model/{name}", detail, "checkpoint_differs", _plain(value), _plain(own[name])))
    changes: dict[str, Any] = {"from_checkpoint": model.from_checkpoint.model_copy(update={"id": checkpoint.id})}
    changes |= {"dtype": model.dtype} if "dtype" in model.model_fields_set else {}
    changes |= {"adapter": model.adapter} if model.adapter is not None else {}
    return base.model_copy(update=changes)


def _comparable(adapter: Lora | Full | None) -> dict[str, Any] | None:
    """Without the dropout, which a later job may change."""
    if adapter is None:
        return None
    plain = adapter.model_dump(mode="json", exclude={"dropout"})
    return {name: sorted(value) if isinstance(value, list) else value for name, value in plain.items()}


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, TinyConfig) else value
