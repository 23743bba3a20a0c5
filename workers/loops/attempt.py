"""One attempt at a managed job: the objects that it uses from start to end, and the result of one step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from service.jobs.data import Data, Row
from service.jobs.lease import RolloutRow
from service.metric_names import OVERLONG_SKIPPED, OVERLONG_TRUNCATED
from service.rewards.rewards import Rewards
from service.spec.job import RLSpec, SupervisedSpec
from workers.loops.progress import Progress
from workers.policy.errors import PolicyFailed
from workers.policy.learner import Learner
from workers.policy.policy import Policy
from workers.tenure.tenure import EventRow, Tenure

if TYPE_CHECKING:
    from workers.loops.ahead import Ahead


@dataclass(frozen=True)
class StepResult:
    """What one training step produced and the store keeps."""

    metrics: dict[str, float]
    rollouts: list[RolloutRow] = field(default_factory=list)
    events: list[EventRow] = field(default_factory=list)

    def __add__(self, other: "StepResult") -> "StepResult":
        metrics = {**self.metrics, **other.metrics}
        return StepResult(metrics, self.rollouts + other.rollouts, self.events + other.events)


def prompt_tokens(attempt: "Attempt", row: Row, number: int) -> list[int]:
    """The tokens of a row's prompt. If the chat template refuses it, the error names the row."""
    with in_row(number):
        return attempt.policy.text.encode(attempt.data.prompt(row), **attempt.data.template_options(row))


@contextmanager
def in_row(number: int) -> Iterator[None]:
    """Add the row's number to a PolicyFailed that is raised inside."""
    try:
        yield
    except PolicyFailed as error:
        raise PolicyFailed(error.code, f"row {number}: {error.detail}", hint=error.hint, subject=error.subject) from None


@dataclass
class Attempt:
    """The loaded model, data and graders, and the tenure, through which the attempt writes to the store."""

    tenure: Tenure
    spec: RLSpec | SupervisedSpec
    data: Data
    rewards: Rewards | None
    policy: Learner
    progress: Progress
    reference: Policy | None = None  # if the objective needs its log_probs
    ahead: "Ahead | None" = None  # the next step's answers, while they are sampled
    skipped: int = 0  # rows of data.train that were left out because they are too long

    def overlong_metrics(self, cut: int) -> dict[str, float]:
        """A step's metrics about rows that are too long, unless those are refused; `cut` counts the prompts it had to cut."""
        if self.spec.data.overlong == "refuse":
            return {}
        return {OVERLONG_SKIPPED: float(self.skipped), OVERLONG_TRUNCATED: float(cut)}


TrainingStep = Callable[[Attempt, int], StepResult]
