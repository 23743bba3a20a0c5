"""Supervised fine-tuning: cross-entropy on the given answers, averaged over all answer tokens of an optimizer step."""

from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from service.errors import JobFailed
from service.jobs.data import Data, DataRows, Row, prompt_indices
from service.metric_names import LOSS, STEP_S, TOKENS_TRAINED
from service.spec.job import SupervisedSpec
from service.states import Phase
from workers.loops.attempt import Attempt, StepResult, in_row
from workers.loops.nonfinite import Suspects, count_skipped, step_skipped
from workers.policy.score.layout import Sequence as TokenSequence
from workers.policy.text import Text
from workers.tenure.tenure import EventRow

ROWS_AT_ONCE = 256


def step(attempt: Attempt, step: int) -> StepResult:
    """One optimizer step on `update.batch_size` rows."""
    spec = attempt.spec
    assert isinstance(spec, SupervisedSpec)
    attempt.tenure.check(Phase.UPDATING)
    started = perf_counter()
    rows = attempt.data.train
    indices = prompt_indices(len(rows), step, spec.update.batch_size, spec.seed, spec.data.train.shuffle)
    batch = encode(attempt, rows, indices)
    tokens = sum(sum(example.learnt) for example in batch)

    suspects, events = Suspects(), list[EventRow]()

    def mean_nll(log_probs: Tensor, index: Tensor) -> Tensor:
        share = -(log_probs * _mask(batch, index.tolist(), log_probs)).sum() / tokens
        return suspects.watch(share, log_probs, index)

    loss = attempt.policy.accumulate(
        [example.sequence for example in batch], mean_nll, microbatch_tokens=spec.update.microbatch_tokens
    )
    update = attempt.policy.step()
    count_skipped(attempt.progress, bool(update["skipped"]), step)
    if update["skipped"]:
        cause, local = suspects.name()
        events.append(step_skipped(step, 0, cause, [{"row": row} for row in dict.fromkeys(batch[i].row for i in local)]))
    attempt.tenure.meter.trained(tokens)
    elapsed = perf_counter() - started
    return StepResult(
        {
            LOSS: loss,
            "optimizer/grad_norm": update["grad_norm"],
            "optimizer/learning_rate": update["learning_rate"],
            "optimizer/skipped": float(update["skipped"]),
            TOKENS_TRAINED: float(tokens),
            "perf/update_tokens_per_s": tokens / elapsed,
            STEP_S: elapsed,
        }
        | attempt.overlong_metrics(len({example.row for example in batch if example.cut})),
        events=events,
    )


def answers_loss(attempt: Attempt) -> float:
    """Mean negative log-likelihood per answer token over data.eval, without gradient."""
    rows = attempt.data.eval
    assert rows is not None
    total, tokens = 0.0, 0
    for start in range(0, len(rows), ROWS_AT_ONCE):
        batch = encode(attempt, rows, range(start, min(start + ROWS_AT_ONCE, len(rows))))
        scores = attempt.policy.score([example.sequence for example in batch])
        mask = _mask(batch, range(len(batch)), scores.log_probs)
        total -= float((scores.log_probs * mask).sum(dtype=torch.float64))
        tokens += int(mask.sum())
    return total / tokens


class Example(NamedTuple):
    """A sequence, which tokens of its completion are learnt, and the number of its row."""

    sequence: TokenSequence
    learnt: list[bool]
    row: int
    cut: bool = False  # whether the prompt lost its oldest tokens, because the row is too long


def encode(attempt: Attempt, rows: DataRows, indices: Sequence[int]) -> list[Example]:
    """The examples in these rows, with prompts cut on the left if the spec wants that. Raises JobFailed, with the row's number,
    if one is too long or its prompt is empty."""
    text, examples = attempt.policy.text, list[Example]()
    for index in indices:
        number = rows.number(index)
        with in_row(number):
            learnt = examples_of(text, attempt.data, rows[index], number)
        for example in learnt:
            prompt, completion = example.sequence
            if attempt.spec.data.overlong == "truncate_left":
                prompt = text.cut(prompt, text.context - len(completion))
            cut = len(prompt) < len(example.sequence.prompt)
            examples.append(example._replace(sequence=TokenSequence(prompt, completion), cut=cut))
            if not prompt or len(prompt) + len(completion) > text.context:
                raise JobFailed(
                    "sequence_too_long" if prompt else "prompt_empty",
                    f"row {number} has {len(prompt)} prompt and {len(completion)} answer tokens; "
                    + (f"the model's context holds {text.context}" if prompt else "a prompt has at least one"),
                    hint="shorten the row or the template, take the row out of the data, or set data.overlong",
                    pointer="/data",
                )
    return examples


def examples_of(text: Text, data: Data, row: Row, number: int) -> list[Example]:
    """The sequences of a row. A chat's turn joins the sequence before it if its prompt begins with exactly these tokens. If the
    template writes earlier turns differently once others follow, each turn has its own sequence, as it is sampled."""
    prompt, options = data.prompt(row), data.template_options(row)
    if isinstance(prompt, str) or data.begins_the_answer:
        answer = data.answer(row)
        assert answer is not None
        pairs = [(text.encode(prompt, **options), text.encode_answer(answer, in_chat=not isinstance(prompt, str)))]
    else:
        pairs = [text.encode_turn(turn, **options) for turn in data.learnt_turns(row)]
    examples: list[Example] = []
    for before, turn in pairs:
        if examples and before[: len(whole := [*examples[-1].sequence.prompt, *examples[-1].sequence.completion])] == whole:
            (first, completion), learnt, *_ = examples.pop()
            between = before[len(whole) :]
            sequence = TokenSequence(first, [*completion, *between, *turn])
            examples.append(Example(sequence, [*learnt, *[False] * len(between), *[True] * len(turn)], number))
        else:
            examples.append(Example(TokenSequence(before, turn), [True] * len(turn), number))
    return examples


def _mask(batch: Sequence[Example], rows: Iterable[int], log_probs: Tensor) -> Tensor:
    """[b, T] bool, True on the tokens that are learnt; it has the shape of `log_probs`."""
    mask = torch.zeros(log_probs.shape, dtype=torch.bool)
    for place, row in enumerate(rows):
        learnt = batch[row].learnt
        mask[place, : len(learnt)] = torch.tensor(learnt, dtype=torch.bool)
    return mask.to(log_probs.device)
