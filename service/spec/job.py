"""The job spec: everything that may be asked of a managed job, each field with its one-line description.

Two kinds share most sections: `rl` (sample, grade, update) and `supervised` (cross-entropy on given answers). The models
are frozen and refuse unknown keys; `service.validation.parse` turns pydantic's complaints into JSON pointers and names
the nearest legal key. Checks that need the store (does the dataset exist) stand in `service.jobs.resolve`. The larger
sections have modules of their own; what a session is asked with, too, stands in `service.spec.work`.
"""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from service.metric_names import EVAL_REWARD_MEAN
from service.spec.data import DataSpec
from service.spec.objective import ObjectiveSpec
from service.spec.reward import RewardSpec
from service.spec.section import MOST, MOST_COUNTED, Section
from service.spec.tensors import OF_A_JOB, uses
from service.spec.training import COLDEST, OptimizerSpec, RolloutSpec, SupervisedUpdateSpec, UpdateSpec
from service.spec.work import WorkLimits, WorkSpec


def _greedy_or_not_too_cold(value: float) -> float:
    if 0 < value < COLDEST:
        raise ValueError(f"must be 0 (greedy), or at least {COLDEST:g}, got {value:g}")
    return value


class EvalSpec(Section):
    """Evaluation on data.eval: before the first step, every `every_steps`, and at the end."""

    every_steps: Annotated[int, Field(ge=1, le=MOST_COUNTED, description="training steps between evaluations")] = 10
    temperature: Annotated[
        float,
        Field(ge=0, le=10, description="sampling temperature of the answers that are graded; 0 is greedy"),
        AfterValidator(_greedy_or_not_too_cold),
    ] = 0.0
    also_greedy: Annotated[bool, Field(description="also measure greedy answers, as metrics named eval/greedy/...")] = False
    max_completion_tokens: Annotated[
        int | None,
        Field(
            ge=1,
            le=MOST_COUNTED,
            description="the longest answer in tokens; default: rollout.max_completion_tokens, or 64 without a rollout",
        ),
    ] = None


class KeepBest(Section):
    """A new best is saved when it is found, and the best are kept beside the newest."""

    metric: Annotated[str, Field(description="the evaluation metric to compare")] = EVAL_REWARD_MEAN
    mode: Annotated[Literal["max", "min"], Field(description="whether a larger (max) or a smaller (min) value is better")] = (
        "max"
    )
    count: Annotated[int, Field(ge=1, le=100, description="how many of the best are kept")] = 1


class CheckpointsSpec(Section):
    """The last step is always saved."""

    every_steps: Annotated[int, Field(ge=1, le=MOST_COUNTED, description="training steps between checkpoints")] = 20
    keep_last: Annotated[int, Field(ge=1, le=MOST_COUNTED, description="how many of the newest checkpoints are kept")] = 2
    keep_best: Annotated[
        KeepBest | None,
        Field(description="also keep the best checkpoints; with early_stopping the best one by its metric is always kept"),
    ] = None
    ttl_s: Annotated[
        float | None,
        Field(gt=0, le=315_360_000, description="seconds after which a saved checkpoint is deleted; default: never"),
    ] = None


class EarlyStopping(Section):
    """The job succeeds early when `target` is reached, or when `patience` evaluations brought no gain of min_delta."""

    metric: Annotated[str, Field(description="the evaluation metric to compare")] = EVAL_REWARD_MEAN
    mode: Annotated[Literal["max", "min"], Field(description="whether a larger (max) or a smaller (min) value is better")] = (
        "max"
    )
    patience: Annotated[
        int | None, Field(ge=1, le=MOST_COUNTED, description="stop after this many evaluations without an improvement")
    ] = None
    min_delta: Annotated[float, Field(ge=0, le=MOST, description="an improvement smaller than this does not count")] = 0.0
    target: Annotated[
        float | None,
        Field(
            ge=-MOST, le=MOST, description="stop when the metric reaches this value: at least it, or at most it with mode min"
        ),
    ] = None

    @model_validator(mode="after")
    def something_to_stop_at(self) -> Self:
        if self.patience is None and self.target is None:
            raise ValueError("give `patience`, `target` or both")
        return self


class LogRollouts(Section):
    """Which sampled groups are kept to be read."""

    every_steps: Annotated[
        int, Field(ge=1, le=MOST_COUNTED, description="training steps between two steps whose groups are kept")
    ] = 5
    groups: Annotated[int, Field(ge=0, le=256, description="how many groups of such a step are kept; 0: none")] = 4


class Limits(WorkLimits):
    """Where the job ends at the latest."""

    max_steps: Annotated[
        int, Field(ge=1, le=10_000_000, description="the number of training steps; in an rl job each has one rollout")
    ] = 100
    on_no_signal: Annotated[
        Literal["warn", "pause", "fail"],
        Field(description="when nothing was learnt for no_signal_steps: groups without spread, a gradient of 0 and the like"),
    ] = "warn"
    no_signal_steps: Annotated[
        int, Field(ge=1, le=MOST_COUNTED, description="training steps in a row without a signal, before on_no_signal acts")
    ] = 20


class ManagedSpec(WorkSpec):
    """What the jobs whose loop is ours have in common."""

    data: Annotated[DataSpec, Field(description="the rows and how they become prompts")]
    optimizer: Annotated[OptimizerSpec, Field(description="AdamW and its learning rate")] = OptimizerSpec()
    eval: Annotated[EvalSpec, Field(description="when and how data.eval is evaluated")] = EvalSpec()
    checkpoints: Annotated[CheckpointsSpec, Field(description="when the weights are saved and what is kept")] = (
        CheckpointsSpec()
    )
    early_stopping: Annotated[
        EarlyStopping | None, Field(description="when to end before max_steps; without it the job always runs to max_steps")
    ] = None
    limits: Annotated[Limits, Field(description="how long the job may go on")] = Limits()
    log_rollouts: Annotated[LogRollouts, Field(description="which sampled groups are kept to be read")] = LogRollouts()

    @property
    def kept_best(self) -> list[KeepBest]:
        """Of which evaluations the best are saved and kept: keep_best's, and the one that early stopping looks at."""
        rules = [self.checkpoints.keep_best] if self.checkpoints.keep_best else []
        if (stop := self.early_stopping) and all((rule.metric, rule.mode) != (stop.metric, stop.mode) for rule in rules):
            rules.append(KeepBest(metric=stop.metric, mode=stop.mode))
        return rules

    @model_validator(mode="after")
    def evaluation_has_rows(self) -> Self:
        if self.early_stopping is not None and self.data.eval is None:
            raise ValueError("early_stopping needs evaluations: give data.eval")
        if self.checkpoints.keep_best is not None and self.data.eval is None:
            raise ValueError("checkpoints.keep_best needs evaluations: give data.eval")
        return self


class RLSpec(ManagedSpec):
    """Reinforcement learning: sample groups, grade them, update the policy."""

    kind: Annotated[Literal["rl"], Field(description="reinforcement learning")]
    objective: Annotated[ObjectiveSpec, Field(description="the loss: a preset, and any of its seven axes overridden")]
    rollout: Annotated[RolloutSpec, Field(description="how answers are sampled")] = RolloutSpec()
    reward: Annotated[RewardSpec, Field(description="the graders that score the answers")]
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
    def nothing_is_learnt_from_answers(self) -> Self:
        if self.data.learn == "all":
            raise ValueError("data.learn is for supervised jobs only; a job of kind rl learns from rewards")
        return self

    @model_validator(mode="after")
    def a_job_has_what_the_objective_needs(self) -> Self:
        if self.objective.advantage.centre == "given":
            raise ValueError(
                "objective.advantage.centre is `given`, but a job has no advantages beside its rewards; "
                "set another centre, for example group_mean, leave_one_out or none"
            )
        needed = uses(self.objective, OF_A_JOB).needed
        if "segment_ids" in needed:
            axis = "ratio" if self.objective.ratio.kind == "segment" else "correct"
            raise ValueError(f"objective.{axis}.chunk is missing: a job has no segment_ids; say how many tokens a segment has")
        if "entropy" in needed:
            raise ValueError("objective.select.top_entropy is not offered in a job")
        return self


class SupervisedSpec(ManagedSpec):
    """Supervised fine-tuning: cross-entropy on the answers; `reward` grades sampled answers in evaluations."""

    kind: Annotated[Literal["supervised"], Field(description="cross-entropy on given answers")]
    reward: Annotated[
        RewardSpec | None, Field(description="graders for evaluations; without them only eval/loss is measured")
    ] = None
    update: Annotated[SupervisedUpdateSpec, Field(description="how rows become optimizer steps")] = SupervisedUpdateSpec()

    @model_validator(mode="after")
    def answers_are_given(self) -> Self:
        if self.data.answer is None and not isinstance(self.data.chat, str):
            raise ValueError(
                'data.answer is missing: a supervised job learns it; give a template, for example "{answer}", '
                "or data.chat with the name of a column of messages that end with the assistant's"
            )
        return self


JobSpec = Annotated[RLSpec | SupervisedSpec, Field(discriminator="kind")]
