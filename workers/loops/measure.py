"""Renders and measures every row that the job will take, before the first step.

A bad row ends the job at once. If data.overlong is skip, rows that are too long are left out here: all rows are then measured,
because the order of the remaining ones depends on each. It is the same in every attempt.

Rows of a procedural source may take long to make. Unless data.overlong is skip, they are made and measured when a step takes
them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from service.errors import JobFailed
from service.jobs.data import DataRows, ReasoningGymRows, Subset, indices_of_steps
from service.spec.job import RLSpec, SupervisedSpec
from service.states import Phase
from service.validation.words import counted
from workers.loops.attempt import Attempt, prompt_tokens
from workers.loops.sampling import draw_of, fitted
from workers.loops.supervised import encode

ROWS_AT_ONCE = 256
TOO_LONG = ("prompt_too_long", "sequence_too_long")
NAMED = 32  # rows in the job's facts


@dataclass(frozen=True)
class Part:
    """The rows of data.train or data.eval, and how the job uses them."""

    name: str
    rows: DataRows
    taken: Sequence[int]  # the indices of the rows that will be used
    sampled: int | None  # the most tokens of a sampled answer; None: nothing is sampled
    answers: bool  # whether the rows' own answers are read


def measure(attempt: Attempt) -> bool:
    """Check the rows, and leave out those that are too long if the spec says so. Raises JobFailed, with the row's number:
    prompt_too_long, prompt_empty, sequence_too_long, chat_refused, no_chat_template; or all_rows_overlong.

    Returns False, with nothing left out, if there is a wish, for example to pause or cancel.
    """
    overlong = attempt.spec.data.overlong
    kept, facts = dict[str, DataRows](), dict[str, Any]()
    for part in _parts(attempt):
        if isinstance(part.rows, ReasoningGymRows) and overlong != "skip":
            continue
        found: list[int] = []
        for chunk in _chunks(part.taken):
            if attempt.tenure.check(Phase.LOADING) is not None:
                return False
            found += [index for index in chunk if _is_overlong(attempt, part, index)]
        facts[part.name] = {
            "rows": len(part.taken),
            "overlong": len(found),
            "first": [part.rows.number(index) for index in found[:NAMED]],
        }
        if overlong == "skip" and found:
            kept[part.name] = _without(part, found)
    if "train" in kept:
        attempt.skipped = len(attempt.data.train) - len(kept["train"])
    attempt.data = replace(attempt.data, **kept)
    if overlong != "refuse":
        _tell(attempt, facts)
    return True


def _parts(attempt: Attempt) -> Iterator[Part]:
    spec, data = attempt.spec, attempt.data
    if isinstance(spec, RLSpec):
        taken = _taken(attempt, spec.rollout.prompts_per_step)
        yield Part("train", data.train, taken, spec.rollout.max_completion_tokens, answers=False)
    else:
        yield Part("train", data.train, _taken(attempt, spec.update.batch_size), None, answers=True)
    if data.eval is not None:
        sampled = draw_of(attempt, purpose="", temperature=0.0).max_tokens if attempt.rewards is not None else None
        answers = spec.data.answer is not None or isinstance(spec, SupervisedSpec)
        yield Part("eval", data.eval, range(len(data.eval)), sampled, answers)


def _is_overlong(attempt: Attempt, part: Part, index: int) -> bool:
    """Whether the row is to be skipped or its prompt will be cut. A row that the spec refuses raises JobFailed."""
    rows, number, cut = part.rows, part.rows.number(index), False
    try:
        if part.sampled is not None:
            prompt = prompt_tokens(attempt, rows[index], number)
            cut = fitted(attempt, [prompt], [number], part.sampled) != [prompt]
        if part.answers:
            cut |= any(example.cut for example in encode(attempt, rows, [index]))
    except JobFailed as failed:
        if attempt.spec.data.overlong != "skip" or failed.code not in TOO_LONG:
            raise
        return True
    return cut


def _without(part: Part, found: Sequence[int]) -> DataRows:
    if len(found) == len(part.rows):
        raise JobFailed(
            "all_rows_overlong",
            f"data.overlong is skip, and every row of data.{part.name} ({counted(len(part.rows), 'row')}) is too long",
            pointer="/data/overlong",
        )
    left_out = set(found)
    return Subset(part.rows, [index for index in range(len(part.rows)) if index not in left_out])


def _tell(attempt: Attempt, facts: dict[str, Any]) -> None:
    """Write into the job's facts how many rows were too long, by split, and a warning for each split that had some."""
    done = "leaves out" if attempt.spec.data.overlong == "skip" else "cuts the prompts of"
    warnings = [
        f"data.overlong: {attempt.spec.data.overlong} {done} {fact['overlong']} of "
        f"{counted(fact['rows'], 'row')} of data.{name}, "
        f"for example row {fact['first'][0]}"
        for name, fact in facts.items()
        if fact["overlong"]
    ]
    attempt.tenure.note({"overlong": facts, "warnings": [*attempt.policy.facts.get("warnings", ()), *warnings]})


def _taken(attempt: Attempt, per_step: int) -> Sequence[int]:
    """The training rows of the steps that are left; or all, if those that are too long are skipped."""
    spec, n = attempt.spec, len(attempt.data.train)
    if spec.data.overlong == "skip":
        return range(n)
    return indices_of_steps(n, attempt.progress.step + 1, spec.limits.max_steps, per_step, spec.seed, spec.data.train.shuffle)


def _chunks(indices: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(indices), ROWS_AT_ONCE):
        yield indices[start : start + ROWS_AT_ONCE]
