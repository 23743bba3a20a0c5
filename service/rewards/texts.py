"""Checks whether the patterns and JSON Schemas of a spec are valid. The check runs in the sandbox, which bounds its time and
frees its memory; the calling process compiles none of them."""

from collections.abc import Iterator, Mapping, Sequence
from time import monotonic
from typing import Any

from service.errors import FieldError, JobFailed, Unavailable
from service.rewards.samples import NotGraded
from service.rewards.sandbox import Sandbox
from service.spec.reward import Grader, JsonSchemaGrader, RewardSpec
from service.validation import shown

WITHIN_S = 5.0  # for one pattern or schema; all of a spec together have twice as long
MEMORY_BYTES = 2**30  # for all of a spec together


def wrong_texts(reward: RewardSpec | None) -> list[FieldError]:
    """`wrong_graders` of a spec's reward."""
    return [] if reward is None else wrong_graders({"/reward/graders": reward.graders})


def has_texts(graders: Sequence[Grader]) -> bool:
    """Whether they have any that the sandbox must check."""
    return any(True for _ in _texts("", graders))


def wrong_graders(graders: Mapping[str, Sequence[Grader]]) -> list[FieldError]:
    """One FieldError for each that is invalid or exceeds the sandbox's limits. Lists of graders come by their pointers, and
    share one sandbox with its bounds. Raises Unavailable if it cannot start."""
    asked = [text for pointer, several in graders.items() for text in _texts(pointer, several)]
    if not asked:
        return []
    sandbox, until = Sandbox("text", {}, "/reward", within_s=WITHIN_S, memory_bytes=MEMORY_BYTES), monotonic() + 2 * WITHIN_S
    errors: list[FieldError] = []
    try:
        for pointer, kind, value in asked:
            outcome = sandbox.ask_all([(kind, value)])[0] if monotonic() < until else NotGraded("no time was left")
            if isinstance(outcome, NotGraded):
                errors.append(FieldError(pointer, _said(outcome), got=shown(value)))
    except JobFailed as error:
        raise Unavailable(f"patterns and schemas cannot be checked just now: {error.detail}") from None
    finally:
        sandbox.close()
    return errors


def _texts(pointer: str, graders: Sequence[Grader]) -> Iterator[tuple[str, str, Any]]:
    for number, grader in enumerate(graders):
        for name, pattern in grader.patterns.items():
            yield f"{pointer}/{number}/{name}", "pattern", pattern
        if isinstance(grader, JsonSchemaGrader):
            yield f"{pointer}/{number}/schema", "schema", grader.json_schema


def _said(outcome: NotGraded) -> str:
    kind, _, reason = outcome.detail.partition("ValueError: ")
    if reason and not kind:
        return reason
    return f"cannot be checked within {WITHIN_S:g} s and {MEMORY_BYTES >> 20} MiB; make it, or the patterns beside it, smaller"
