"""Sampling and grading of groups, for training steps and evaluations alike."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from service.errors import JobFailed
from service.jobs.data import Prompt
from service.jobs.lease import RolloutRow
from service.metric_names import REWARD_MEAN
from service.rewards.samples import Graded, Sample
from service.spec.job import RLSpec
from service.spec.reward import RewardSpec
from service.states import Phase
from service.validation.words import counted
from workers.loops.attempt import Attempt, prompt_tokens
from workers.policy.policy import grouped
from workers.rollout.engine import Completion, Request
from workers.seeds import derive
from workers.tenure.tenure import EventRow

REPORTED = 32  # samples in one event


@dataclass(frozen=True)
class Group:
    """A prompt, its sampled answers and their rewards; `rewards[i]` is None if answer i could not be graded."""

    row: dict[str, Any]
    prompt: list[int]
    completions: list[Completion]
    graded: list[Graded]
    rewards: list[float | None]
    cut: bool = False  # whether the prompt was too long and lost its oldest tokens


@dataclass(frozen=True)
class Draw:
    """How answers are drawn. Draws with different `purpose` use different random seeds."""

    purpose: str
    group_size: int
    max_tokens: int
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    entropies: bool = False


def draw_of(attempt: Attempt, *, purpose: str, temperature: float | None = None) -> Draw:
    """The draw for training; or, with a temperature, for an evaluation: one answer per prompt, without top_p and top_k."""
    spec = attempt.spec
    stop = tuple(spec.rollout.stop) if isinstance(spec, RLSpec) else ()
    if temperature is not None:
        longest = spec.eval.max_completion_tokens or (spec.rollout.max_completion_tokens if isinstance(spec, RLSpec) else 64)
        return Draw(purpose, 1, longest, temperature, stop=stop)
    assert isinstance(spec, RLSpec)
    rollout = spec.rollout
    return Draw(
        purpose, rollout.group_size, rollout.max_completion_tokens, rollout.temperature, rollout.top_p, rollout.top_k, stop
    )


@dataclass(frozen=True)
class Asked:
    """What is sampled for some rows: `requests` for a group of answers to each prompt."""

    rows: Sequence[dict[str, Any]]
    numbers: Sequence[int]  # their places in their source
    rendered: list[Prompt]
    whole: list[list[int]]
    prompts: list[list[int]]  # the same, cut where they were too long
    requests: list[Request]
    group_size: int


def sample_and_grade(attempt: Attempt, rows: Sequence[dict[str, Any]], numbers: Sequence[int], draw: Draw) -> list[Group]:
    """One group per row. `numbers` are the rows' places in their source, for error messages."""
    asked = ask(attempt, rows, numbers, draw, done=attempt.progress.step)
    completions = attempt.policy.answer(asked.requests)
    attempt.tenure.meter.sampled(sum(len(completion.tokens) for completion in completions))
    return grade(attempt, asked, completions)


def ask(attempt: Attempt, rows: Sequence[dict[str, Any]], numbers: Sequence[int], draw: Draw, *, done: int) -> Asked:
    """The requests of a draw after `done` steps."""
    whole = [prompt_tokens(attempt, row, number) for row, number in zip(rows, numbers, strict=True)]
    prompts = fitted(attempt, whole, numbers, draw.max_tokens)
    requests = attempt.policy.requests(
        prompts,
        group_size=draw.group_size,
        max_tokens=draw.max_tokens,
        temperature=draw.temperature,
        top_p=draw.top_p,
        top_k=draw.top_k,
        stop=draw.stop,
        seed=derive(attempt.spec.seed, done, draw.purpose),
        entropies=draw.entropies,
    )
    return Asked(rows, numbers, [attempt.data.prompt(row) for row in rows], whole, prompts, requests, draw.group_size)


def grade(attempt: Attempt, asked: Asked, completions: list[Completion]) -> list[Group]:
    """The groups of these completions, which answer the requests in their order."""
    size, answers = asked.group_size, grouped(completions, asked.group_size)
    attempt.tenure.check(Phase.GRADING)
    assert attempt.rewards is not None and attempt.spec.reward is not None
    samples = [
        Sample(prompt, answer.text, len(answer.tokens), answer.finish_reason == "length", row)
        for prompt, row, group in zip(asked.rendered, asked.rows, answers, strict=True)
        for answer in group
    ]
    graded = attempt.rewards.grade(samples)
    rewards = settle_errors(attempt.spec.reward, graded)
    return [
        Group(
            row,
            prompt,
            group,
            graded[i * size : (i + 1) * size],
            rewards[i * size : (i + 1) * size],
            cut=len(prompt) < len(asked.whole[i]),
        )
        for i, (row, prompt, group) in enumerate(zip(asked.rows, asked.prompts, answers, strict=True))
    ]


def settle_errors(spec: RewardSpec, graded: Sequence[Graded]) -> list[float | None]:
    """Apply `on_error` to the samples that could not be graded; too many of them pause the job."""
    failed = [sample for sample in graded if sample.total is None]
    if failed:
        rate, first = len(failed) / len(graded), next(iter(failed[0].errors.items()), ("?", "no reward"))
        detail = f"{len(failed)} of {counted(len(graded), 'sample')} could not be graded; the first: {first[0]}: {first[1]}"
        if spec.on_error == "fail":
            raise JobFailed("sample_not_graded", detail, pointer="/reward/on_error")
        if rate > spec.max_error_rate:
            raise JobFailed(
                "grader_unhealthy", f"{detail} (reward.max_error_rate is {spec.max_error_rate:g})", pointer="/reward"
            )
    if spec.on_error == "zero":
        return [0.0 if sample.total is None else sample.total for sample in graded]
    return [sample.total for sample in graded]


def reward_metrics(groups: Iterable[Group]) -> dict[str, float]:
    """reward/mean, reward/std, reward/NAME for each grader, reward/error_rate, and the length of the answers."""
    groups = list(groups)
    graded = [sample for group in groups for sample in group.graded]
    totals = [reward for group in groups for reward in group.rewards if reward is not None]
    metrics = {"reward/error_rate": 1 - len([sample for sample in graded if sample.total is not None]) / len(graded)}
    if totals:
        metrics |= {REWARD_MEAN: fmean(totals), "reward/std": pstdev(totals)}
    for name in graded[0].scores:
        scores = [score for sample in graded if (score := sample.scores.get(name)) is not None]
        if scores:
            metrics[f"reward/{name}"] = fmean(scores)
    completions = [completion for group in groups for completion in group.completions]
    metrics["completion/length_mean"] = fmean(len(completion.tokens) for completion in completions)
    metrics["completion/truncated_fraction"] = fmean(completion.finish_reason == "length" for completion in completions)
    return metrics


def reward_errors(groups: Sequence[Group], step: int) -> list[EventRow]:
    """One event that lists the samples of a step that could not be graded, with the reasons; none if all could be graded."""
    failed = [
        {"group": g, "sample": i, "errors": graded.errors}
        for g, group in enumerate(groups)
        for i, graded in enumerate(group.graded)
        if graded.total is None
    ]
    samples = sum(len(group.graded) for group in groups)
    data = {"step": step, "count": len(failed), "samples": samples, "failed": failed[:REPORTED]}
    return [("reward_errors", data)] if failed else []


def rollout_rows(
    attempt: Attempt, groups: Sequence[Group], split: str, step: int, told: Iterable[dict[str, Any]] = ()
) -> list[RolloutRow]:
    """The groups as rows of the store. `told`: of each of their answers in turn, what else is kept of it."""
    more = iter(told)
    return [
        RolloutRow(
            split=split,
            step=step,
            group_index=index,
            prompt=attempt.policy.text.show(group.prompt),
            reference=attempt.data.answer(group.row),
            samples=[
                {
                    "text": completion.text,
                    "tokens": len(completion.tokens),
                    "finish_reason": completion.finish_reason,
                    "reward": reward,
                    "scores": graded.scores,
                    **({"errors": graded.errors} if graded.errors else {}),
                    **next(more, {}),
                }
                for completion, graded, reward in zip(group.completions, group.graded, group.rewards, strict=True)
            ],
        )
        for index, group in enumerate(groups)
    ]


def fitted(attempt: Attempt, prompts: Sequence[list[int]], numbers: Sequence[int], max_tokens: int) -> list[list[int]]:
    """The prompts, cut on the left if the spec wants that, so that answers of `max_tokens` have room after them. Raises
    JobFailed prompt_too_long or prompt_empty, with the row's number."""
    spec, text = attempt.spec, attempt.policy.text
    room = text.context - max_tokens
    asked = spec.rollout.max_prompt_tokens if isinstance(spec, RLSpec) else None
    allowed = room if asked is None else min(asked, room)
    if spec.data.overlong == "truncate_left":
        prompts = [text.cut(prompt, allowed) for prompt in prompts]
    for number, prompt in zip(numbers, prompts, strict=True):
        if not 0 < len(prompt) <= allowed:
            raise JobFailed(
                "prompt_too_long" if prompt else "prompt_empty",
                f"the prompt of row {number} has {counted(len(prompt), 'token')}; allowed are 1 to {allowed} "
                f"(context {text.context}, answers of up to {counted(max_tokens, 'token')}"
                + (f", rollout.max_prompt_tokens {asked})" if asked is not None else ")"),
                hint="shorten the row or the template, lower max_completion_tokens, take the row out of the data, or set "
                "data.overlong",
                pointer="/data",
            )
    return list(prompts)
