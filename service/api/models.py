"""Models that need no download: the built-in one, and the folders in the operator's models directory."""

from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from service.edge.auth import CallerDep
from service.edge.context import ContextDep
from service.edge.pages import Page
from service.jobs.model_folder import read_config

router = APIRouter(prefix="/v1/models", tags=["models"])

FACTS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")


class ModelView(BaseModel):
    """A model. Its id is the value for `model.source`."""

    id: Annotated[str, Field(description="write this as model.source")]
    object: Literal["model"] = "model"
    kind: Literal["builtin", "folder"]
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
    """The built-in model and the operator's model folders. Jobs may also name hub models, if the workers reach the hub."""
    folder = context.settings.local_models_dir
    paths = sorted(path.parent for path in folder.glob("*/config.json")) if folder.is_dir() else []
    paths = [path for path in paths if path.resolve().is_relative_to(folder.resolve())]  # `model.source` cannot name others
    models = [TINY, *(_of_folder(path) for path in paths)]
    return ModelPage.of(models, [model.id for model in models])


def _of_folder(path: Path) -> ModelView:
    try:
        config = read_config(path)
    except ValueError:
        config = {}
    facts = {name: config[name] for name in FACTS if name in config}
    size = sum(file.stat().st_size for file in path.glob("*.safetensors") if file.is_file())
    return ModelView(id=path.name, kind="folder", description=f"the folder {path}", config=facts, size_bytes=size or None)
