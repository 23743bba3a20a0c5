"""The states of a job and the legal moves between them: data, standard library only.

validating -> queued | failed | cancelled
queued     -> running | paused | cancelled | failed
running    -> succeeded | failed | queued (lease lost, drained, retryable error) | pausing | cancelling
pausing    -> paused | running (save failed) | succeeded | failed | cancelling
paused     -> queued | cancelled | failed
cancelling -> cancelled
succeeded, failed, cancelled: final. To try again is to fork.
"""

from enum import StrEnum
from types import MappingProxyType


class Status(StrEnum):
    VALIDATING = "validating"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Phase(StrEnum):
    """What a running job is doing now. Phases may follow in any order."""

    LOADING = "loading"
    SAMPLING = "sampling"
    GRADING = "grading"
    UPDATING = "updating"
    EVALUATING = "evaluating"
    SAVING = "saving"


class Wish(StrEnum):
    """What a running job's worker is asked to do. The worker reads it whenever it renews its lease."""

    PAUSE = "pause"
    CANCEL = "cancel"
    SAVE_AND_CANCEL = "save_and_cancel"
    DRAIN = "drain"


S = Status
MOVES = MappingProxyType(
    {
        S.VALIDATING: frozenset({S.QUEUED, S.FAILED, S.CANCELLED}),
        S.QUEUED: frozenset({S.RUNNING, S.PAUSED, S.CANCELLED, S.FAILED}),
        S.RUNNING: frozenset({S.SUCCEEDED, S.FAILED, S.QUEUED, S.PAUSING, S.CANCELLING}),
        S.PAUSING: frozenset({S.PAUSED, S.RUNNING, S.SUCCEEDED, S.FAILED, S.CANCELLING}),
        S.PAUSED: frozenset({S.QUEUED, S.CANCELLED, S.FAILED}),
        S.CANCELLING: frozenset({S.CANCELLED}),
        S.SUCCEEDED: frozenset[Status](),
        S.FAILED: frozenset[Status](),
        S.CANCELLED: frozenset[Status](),
    }
)
FINAL = frozenset(status for status, targets in MOVES.items() if not targets)
HELD = frozenset({S.RUNNING, S.PAUSING, S.CANCELLING})  # a worker holds (or held) a lease on these

# A user's actions: the statuses in which each is legal, and the status that follows at once.
ACTIONS = MappingProxyType(
    {
        "pause": {S.QUEUED: S.PAUSED, S.RUNNING: S.PAUSING},
        "resume": {S.PAUSED: S.QUEUED},
        "cancel": {
            S.VALIDATING: S.CANCELLED,
            S.QUEUED: S.CANCELLED,
            S.RUNNING: S.CANCELLING,
            S.PAUSING: S.CANCELLING,
            S.PAUSED: S.CANCELLED,
        },
    }
)


def is_legal(source: Status, target: Status) -> bool:
    return target in MOVES[source]


def allowed_actions(status: Status) -> list[str]:
    """A user's legal actions on a job in this status: those of ACTIONS, and fork and delete in final statuses."""
    actions = [name for name, moves in ACTIONS.items() if status in moves]
    if status is not S.VALIDATING:
        actions.append("fork")
    if status in FINAL:
        actions.append("delete")
    return actions
