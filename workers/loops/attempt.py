"""One attempt at a managed job: the parts that are alive for its length, and what one step of it gives."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from service.jobs.data import Data, Row
from service.jobs.lease import RolloutRow
from service.rewards.rewards import Rewards
from service.spec.job import RLSpec, SupervisedSpec
from workers.loops.progress import Progress
from workers.policy.errors import PolicyFailed
from workers.policy.learner import Learner
from workers.policy.policy import Policy
from workers.tenure.tenure import EventRow, Tenure


@dataclass(frozen=True)
class StepResult:
    """What one training step gives to be kept."""

    metrics: dict[str, float]
    rollouts: list[RolloutRow] = field(default_factory=list)
    events: list[EventRow] = field(default_factory=list)

    def __add__(self, other: "StepResult") -> "StepResult":
        metrics = {**self.metrics, **other.metrics}
        return StepResult(metrics, self.rollouts + other.rollouts, self.events + other.events)


def prompt_tokens(attempt: "Attempt", row: Row, number: int) -> list[int]:
    """The tokens of a row's prompt; what its chat template refuses is said to be about this row."""
    with in_row(number):
        return attempt.policy.text.encode(attempt.data.prompt(row), **attempt.data.template_options(row))


@contextmanager
def in_row(number: int) -> Iterator[None]:
    """What a policy refuses inside is said to be about this row."""
    try:
        yield
    except PolicyFailed as error:
        raise PolicyFailed(error.code, f"row {number}: {error.detail}", hint=error.hint, subject=error.subject) from None


@dataclass
class Attempt:
    """What is loaded, and the tenure through which the attempt speaks to the store."""

    tenure: Tenure
    spec: RLSpec | SupervisedSpec
    data: Data
    rewards: Rewards | None
    policy: Learner
    progress: Progress
    reference: Policy | None = None  # where the objective needs its log_probs


TrainingStep = Callable[[Attempt, int], StepResult]
