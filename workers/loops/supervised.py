"""Supervised fine-tuning: cross-entropy on the given answers, the mean over all answer tokens of an optimizer step."""

from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor

from service.errors import JobFailed
from service.jobs.data import DataRows, prompt_indices
from service.metric_names import LOSS, STEP_S, TOKENS_TRAINED
from service.spec.job import SupervisedSpec
from service.states import Phase
from workers.loops.attempt import Attempt, StepResult
from workers.loops.nonfinite import Suspects, count_skipped, step_skipped
from workers.policy.score.layout import Sequence as TokenSequence
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
    tokens = sum(len(sequence.completion) for sequence in batch)

    suspects, events = Suspects(), list[EventRow]()

    def mean_nll(log_probs: Tensor, index: Tensor) -> Tensor:
        share = -(log_probs * _mask(batch, index, log_probs)).sum() / tokens
        return suspects.watch(share, log_probs, index)

    loss = attempt.policy.accumulate(batch, mean_nll, microbatch_tokens=spec.update.microbatch_tokens).loss
    update = attempt.policy.step()
    count_skipped(attempt.progress, bool(update["skipped"]), step)
    if update["skipped"]:
        cause, local = suspects.name()
        events.append(step_skipped(step, 0, cause, [{"row": rows.number(indices[i])} for i in local]))
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
        },
        events=events,
    )


def answers_loss(attempt: Attempt) -> float:
    """Mean negative log-likelihood of an answer token over data.eval; no gradient."""
    rows = attempt.data.eval
    assert rows is not None
    total, tokens = 0.0, 0
    for start in range(0, len(rows), ROWS_AT_ONCE):
        batch = encode(attempt, rows, range(start, min(start + ROWS_AT_ONCE, len(rows))))
        scores = attempt.policy.score(batch)
        total -= float((scores.log_probs * scores.mask).sum(dtype=torch.float64))
        tokens += int(scores.mask.sum())
    return total / tokens


def encode(attempt: Attempt, rows: DataRows, indices: Sequence[int]) -> list[TokenSequence]:
    """Prompt and answer tokens of these rows; a row that does not fit the context ends the job, by its number."""
    text, sequences = attempt.policy.text, []
    for index in indices:
        row = rows[index]
        answer = attempt.data.answer(row)
        assert answer is not None
        sequence = TokenSequence(text.encode(attempt.data.prompt(row)), text.encode_answer(answer))
        length = len(sequence.prompt) + len(sequence.completion)
        if not sequence.prompt or length > text.context:
            raise JobFailed(
                "sequence_too_long" if sequence.prompt else "prompt_empty",
                f"row {rows.number(index)} has {len(sequence.prompt)} prompt and {len(sequence.completion)} answer tokens; "
                f"the context holds {text.context}, and a prompt has at least one",
                hint="shorten the row or the template, or take the row out of the data",
                pointer="/data",
            )
        sequences.append(sequence)
    return sequences


def _mask(batch: Sequence[TokenSequence], index: Tensor, log_probs: Tensor) -> Tensor:
    lengths = torch.tensor([len(batch[i].completion) for i in index.tolist()], device=log_probs.device)
    return torch.arange(log_probs.shape[1], device=log_probs.device) < lengths[:, None]
