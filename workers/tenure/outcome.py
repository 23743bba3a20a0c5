"""The ways in which an attempt can end. The loop returns one, and `Tenure.settle` records it."""

from dataclasses import dataclass
from typing import Any

from service.errors import Failure
from service.states import Wish


@dataclass(frozen=True)
class Succeeded:
    """The job is done. `reason`: max_steps, target_reached or no_improvement."""

    result: dict[str, Any]
    reason: str


@dataclass(frozen=True)
class Paused:
    """The job pauses, as its owner wished or for another `reason`."""

    reason: str = "paused"


@dataclass(frozen=True)
class Cancelled:
    """The job was cancelled."""


@dataclass(frozen=True)
class Drained:
    """This worker stops; another continues the job at once."""


@dataclass(frozen=True)
class Failed:
    """The attempt failed at `step`. The failure's code says whether the job is retried, pauses or fails."""

    failure: Failure
    step: int
    result: dict[str, Any] | None = None


class Interrupted(Exception):
    """Raised inside of work that waits for something outside, when there is a wish: `Interrupted(wish)`."""

    @property
    def wish(self) -> Wish:
        return Wish(self.args[0])


Outcome = Succeeded | Paused | Cancelled | Drained | Failed


def obeyed(wish: Wish) -> Outcome:
    """The outcome after obeying this wish."""
    return {Wish.PAUSE: Paused(), Wish.DRAIN: Drained()}.get(wish, Cancelled())
