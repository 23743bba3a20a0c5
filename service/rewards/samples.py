"""The inputs and outputs of graders."""

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
    """A sample's scores. `total` (the weighted sum) is None if any grader could not grade it; `errors` says why."""

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
    """Apply `grade`, whose time is bounded, to each. Once failed samples have taken LOST_WITHIN_S in all, give up the rest: ten
    thousand answers of five seconds each must not stop a job for a day."""
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
    """What graders know in addition to their own section of the spec."""

    job_id: str
    name: str  # of this grader in metrics
    pointer: str  # its place in the spec
    secrets: Mapping[str, SecretStr]
    networks: Networks = ()  # that http graders may reach in addition to public addresses


class Grader(ABC):
    """One entry of `reward.graders`, made from its section of the spec and a GraderContext. For use by one thread."""

    @abstractmethod
    def grade(self, samples: Sequence[Sample]) -> list[Outcome]:
        """One outcome per sample, in order. Never hangs. Raises JobFailed if no sample of the job can be graded."""

    def close(self) -> None:  # noqa: B027 (most have nothing to give back)
        """Release processes and connections. May be called twice."""
