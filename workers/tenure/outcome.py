"""How a piece of work may end, as its loop says it; `Tenure.settle` writes it down."""

from dataclasses import dataclass
from typing import Any

from service.errors import Failure
from service.states import Wish


@dataclass(frozen=True)
class Succeeded:
    """All was done that was asked. `reason`: why it ended just now."""

    result: dict[str, Any]
    reason: str


@dataclass(frozen=True)
class Paused:
    """It rests: its owner wished so, or for another reason."""

    reason: str = "paused"


@dataclass(frozen=True)
class Cancelled:
    """The wish to cancel was obeyed."""


@dataclass(frozen=True)
class Drained:
    """This worker stops; another goes on at once."""


@dataclass(frozen=True)
class Failed:
    """Whether it is tried again, pauses or fails for good stands in the failure's code. `step`: how far it was."""

    failure: Failure
    step: int
    result: dict[str, Any] | None = None


Outcome = Succeeded | Paused | Cancelled | Drained | Failed


def obeyed(wish: Wish) -> Outcome:
    """What it is to have done as wished."""
    return {Wish.PAUSE: Paused(), Wish.DRAIN: Drained()}.get(wish, Cancelled())
