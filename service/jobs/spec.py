"""The job spec: everything that may be asked of a job, each field with its one-line description.

Two kinds share most sections: `rl` (sample, grade, update) and `supervised` (cross-entropy on given answers). The models
are frozen and refuse unknown keys; `service.validation.parse` turns pydantic's complaints into JSON pointers and names
the nearest legal key. Checks that need the store (does the dataset exist) stand in `service.jobs.resolve`. The sections
`data` and `reward` have modules of their own.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from service.jobs.data_spec import (
    DatasetSource,
    DataSpec,
    EvalSource,
    InlineSource,
    Message,
    ReasoningGymSource,
    SplitSource,
    TrainSource,
)
from service.jobs.objective import ObjectiveSpec
from service.jobs.reward_spec import Grader, HttpGrader, RewardSpec
from service.jobs.section import Section

__all__ = [  # with what other modules of the spec define, so that one import has it all
    "DataSpec",
    "DatasetSource",
    "EvalSource",
    "Grader",
    "HttpGrader",
    "InlineSource",
    "JobSpec",
    "Message",
    "RLSpec",
    "ReasoningGymSource",
    "RewardSpec",
    "Section",
    "SplitSource",
    "SupervisedSpec",
    "TrainSource",
]

# ---------------------------------------------------------------- model


class TinyConfig(Section):
    """A small Llama with a character tokenizer, made from nothing: works offline, trains on a CPU in seconds."""

    hidden_size: Annotated[int, Field(ge=8, le=1024, description="width; a multiple of heads")] = 96
    layers: Annotated[int, Field(ge=1, le=16, description="transformer blocks")] = 2
    heads: Annotated[int, Field(ge=1, le=16, description="attention heads")] = 4
    intermediate_size: Annotated[int, Field(ge=8, le=4096, description="width of the feed-forward part")] = 288
    context: Annotated[int, Field(ge=16, le=4096, description="longest sequence in tokens")] = 128
    seed: Annotated[int, Field(ge=0, description="seed of the random weights")] = 0

    @model_validator(mode="after")
    def width_splits_into_heads(self) -> Self:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size must be an even multiple of heads, got {self.hidden_size} and {self.heads}")
        return self


class Lora(Section):
    """Low-rank adapters beside frozen weights (peft)."""

    kind: Literal["lora"] = "lora"
    rank: Annotated[int, Field(ge=1, le=1024, description="rank of the two factors")] = 16
    alpha: Annotated[float, Field(gt=0, description="scale; the update is multiplied by alpha / rank")] = 32
    dropout: Annotated[float, Field(ge=0, lt=1, description="dropout on the adapter's input while training")] = 0.0
    target_modules: Annotated[
        Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | Literal["all-linear"],
        Field(description="names of the linear layers to adapt, or all-linear"),
    ] = "all-linear"


class Full(Section):
    """Every weight is trained."""

    kind: Literal["full"] = "full"


Adapter = Annotated[Lora | Full, Field(discriminator="kind")]


class CheckpointRef(Section):
    """A checkpoint of an earlier job of the same project, to start from."""

    id: Annotated[str, Field(pattern=r"^ckpt_[0-9a-z]+$", description="ckpt_...")]
    load: Annotated[
        Literal["weights", "weights+optimizer"], Field(description="what is taken over; the step count starts at 0 either way")
    ] = "weights"


class ModelSpec(Section):
    """The model that is trained."""

    source: Annotated[
        str | None,
        Field(min_length=1, max_length=512, description="tiny, a folder, or a hub id; may be left out with from_checkpoint"),
    ] = None
    revision: Annotated[str | None, Field(description="branch, tag or commit of a hub model; resolved to a commit at load")] = (
        None
    )
    tiny: Annotated[TinyConfig | None, Field(description="the shape of `source: tiny`")] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], Field(description="of the weights; auto: float32 on a CPU, bfloat16 on a GPU")
    ] = "auto"
    adapter: Annotated[
        Adapter | None, Field(description="lora or full; default: as the checkpoint, else full for tiny and lora for others")
    ] = None
    from_checkpoint: Annotated[CheckpointRef | None, Field(description="start from these weights; an id alone will do")] = None

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


# ---------------------------------------------------------------- rollout


class RolloutSpec(Section):
    """How answers are sampled."""

    prompts_per_step: Annotated[int, Field(ge=1, le=4096, description="prompts in one step")] = 32
    group_size: Annotated[int, Field(ge=1, le=1024, description="answers to each prompt")] = 8
    max_prompt_tokens: Annotated[
        int | None, Field(ge=1, description="a longer prompt fails the job; default: what the context leaves")
    ] = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=131_072, description="an answer ends here at the latest")] = 64
    temperature: Annotated[float, Field(gt=0, le=10, description="of sampling; 1 samples the policy itself")] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, description="nucleus; 1 is off")] = 1.0
    top_k: Annotated[int, Field(ge=0, description="the k likeliest tokens; 0 is off")] = 0
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]], Field(max_length=16, description="texts that end an answer (kept in it)")
    ] = Field(default_factory=list)
    mask_truncated: Annotated[
        bool,
        Field(description="answers cut by max_completion_tokens bring no gradient (the same as objective.select.truncated)"),
    ] = False


# ---------------------------------------------------------------- update and optimizer


MicrobatchTokens = Annotated[
    Annotated[int, Field(ge=1)] | Literal["auto"],
    Field(description="tokens (with padding) in one forward pass; memory, never mathematics"),
]


class UpdateSpec(Section):
    """How a rollout becomes optimizer steps."""

    minibatches: Annotated[
        int, Field(ge=1, le=1024, description="optimizer steps per pass over a rollout; with 1 and one epoch no clip can act")
    ] = 4
    epochs: Annotated[int, Field(ge=1, le=64, description="passes over a rollout")] = 1
    microbatch_tokens: MicrobatchTokens = "auto"


class SupervisedUpdateSpec(Section):
    """How rows become optimizer steps."""

    batch_size: Annotated[int, Field(ge=1, le=65_536, description="rows in one optimizer step")] = 32
    microbatch_tokens: MicrobatchTokens = "auto"


class Schedule(Section):
    """The learning rate over optimizer steps: a linear warm-up, then the kind's shape down to min_ratio."""

    kind: Annotated[Literal["constant", "linear", "cosine"], Field(description="shape after the warm-up")] = "constant"
    warmup_steps: Annotated[int, Field(ge=0, description="optimizer steps from 0 to the full rate")] = 0
    min_ratio: Annotated[float, Field(ge=0, le=1, description="the last rate as a share of the full one")] = 0.0


class OptimizerSpec(Section):
    """AdamW."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0, le=1, description="the full rate")] = 1e-5
    betas: Annotated[tuple[float, float], Field(strict=False, description="decay of the two moments")] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0, description="added to the root of the second moment")] = 1e-8
    weight_decay: Annotated[float, Field(ge=0, description="decoupled")] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0, description="gradients are scaled down to this norm")] = 1.0
    schedule: Annotated[Schedule, Field(description="the rate over time")] = Schedule()

    @field_validator("betas")
    @classmethod
    def betas_below_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"each beta must lie in [0, 1), got {list(value)}")
        return value


# ---------------------------------------------------------------- when to look, keep and stop


class EvalSpec(Section):
    """Evaluation on data.eval: before the first step, every `every_steps`, and at the end."""

    every_steps: Annotated[int, Field(ge=1, description="training steps between evaluations")] = 10
    temperature: Annotated[float, Field(ge=0, le=10, description="of the answers that are graded; 0 is greedy")] = 0.0
    also_greedy: Annotated[bool, Field(description="measure greedy answers too, as eval/greedy/...")] = False
    max_completion_tokens: Annotated[int | None, Field(ge=1, description="default: rollout's, else 64")] = None


class KeepBest(Section):
    """The checkpoints with the best evaluations are kept, beside the newest."""

    metric: Annotated[str, Field(description="an evaluation metric")] = "eval/reward/mean"
    mode: Annotated[Literal["max", "min"], Field(description="which is better")] = "max"
    count: Annotated[int, Field(ge=1, le=100, description="how many of the best are kept")] = 1


class CheckpointsSpec(Section):
    """The last step is always saved."""

    every_steps: Annotated[int, Field(ge=1, description="training steps between checkpoints")] = 20
    keep_last: Annotated[int, Field(ge=1, description="the newest so many are kept")] = 2
    keep_best: Annotated[KeepBest | None, Field(description="and the best so many")] = None
    ttl_s: Annotated[
        float | None, Field(gt=0, le=315_360_000, description="each is deleted so long after it was saved; default: never")
    ] = None


class EarlyStopping(Section):
    """The job succeeds early when `target` is reached, or when `patience` evaluations brought no gain of min_delta."""

    metric: Annotated[str, Field(description="an evaluation metric")] = "eval/reward/mean"
    mode: Annotated[Literal["max", "min"], Field(description="which is better")] = "max"
    patience: Annotated[int | None, Field(ge=1, description="evaluations without a gain")] = None
    min_delta: Annotated[float, Field(ge=0, description="a smaller gain counts as none")] = 0.0
    target: Annotated[float | None, Field(description="stop when the metric is at least (mode min: at most) this")] = None

    @model_validator(mode="after")
    def something_to_stop_at(self) -> Self:
        if self.patience is None and self.target is None:
            raise ValueError("give `patience`, `target` or both")
        return self


class Budget(Section):
    """What the job may spend, over all attempts and with what was wasted; then it pauses as `budget_spent`."""

    tokens: Annotated[int | None, Field(ge=1, lt=2**62, description="sampled and trained")] = None
    worker_s: Annotated[float | None, Field(gt=0, description="seconds of a worker")] = None


class Limits(Section):
    """Where the job ends at the latest."""

    max_steps: Annotated[int, Field(ge=1, le=10_000_000, description="training steps; for rl one rollout each")] = 100
    max_runtime_s: Annotated[float, Field(gt=0, description="seconds of running, over all attempts; then the job fails")] = (
        86_400
    )
    max_attempts: Annotated[
        int, Field(ge=1, le=100, description="attempts that may end in a retryable error or a crash without a new checkpoint")
    ] = 3
    deadline_s: Annotated[
        float | None, Field(gt=0, le=31_536_000, description="seconds from submission, waiting included; then the job fails")
    ] = None
    budget: Annotated[Budget, Field(description="what the job may spend; it can be raised when it is resumed")] = Budget()
    stall_timeout_s: Annotated[
        float, Field(gt=0, description="an attempt that makes no progress for this long is given up")
    ] = 1800


class LogRollouts(Section):
    """Which sampled groups are kept to be read."""

    every_steps: Annotated[int, Field(ge=1, description="training steps between kept groups")] = 5
    groups: Annotated[int, Field(ge=0, le=256, description="how many groups of such a step; 0: none")] = 4


class Resources(Section):
    """What the job runs on."""

    class_: Annotated[Literal["any", "cpu", "gpu"], Field(alias="class", description="which workers may take it")] = "any"
    gpus: Annotated[Literal[1], Field(description="GPUs of one job; more than one is not offered yet")] = 1
    priority: Annotated[int, Field(ge=0, le=100, description="a higher one is taken first")] = 50


# ---------------------------------------------------------------- the two kinds


class SpecBase(Section):
    name: Annotated[str, Field(min_length=1, max_length=200, description="for people")] = "unnamed"
    tags: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=32, description="to filter lists by")
    ] = Field(default_factory=list)
    metadata: Annotated[dict[str, Any], Field(description="yours; stored and given back")] = Field(default_factory=dict)
    model: Annotated[ModelSpec, Field(description="the model that is trained")]
    data: Annotated[DataSpec, Field(description="the rows and how they become prompts")]
    optimizer: Annotated[OptimizerSpec, Field(description="AdamW and its learning rate")] = OptimizerSpec()
    eval: Annotated[EvalSpec, Field(description="when and how data.eval is evaluated")] = EvalSpec()
    checkpoints: Annotated[CheckpointsSpec, Field(description="when the weights are saved and what is kept")] = (
        CheckpointsSpec()
    )
    early_stopping: Annotated[EarlyStopping | None, Field(description="end before max_steps; none: never")] = None
    limits: Annotated[Limits, Field(description="how long the job may go on")] = Limits()
    log_rollouts: Annotated[LogRollouts, Field(description="which sampled groups are kept to be read")] = LogRollouts()
    resources: Annotated[Resources, Field(description="what the job runs on")] = Resources()
    seed: Annotated[int, Field(ge=0, lt=2**63, description="every random draw of the job derives from it")] = 0

    @model_validator(mode="after")
    def evaluation_has_rows(self) -> Self:
        if self.early_stopping is not None and self.data.eval is None:
            raise ValueError("early_stopping needs evaluations: give data.eval")
        if self.checkpoints.keep_best is not None and self.data.eval is None:
            raise ValueError("checkpoints.keep_best needs evaluations: give data.eval")
        return self


class RLSpec(SpecBase):
    """Reinforcement learning: sample groups, grade them, update the policy."""

    kind: Annotated[Literal["rl"], Field(description="reinforcement learning")]
    objective: Annotated[ObjectiveSpec, Field(description="the loss: a preset, and any of its seven axes overridden")]
    rollout: Annotated[RolloutSpec, Field(description="how answers are sampled")] = RolloutSpec()
    reward: Annotated[RewardSpec, Field(description="what a better answer is")]
    update: Annotated[UpdateSpec, Field(description="how a rollout becomes optimizer steps")] = UpdateSpec()

    @model_validator(mode="after")
    def sizes_fit(self) -> Self:
        advantage = self.objective.resolve()["advantage"]
        if self.rollout.group_size == 1 and (advantage["centre"] not in ("none", "given") or advantage["scale"] == "group_std"):
            raise ValueError(
                f"rollout.group_size is 1, but the advantage compares answers of a group "
                f"(centre {advantage['centre']}, scale {advantage['scale']}): every advantage would be 0. "
                f"Use group_size >= 2, or objective.advantage {{centre: none, scale: none}}"
            )
        sequences = self.rollout.prompts_per_step * self.rollout.group_size
        if sequences % self.update.minibatches:
            raise ValueError(
                f"update.minibatches must divide prompts_per_step x group_size, got {self.update.minibatches} and {sequences}"
            )
        return self

    @model_validator(mode="after")
    def a_job_has_what_the_objective_needs(self) -> Self:
        if self.objective.advantage.centre == "given":
            raise ValueError(
                "objective.advantage.centre is `given`, but a job has no advantages beside its rewards; "
                "set another centre, for example group_mean, leave_one_out or none"
            )
        if "segment_ids" in self.objective.needs():
            axis = "ratio" if self.objective.ratio.kind == "segment" else "correct"
            raise ValueError(f"objective.{axis}.chunk is missing: a job has no segment_ids; say how many tokens a segment has")
        if "entropy" in self.objective.needs():
            raise ValueError("objective.select.top_entropy is not offered in a job")
        return self


class SupervisedSpec(SpecBase):
    """Supervised fine-tuning: cross-entropy on the answers; `reward` grades sampled answers in evaluations."""

    kind: Annotated[Literal["supervised"], Field(description="cross-entropy on given answers")]
    reward: Annotated[RewardSpec | None, Field(description="graders for evaluations; none: eval/loss only")] = None
    update: Annotated[SupervisedUpdateSpec, Field(description="how rows become optimizer steps")] = SupervisedUpdateSpec()

    @model_validator(mode="after")
    def answers_are_given(self) -> Self:
        if self.data.answer is None:
            raise ValueError('data.answer is missing: a supervised job learns it; give a template, for example "{answer}"')
        return self


JobSpec = Annotated[RLSpec | SupervisedSpec, Field(discriminator="kind")]
