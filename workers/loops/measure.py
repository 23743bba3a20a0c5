"""Renders and measures every row that the job will take, before the first step, so that a bad row ends the job at once.

Rows of a procedural source may take long to make. They are made and measured when a step takes them.
"""

from collections.abc import Iterator, Sequence

from service.jobs.data import DataRows, ReasoningGymRows, indices_of_steps
from service.spec.job import RLSpec, SupervisedSpec
from service.states import Phase
from workers.loops.attempt import Attempt, prompt_tokens
from workers.loops.sampling import check_lengths, draw_of
from workers.loops.supervised import encode

ROWS_AT_ONCE = 256


def measure(attempt: Attempt) -> None:
    """Raises JobFailed with the row's number: prompt_too_long, prompt_empty, sequence_too_long, chat_refused, no_chat_template.

    Returns early if there is a wish, for example to pause or cancel; the loop checks for it again.
    """
    spec, data = attempt.spec, attempt.data
    # Rows, the indices to measure, the most tokens of a sampled answer, whether the rows' answers are read.
    parts: list[tuple[DataRows, Sequence[int], int | None, bool]] = []
    if isinstance(spec, RLSpec):
        parts.append((data.train, _taken(attempt, spec.rollout.prompts_per_step), spec.rollout.max_completion_tokens, False))
    else:
        parts.append((data.train, _taken(attempt, spec.update.batch_size), None, True))
    if data.eval is not None:
        sampled = draw_of(attempt, purpose="", temperature=0.0).max_tokens if attempt.rewards is not None else None
        parts.append(
            (data.eval, range(len(data.eval)), sampled, spec.data.answer is not None or isinstance(spec, SupervisedSpec))
        )
    for rows, taken, sampled, answers in parts:
        if isinstance(rows, ReasoningGymRows):
            continue
        for chunk in _chunks(taken):
            if attempt.tenure.check(Phase.LOADING) is not None:
                return
            if sampled is not None:
                prompts = [prompt_tokens(attempt, rows[index], rows.number(index)) for index in chunk]
                check_lengths(attempt, prompts, [rows.number(index) for index in chunk], sampled)
            if answers:
                encode(attempt, rows, chunk)


def _taken(attempt: Attempt, per_step: int) -> Sequence[int]:
    """The training rows of the steps that are left."""
    spec, n = attempt.spec, len(attempt.data.train)
    return indices_of_steps(n, attempt.progress.step + 1, spec.limits.max_steps, per_step, spec.seed, spec.data.train.shuffle)


def _chunks(indices: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(indices), ROWS_AT_ONCE):
        yield indices[start : start + ROWS_AT_ONCE]
