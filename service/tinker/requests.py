"""What clients of the Tinker wire send as JSON. Unknown fields are ignored: a newer client may send some."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MOST_SEQ = 2**53
MOST_SAMPLE_SEQ = 2**63 - 1  # clones of a sampling client count from random multiples of a billion
TTL = Annotated[int, Field(ge=3600, le=315_360_000, description="seconds: an hour to ten years")]
Id = Annotated[str, Field(min_length=1, max_length=64)]
Path = Annotated[str, Field(min_length=1, max_length=512)]
Metadata = dict[str, Any]


class Sent(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False, protected_namespaces=())


class CreateSession(Sent):
    tags: list[Annotated[str, Field(max_length=200)]] = Field(default_factory=list, max_length=100)
    user_metadata: Metadata | None = None
    display_name: Annotated[str | None, Field(max_length=200)] = None


class OfSession(Sent):
    session_id: Id


class FinishReason(Sent):
    type: Literal["success", "errored", "interrupted"]


class FinishSession(Sent):
    reason: FinishReason
    detail: str | None = None


class LoraConfig(Sent):
    rank: Annotated[int, Field(ge=1, le=1024)]
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerConfig(Sent):
    type: str = "adamw"


class CreateModel(Sent):
    session_id: Id
    model_seq_id: Annotated[int, Field(ge=0, le=MOST_SEQ)]
    base_model: Annotated[str, Field(min_length=1, max_length=512)]
    user_metadata: Metadata | None = None
    lora_config: LoraConfig | None = None
    optimizer_config: OptimizerConfig = OptimizerConfig()


class OfModel(Sent):
    model_id: Id


class _Ordered(OfModel):
    seq_id: Annotated[int, Field(ge=1, le=MOST_SEQ)]


class AdamParams(Sent):
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: Annotated[float, Field(ge=0)] = 0.0


class OptimStep(_Ordered):
    """Its parameters are read later: if they are refused, the step uses up its place all the same."""

    adam_params: Any = None
    optimizer_params: Any = None


class LoadWeights(Sent):
    """Into a new model (session_id, model_seq_id), or into one that is there (model_id, seq_id)."""

    model_id: Id | None = None
    seq_id: Annotated[int | None, Field(ge=1, le=MOST_SEQ)] = None
    session_id: Id | None = None
    model_seq_id: Annotated[int | None, Field(ge=0, le=MOST_SEQ)] = None
    base_model: Annotated[str | None, Field(min_length=1, max_length=512)] = None
    user_metadata: Metadata | None = None
    path: Path
    optimizer: bool
    optimizer_config: OptimizerConfig | None = None


class SaveWeights(_Ordered):
    path: Any = None
    ttl_seconds: Any = None
    overwrite: bool = False
    user_metadata: Metadata | None = None


class SaveWeightsForSampler(SaveWeights):
    sampling_session_seq_id: Annotated[int | None, Field(ge=0, le=MOST_SEQ)] = None


class SaveWeightsExternal(SaveWeights):
    age_encryption_recipients: list[str] | None = None


class CreateSamplingSession(Sent):
    session_id: Id
    sampling_session_seq_id: Annotated[int, Field(ge=0, le=MOST_SEQ)]
    base_model: Annotated[str | None, Field(min_length=1, max_length=512)] = None
    model_path: Path | None = None


class OfSampler(Sent):
    sampling_session_id: Id


class Prompt(Sent):
    chunks: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=4096)]


class SamplingParams(Sent):
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: str | list[str] | list[Annotated[int, Field(ge=0, lt=2**31)]] | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=MOST_SEQ)] = -1
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


class TensorData(Sent):
    data: list[int]
    dtype: Literal["int64"]
    shape: list[Annotated[int, Field(ge=0, le=2**31)]]
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None


class SampleBody(Sent):
    """What to sample. It is read after the address: if it is refused, the client is told in its answer."""

    num_samples: Annotated[int, Field(ge=1, le=1024)] = 1
    prompt: Prompt
    sampling_params: SamplingParams
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: Annotated[int, Field(ge=0, le=128)] = 0
    topk_sample_logprobs: Annotated[int, Field(ge=0, le=128)] = 0
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: Annotated[int | None, Field(ge=1)] = None


class SampleAddress(OfSampler):
    seq_id: Annotated[int, Field(ge=0, le=MOST_SAMPLE_SEQ)]


class RetrieveFuture(Sent):
    request_id: Annotated[str, Field(min_length=1, max_length=100_000)]


class OfPath(Sent):
    tinker_path: Path


class CopyWeights(Sent):
    source_path: Path
    session_id: Id | None = None
    model_seq_id: Annotated[int | None, Field(ge=0, le=MOST_SEQ)] = None
    destination_project_id: str | None = None
    ttl_seconds: TTL | None = None


class SetTtl(Sent):
    ttl_seconds: TTL | None = None


class SearchCursor(Sent):
    last_created_at: str
    last_session_id: Id


class Statuses(Sent):
    type: str
    reasons: list[str] | None = None


class SearchSessions(Sent):
    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = Field(default_factory=dict)
    display_name: str | None = None
    statuses: list[Statuses] | None = None
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    cursor: SearchCursor | None = None
