"""Models that need no download: the built-in one, and the folders in the operator's models directory."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from service.edge.auth import CallerDep
from service.edge.context import ContextDep
from service.edge.pages import Page
from service.edge.problems import responses
from service.edge.router import Router
from service.jobs.model_folder import read_config
from service.openai.models import model_folders, not_found, target
from service.spec.aliases import is_alias
from service.store import aliases, checkpoints
from service.store.tables import Checkpoint

router = Router(prefix="/v1/models", tags=["models"])

MOST_LISTED = 100  # checkpoints, and as many aliases
FACTS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")


class ModelView(BaseModel):
    """What can be sampled. The id of a base model is the value for `model.source`, too."""

    id: Annotated[str, Field(description="write this as model.source; a checkpoint or an alias as model.from_checkpoint")]
    object: Literal["model"] = "model"
    created: Annotated[int, Field(description="seconds since 1970; 0: not known")] = 0
    owned_by: Annotated[str, Field(description="the project of a checkpoint; `ratchet`: anybody here may use it")] = "ratchet"
    kind: Literal["builtin", "folder", "checkpoint", "alias"]
    root: Annotated[str | None, Field(description="of an alias: the checkpoint that it points at now")] = None
    description: str
    config: Annotated[dict[str, Any], Field(description="a few facts from its config.json")]
    size_bytes: Annotated[int | None, Field(description="of its weights")]


class ModelPage(Page[ModelView]):
    pass


TINY = ModelView(
    id="tiny",
    kind="builtin",
    description="a small Llama with a character tokenizer, made from a config and a seed: works offline, trains on a CPU",
    config={"model_type": "llama"},
    size_bytes=None,
)


@router.get("")
def list_models(context: ContextDep, caller: CallerDep) -> ModelPage:
    """The built-in model, the operator's model folders, and the project's newest aliases and checkpoints (all: GET /v1/aliases,
    GET /v1/checkpoints).

    Jobs may also name hub models, if the workers reach the hub.
    """
    models = [TINY, *(_of_folder(path) for path in model_folders(context.settings))]
    with context.store.begin(readonly=True) as session:
        named, more_named = aliases.page(session, caller.project, limit=MOST_LISTED)
        pointed = checkpoints.by_id(session, [row.checkpoint_id for row in named])
        rows, has_more = checkpoints.page(session, caller.project, limit=MOST_LISTED)
    models += [_of_alias(row.name, pointed[row.checkpoint_id]) for row in named if row.checkpoint_id in pointed]
    models += map(_of_checkpoint, rows)
    return ModelPage.of(models, [model.id for model in models], has_more or more_named)


@router.get("/{model_id}", responses=responses(404))
def read_model(context: ContextDep, caller: CallerDep, model_id: str) -> ModelView:
    """A model by its id: a base model that is listed, a checkpoint, an alias, or a job or session by its newest checkpoint."""
    if model_id == TINY.id:
        return TINY
    for path in model_folders(context.settings):
        if path.name == model_id:
            return _of_folder(path)
    found = target(context.store, context.settings, caller.project, model_id).row
    if found is None:  # a hub id, of which nothing is known before it is loaded
        raise not_found(model_id, "it is none of those that GET /v1/models lists")
    return _of_alias(model_id, found) if is_alias(model_id) else _of_checkpoint(found)


def _of_alias(name: str, row: Checkpoint) -> ModelView:
    found = _of_checkpoint(row)
    return found.model_copy(
        update={"id": name, "kind": "alias", "root": row.id, "description": f"{row.id}, {found.description}"}
    )


def _of_checkpoint(row: Checkpoint) -> ModelView:
    of = "a deleted job" if row.job_id is None else row.job_id
    return ModelView(
        id=row.id,
        created=int(row.created_at.timestamp()),
        owned_by=row.project,
        kind="checkpoint",
        description=f"step {row.step} of {of}" + (f", named {row.name}" if row.name else ""),
        config={},
        size_bytes=row.size_bytes,
    )


def _of_folder(path: Path) -> ModelView:
    try:
        config = read_config(path)
    except ValueError:
        config = {}
    facts = {name: config[name] for name in FACTS if name in config}
    size = sum(file.stat().st_size for file in path.glob("*.safetensors") if file.is_file())
    return ModelView(id=path.name, kind="folder", description=f"the folder {path}", config=facts, size_bytes=size or None)
