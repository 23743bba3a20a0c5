"""The model section of a spec: what is trained, and from where it starts."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from service.spec.aliases import ALIAS
from service.spec.section import MOST, Section


class TinyConfig(Section):
    """A small Llama with a character tokenizer, made from nothing: works offline, trains on a CPU in seconds."""

    hidden_size: Annotated[int, Field(ge=8, le=1024, description="width of the hidden states; an even multiple of heads")] = 96
    layers: Annotated[int, Field(ge=1, le=16, description="transformer blocks")] = 2
    heads: Annotated[int, Field(ge=1, le=16, description="attention heads")] = 4
    intermediate_size: Annotated[int, Field(ge=8, le=4096, description="width of the feed-forward part")] = 288
    context: Annotated[int, Field(ge=16, le=4096, description="longest sequence in tokens")] = 128
    seed: Annotated[int, Field(ge=0, lt=2**64, description="seed of the random weights")] = 0

    @model_validator(mode="after")
    def width_splits_into_heads(self) -> Self:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size must be an even multiple of heads, got {self.hidden_size} and {self.heads}")
        return self


class Lora(Section):
    """Low-rank adapters beside frozen weights (peft)."""

    kind: Literal["lora"] = "lora"
    rank: Annotated[int, Field(ge=1, le=1024, description="rank of the two low-rank factors")] = 16
    alpha: Annotated[float, Field(gt=0, le=MOST, description="the adapter's output is multiplied by alpha / rank")] = 32
    dropout: Annotated[float, Field(ge=0, lt=1, description="dropout on the adapter's input while training")] = 0.0
    target_modules: Annotated[
        Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | Literal["all-linear"],
        Field(description="names of the linear layers to adapt (each must exist in the model), or all-linear"),
    ] = "all-linear"
    target_parameters: Annotated[
        Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | Literal["experts"] | None,
        Field(
            description="weights to adapt that are no linear layers, by the ends of their paths, for example "
            "experts.down_proj; or experts: the stacked weights of all routed experts"
        ),
    ] = None

    @model_validator(mode="after")
    def no_dropout_before_parameters(self) -> Self:
        if self.dropout and self.target_parameters is not None:
            raise ValueError(f"dropout must be 0 with target_parameters, got {self.dropout:g}: these layers' inputs have none")
        return self


class Full(Section):
    """Every weight is trained."""

    kind: Literal["full"] = "full"


Adapter = Annotated[Lora | Full, Field(discriminator="kind")]


NAMED = rf"^(ckpt_[0-9a-z]+|{ALIAS})$"


def _is_an_id_or_an_alias(value: str) -> str:
    if re.fullmatch(NAMED, value, re.ASCII) is None:
        raise ValueError(f"must be the id of a checkpoint (ckpt_...) or an alias (digits@production), got {value[:200]!r}")
    return value


CheckpointName = Annotated[
    str,
    Field(
        json_schema_extra={"pattern": NAMED},
        description="ckpt_..., or an alias such as digits@production: the checkpoint that it points at now",
    ),
    AfterValidator(_is_an_id_or_an_alias),
]


class CheckpointRef(Section):
    """A checkpoint of an earlier job of the same project, to start from."""

    id: CheckpointName
    load: Annotated[
        Literal["weights", "weights+optimizer"],
        Field(description="what is taken from the checkpoint; the job counts its steps from 0 in both cases"),
    ] = "weights"


class ModelSpec(Section):
    """The model that is trained."""

    source: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=512,
            description="tiny, a folder such as models/mine, or a hub id; may be left out with from_checkpoint",
        ),
    ] = None
    revision: Annotated[str | None, Field(description="branch, tag or commit of a hub model; resolved to a commit at load")] = (
        None
    )
    tiny: Annotated[TinyConfig | None, Field(description="the shape of `source: tiny`")] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(description="the weights' data type; auto: float32 on a CPU, bfloat16 on a GPU (coarser than GSPO's clips)"),
    ] = "auto"
    adapter: Annotated[
        Adapter | None,
        Field(
            description="a LoRA adapter or all weights; default: as in the checkpoint, otherwise full for tiny, lora for others"
        ),
    ] = None
    from_checkpoint: Annotated[
        CheckpointRef | None, Field(description="the checkpoint to start from: an object, or only its id")
    ] = None

    @field_validator("from_checkpoint", mode="before")
    @classmethod
    def id_alone(cls, value: Any) -> Any:
        return {"id": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def something_to_load(self) -> Self:
        if self.source is None and self.from_checkpoint is None:
            raise ValueError("name a `source` (tiny, a folder, or a hub id) or a `from_checkpoint`")
        if self.tiny is not None and self.source not in (None, "tiny"):
            raise ValueError(f"tiny goes with `source: tiny`, got source {self.source!r}")
        return self
