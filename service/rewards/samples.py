"""What graders take and give."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeVar

from pydantic import SecretStr

from service.spec.addresses import Networks

LOST_WITHIN_S = 60.0


@dataclass(frozen=True)
class Sample:
    """One sampled answer. `prompt` is text or chat messages, `tokens` the answer's length, `row` the row it came from."""

    prompt: str | list[dict[str, Any]]
    completion: str
    tokens: int
    truncated: bool
    row: dict[str, Any]


@dataclass(frozen=True)
class Graded:
    """What a sample got. `total` (the weighted sum) is None when any grader could not grade it; `errors` says why."""

    total: float | None
    scores: dict[str, float | None]
    errors: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NotGraded:
    """Why one grader could not grade one sample."""

    detail: str


Outcome = float | NotGraded
A = TypeVar("A")
B = TypeVar("B")


def one_by_one(grade: Callable[[A], B | NotGraded], samples: Sequence[A]) -> list[B | NotGraded]:
    """Apply `grade`, which is bounded, to each. After LOST_WITHIN_S went into samples that brought nothing, the rest is given
    up: ten thousand answers, each of which takes its five seconds, must not stop a job for a day."""
    outcomes: list[B | NotGraded] = []
    lost_s = 0.0
    for sample in samples:
        if lost_s > LOST_WITHIN_S:
            outcomes.append(NotGraded(f"not graded: other answers of this batch took {lost_s:.0f} s and brought nothing"))
            continue
        began = monotonic()
        outcomes.append(grade(sample))
        if isinstance(outcomes[-1], NotGraded):
            lost_s += monotonic() - began
    return outcomes


@dataclass(frozen=True)
class GraderContext:
    """What graders may know beside their own section of the spec."""

    job_id: str
    name: str  # of this grader, as in metrics
    pointer: str  # where it stands in the spec
    secrets: Mapping[str, SecretStr]
    networks: Networks = ()  # that http graders may reach beside public addresses


class Grader(ABC):
    """One entry of `reward.graders`. Takes its section of the spec and a GraderContext; is used from one thread."""

    @abstractmethod
    def grade(self, samples: Sequence[Sample]) -> list[Outcome]:
        """One outcome a sample, in order. Never hangs. Raises JobFailed where no sample of the job can be graded."""

    def close(self) -> None:  # noqa: B027 (most have nothing to give back)
        """Give back processes and connections. May be called twice."""
