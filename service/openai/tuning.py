"""OpenAI's fine-tuning requests as job specs. What would change the result and is not offered is refused."""

from dataclasses import replace
from math import ceil, gcd
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from service.errors import FieldError, InvalidRequest, NotFound
from service.jobs.data import JsonlRows
from service.openai.models import target
from service.openai.tuning_graders import Grader
from service.settings import Settings
from service.spec.section import Section
from service.store import datasets
from service.store.session import Store
from service.store.tables import Dataset
from service.validation import invalid

TAG = "openai:fine_tuning"  # the jobs that this face made
KEPT = "openai_fine_tuning"  # in their metadata: the request with its hyperparameters as they were resolved
# What stands for `auto`, and what a multiplier of 1 means.
EPOCHS = {"supervised": 3, "reinforcement": 1}
BATCH = {"supervised": 8, "reinforcement": 16}
LEARNING_RATE = {"supervised": 1e-4, "reinforcement": 1e-5}
GROUP = 8  # answers to a prompt at a compute_multiplier of 1
MINIBATCHES = 4
KEEP = 3  # checkpoints, one an epoch

Auto = Literal["auto"] | None
Count = Annotated[int, Field(ge=1, le=65_536)] | Auto
Multiplier = Annotated[float, Field(gt=0, le=10_000)] | Auto


class SupervisedHyperparameters(Section):
    """Of supervised fine-tuning."""

    n_epochs: Annotated[Annotated[int, Field(ge=1, le=1000)] | Auto, Field(description="passes over the rows; auto: 3")] = None
    batch_size: Annotated[Count, Field(description="rows in one optimizer step; auto: 8, or all rows if they are fewer")] = None
    learning_rate_multiplier: Annotated[Multiplier, Field(description="times 1e-4; auto: 1")] = None


class ReinforcementHyperparameters(Section):
    """Of reinforcement fine-tuning."""

    n_epochs: Annotated[Annotated[int, Field(ge=1, le=1000)] | Auto, Field(description="passes over the rows; auto: 1")] = None
    batch_size: Annotated[
        Annotated[int, Field(ge=1, le=4096)] | Auto, Field(description="prompts in one step; auto: 16, or all rows if fewer")
    ] = None
    learning_rate_multiplier: Annotated[Multiplier, Field(description="times 1e-5; auto: 1")] = None
    compute_multiplier: Annotated[
        Annotated[float, Field(gt=0, le=128)] | Auto, Field(description="answers to each prompt are 8 times this, at least 2")
    ] = None
    eval_interval: Annotated[Count, Field(description="steps between evaluations; auto: one an epoch")] = None
    eval_samples: Annotated[Literal[1, "auto"] | None, Field(description="answers to each row of an evaluation: 1")] = None
    reasoning_effort: Annotated[Literal["default"] | None, Field(description="no other is offered")] = None
    max_completion_tokens: Annotated[
        int | None, Field(ge=1, le=131_072, description="ours: the longest answer in tokens; default: 64")
    ] = None


class SupervisedMethod(Section):
    hyperparameters: SupervisedHyperparameters = SupervisedHyperparameters()


class ReinforcementMethod(Section):
    grader: Grader
    hyperparameters: ReinforcementHyperparameters = ReinforcementHyperparameters()
    response_format: Annotated[None, Field(description="is not offered")] = None


class TuningMethod(Section):
    """How the model learns."""

    type: Annotated[Literal["supervised", "reinforcement"], Field(description="dpo is not offered")]
    supervised: SupervisedMethod | None = None
    reinforcement: ReinforcementMethod | None = None

    @field_validator("type", mode="before")
    @classmethod
    def not_dpo(cls, value: Any) -> Any:
        if value == "dpo":
            raise ValueError("dpo is not offered: use supervised, or reinforcement with a grader")
        return value

    @model_validator(mode="after")
    def one_of_them(self) -> Self:
        if self.type == "reinforcement" and self.reinforcement is None:
            raise ValueError("method.reinforcement with a grader is missing")
        if getattr(self, "reinforcement" if self.type == "supervised" else "supervised") is not None:
            raise ValueError(f"method has a section that its type {self.type!r} does not use")
        return self


class FineTuningRequest(Section):
    """A fine-tuning job in OpenAI's form."""

    model: Annotated[
        str,
        Field(min_length=1, max_length=500, description="a base, ckpt_..., or job_... (its newest checkpoint)"),
    ]
    training_file: Annotated[str, Field(min_length=1, max_length=128, description="an uploaded file: ds_...")]
    validation_file: Annotated[str | None, Field(max_length=128, description="held-out rows, of the same form")] = None
    method: Annotated[TuningMethod | None, Field(description="default: supervised")] = None
    hyperparameters: Annotated[SupervisedHyperparameters | None, Field(description="their old place")] = None
    suffix: Annotated[str | None, Field(min_length=1, max_length=64, description="the job's name")] = None
    seed: Annotated[int | None, Field(ge=0, lt=2**63, description="default 0")] = None
    metadata: Annotated[
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None, Field(max_length=16)
    ] = None
    integrations: Annotated[
        list[Any] | None, Field(max_length=0, description="are not offered: `ratchet export metrics` writes to other tools")
    ] = None

    @model_validator(mode="after")
    def makes_sense(self) -> Self:
        if self.hyperparameters is not None and self.method is not None:
            raise ValueError("give hyperparameters in method, not beside it")
        if self.metadata and KEPT in self.metadata:
            raise ValueError(f"metadata may not have the key {KEPT}")
        return self

    @property
    def kind(self) -> Literal["supervised", "reinforcement"]:
        return "supervised" if self.method is None else self.method.type

    @property
    def chosen(self) -> SupervisedHyperparameters | ReinforcementHyperparameters:
        if self.method is None or self.method.type == "supervised":
            given = self.method.supervised if self.method else None
            return given.hyperparameters if given else self.hyperparameters or SupervisedHyperparameters()
        assert self.method.reinforcement is not None
        return self.method.reinforcement.hyperparameters


def spec_of(store: Store, settings: Settings, project: str, request: FineTuningRequest, sent: dict[str, Any]) -> dict[str, Any]:
    """The job's spec. `sent`: the request as it came, which is what answers show.

    Raises InvalidRequest (with pointers into the request), NotFound `model_not_found`.
    """
    aimed = target(store, settings, project, request.model)
    files = {"training_file": request.training_file, "validation_file": request.validation_file}
    found = {name: _file(store, project, name, file_id) for name, file_id in files.items() if file_id is not None}
    train = found["training_file"]
    chosen = _resolved(request.chosen, request.kind, train.rows)
    steps = max(1, ceil(train.rows * chosen["n_epochs"] / chosen["batch_size"]))
    an_epoch = max(1, ceil(train.rows / chosen["batch_size"]))
    eval_interval = chosen.get("eval_interval")
    kept = {"request": sent, "hyperparameters": chosen}
    spec: dict[str, Any] = {
        "kind": "supervised" if request.kind == "supervised" else "rl",
        "name": request.suffix or f"fine-tuning of {request.model}"[:200],
        "tags": [TAG],
        "metadata": {**(request.metadata or {}), KEPT: kept},
        "model": {"from_checkpoint": aimed.row.id}
        if aimed.row is not None
        else {"source": aimed.id, "adapter": {"kind": "lora"}},
        "data": _data(store, request, found),
        "optimizer": {"learning_rate": LEARNING_RATE[request.kind] * chosen["learning_rate_multiplier"]},
        "limits": {"max_steps": steps},
        "checkpoints": {"every_steps": an_epoch, "keep_last": KEEP},
        "eval": {"every_steps": an_epoch if eval_interval in (None, "auto") else eval_interval},
        "seed": request.seed or 0,
    }
    if request.kind == "supervised":
        return spec | {"update": {"batch_size": chosen["batch_size"]}}
    assert request.method is not None and request.method.reinforcement is not None
    group = max(2, round(GROUP * chosen["compute_multiplier"]))
    rollout = {"prompts_per_step": chosen["batch_size"], "group_size": group}
    if chosen["max_completion_tokens"] is not None:
        rollout["max_completion_tokens"] = chosen["max_completion_tokens"]
    return spec | {
        "objective": {"preset": "gspo"},
        "rollout": rollout,
        "update": {"minibatches": gcd(MINIBATCHES, chosen["batch_size"] * group)},
        "reward": {"graders": request.method.reinforcement.grader.graders()},
    }


def _resolved(asked: SupervisedHyperparameters | ReinforcementHyperparameters, kind: str, rows: int) -> dict[str, Any]:
    """The hyperparameters with a number in place of each `auto` that has one."""
    auto = {
        "n_epochs": EPOCHS[kind],
        "batch_size": min(BATCH[kind], rows),
        "learning_rate_multiplier": 1.0,
        "compute_multiplier": 1.0,
        "eval_interval": "auto",
        "eval_samples": 1,
        "reasoning_effort": "default",
    }
    return {name: auto.get(name) if value in (None, "auto") else value for name, value in asked.model_dump().items()}


def _file(store: Store, project: str, name: str, file_id: str) -> Dataset:
    with store.begin(readonly=True) as session:
        try:
            return datasets.get(session, project, file_id)
        except NotFound as error:
            detail = f"there is no file {file_id} in this project"
            raise invalid([FieldError(f"/{name}", detail, "not_found", file_id)]) from error


def _data(store: Store, request: FineTuningRequest, files: dict[str, Dataset]) -> dict[str, Any]:
    """The data section. A file holds `messages`, or for supervised fine-tuning `prompt` and `completion`."""
    sources = {name: {"source": "dataset", "id": dataset.id} for name, dataset in files.items()}
    data: dict[str, Any] = {"train": sources["training_file"]}
    if "validation_file" in sources:
        data["eval"] = sources["validation_file"]
    shapes = {name: _shape(request, name, dataset) for name, dataset in files.items()}
    if len(set(shapes.values())) > 1:
        detail = f"it holds {shapes['validation_file']}, and training_file holds {shapes['training_file']}"
        raise invalid([FieldError("/validation_file", detail, "bad_file")])
    if shapes["training_file"] == "completions":
        return data | {"prompt": "{prompt}", "answer": "{completion}"}
    for name, dataset in files.items():
        _check_weights(store, name, dataset)
    has_tools = all(dataset.columns.get("tools", {}).get("rows") == dataset.rows for dataset in files.values())
    learns = {"learn": "all"} if request.kind == "supervised" else {}
    return data | {"chat": "messages", **learns, **({"tools": "tools"} if has_tools else {})}


def _shape(request: FineTuningRequest, name: str, dataset: Dataset) -> Literal["chats", "completions"]:
    everywhere = {column for column, facts in dataset.columns.items() if facts["rows"] == dataset.rows}
    if "messages" in everywhere:
        return "chats"
    if request.kind == "supervised" and {"prompt", "completion"} <= everywhere:
        return "completions"
    forms = "`messages`" + (", or `prompt` and `completion`" if request.kind == "supervised" else "")
    there = ", ".join(sorted(dataset.columns)[:20])
    raise invalid([FieldError(f"/{name}", f"each row of the file needs {forms}; its columns are {there}", "bad_file")])


def _check_weights(store: Store, name: str, dataset: Dataset) -> None:
    """Refuse messages that shall not be learnt (weight 0): all turns of the assistant are."""
    for number, row in enumerate(JsonlRows(store.blobs.fetch(dataset.path))):
        messages = row["messages"] if isinstance(row["messages"], list) else []
        if any(isinstance(message, dict) and message.get("weight") not in (None, 1) for message in messages):
            detail = f"row {number} has a message with a weight that is not 1: all of the assistant's turns are learnt"
            raise invalid([FieldError(f"/{name}", detail, "weights_not_offered")])


# Where a fault of the spec stands in the request.
_PLACES = (
    ("/data/eval", "/validation_file"),
    ("/data", "/training_file"),
    ("/model", "/model"),
    ("/reward", "/method/reinforcement/grader"),
    ("/rollout/max_completion_tokens", "/method/reinforcement/hyperparameters/max_completion_tokens"),
    ("/rollout", "/method/reinforcement/hyperparameters/batch_size"),
    ("/update", "/method/hyperparameters/batch_size"),
    ("/optimizer", "/method/hyperparameters/learning_rate_multiplier"),
    ("/limits", "/method/hyperparameters/n_epochs"),
    ("/name", "/suffix"),
    ("/metadata", "/metadata"),
)


def in_the_request(error: InvalidRequest) -> InvalidRequest:
    """An error about the spec as one about the request that it was made of."""
    moved = [replace(one, pointer=_moved(one.pointer), detail=one.detail) for one in error.errors]
    return invalid(moved) if moved else error


def _moved(pointer: str) -> str:
    return next((place for prefix, place in _PLACES if pointer == prefix or pointer.startswith(f"{prefix}/")), pointer)
