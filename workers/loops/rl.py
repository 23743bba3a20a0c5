"""Reinforcement learning: sample groups, grade them, compute advantages, update several times on one rollout.

`old` is the policy that sampled. The trainer recomputes its log_probs before the first update, so the ratio is 1 there
and moves with each of the `minibatches x epochs` optimizer steps that follow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from time import perf_counter

import torch
from torch import Tensor

from service.jobs.data import prompt_indices
from service.metric_names import POLICY_LOSS, STEP_S, TOKENS_SAMPLED, TOKENS_TRAINED
from service.spec.job import RLSpec
from service.states import Phase
from workers.loops import noise
from workers.loops.attempt import Attempt, StepResult
from workers.loops.nonfinite import Suspects, count_skipped, step_skipped
from workers.loops.sampling import Group, draw_of, reward_errors, reward_metrics, rollout_rows, sample_and_grade
from workers.objectives.advantage import without_spread
from workers.objectives.metrics import Metrics
from workers.objectives.objective import Objective
from workers.objectives.objective import OptimizerStep as Prepared
from workers.policy.score.layout import Sequence as TokenSequence
from workers.seeds import derive
from workers.tenure.tenure import EventRow


@dataclass(frozen=True)
class Experience:
    """One rollout, ready for training: B sequences, padded to T answer tokens."""

    sequences: list[TokenSequence]
    response_mask: Tensor  # [B, T] bool, True on the tokens to learn from
    old_log_probs: Tensor  # [B, T]
    rollout_log_probs: Tensor  # [B, T]
    ref_log_probs: Tensor | None  # [B, T]
    advantages: Tensor  # [B]
    group_ids: Tensor  # [B]


def step(attempt: Attempt, step: int) -> StepResult:
    """One rollout of `prompts_per_step` groups and the optimizer steps on it."""
    spec = attempt.spec
    assert isinstance(spec, RLSpec)
    objective = Objective(spec.objective.resolve())  # resolved again: the stored one may be of an older version
    started = perf_counter()
    attempt.tenure.check(Phase.SAMPLING)
    rows = attempt.data.train
    indices = prompt_indices(len(rows), step, spec.rollout.prompts_per_step, spec.seed, spec.data.train.shuffle)
    groups = sample_and_grade(
        attempt, [rows[i] for i in indices], [rows.number(i) for i in indices], draw_of(attempt, purpose="rollout")
    )
    updating = perf_counter()
    attempt.tenure.check(Phase.UPDATING)
    experience, metrics, events = gather(attempt, objective, groups, step)
    numbers = [rows.number(i) for i in indices]
    updated, skipped = update(attempt, objective, experience, step, numbers)
    metrics |= updated
    events += skipped
    ended = perf_counter()
    sampled = sum(len(completion.tokens) for group in groups for completion in group.completions)
    trained = int(experience.response_mask.sum()) * spec.update.epochs
    attempt.tenure.meter.trained(trained)
    metrics |= attempt.overlong_metrics(sum(group.cut for group in groups))
    metrics |= reward_metrics(groups) | {
        TOKENS_SAMPLED: float(sampled),
        TOKENS_TRAINED: float(trained),
        "perf/sample_tokens_per_s": sampled / (updating - started),
        "perf/update_tokens_per_s": trained / (ended - updating),
        STEP_S: ended - started,
    }
    logged = step % spec.log_rollouts.every_steps == 0 or step in (1, spec.limits.max_steps)
    shown = groups[: spec.log_rollouts.groups] if logged else []
    return StepResult(metrics, rollout_rows(attempt, shown, "train", step), events + reward_errors(groups, step))


def gather(
    attempt: Attempt, objective: Objective, groups: Sequence[Group], step: int
) -> tuple[Experience, dict[str, float], list[EventRow]]:
    """Score the sampled answers under the policy (and the reference), and turn rewards into advantages."""
    spec, policy = attempt.spec, attempt.policy
    assert isinstance(spec, RLSpec)
    temperature = spec.rollout.temperature
    completions = [completion for group in groups for completion in group.completions]
    sequences = [TokenSequence(group.prompt, completion.tokens) for group in groups for completion in group.completions]
    old = policy.score(sequences, temperature=temperature)
    old_log_probs, answered = old.log_probs, old.mask
    metrics, events = {"policy/entropy": float(old.entropy[answered].mean())}, list[EventRow]()
    if noise.is_due(attempt, step):
        rounding, events = noise.noise(attempt, objective, sequences, old, step)
        metrics |= rounding
    ref_log_probs = None
    if attempt.reference is not None:
        ref_log_probs = attempt.reference.score(sequences, temperature=temperature).log_probs
    rollout_log_probs = pad([completion.log_probs for completion in completions], old_log_probs)

    given = [reward for group in groups for reward in group.rewards]
    device = old_log_probs.device
    valid = torch.tensor([reward is not None for reward in given], device=device)
    rewards, weights = rewards_of(spec, groups)
    rewards = rewards.to(device)
    group_ids = torch.arange(len(groups), device=device).repeat_interleave(spec.rollout.group_size)
    truncated = torch.tensor([completion.finish_reason == "length" for completion in completions], device=device)
    score = objective.with_kl(
        rewards,
        old_log_probs=old_log_probs,
        response_mask=answered,
        ref_log_probs=ref_log_probs,
        rollout_log_probs=rollout_log_probs,
    )
    advantages = objective.advantages(
        score, group_ids, lengths=answered.sum(1), valid=valid, reward_weights=None if weights is None else weights.to(device)
    )
    mask = objective.select(answered, rewards=rewards, group_ids=group_ids, truncated=truncated, valid=valid)
    if spec.rollout.mask_truncated:
        mask = mask & ~truncated.unsqueeze(1)
    flat = without_spread(rewards, group_ids, valid).view(len(groups), -1)[:, 0]
    metrics["reward/zero_variance_fraction"] = float(flat.double().mean())
    metrics["advantage/abs_mean"] = float(advantages.abs().mean())
    experience = Experience(sequences, mask, old_log_probs, rollout_log_probs, ref_log_probs, advantages, group_ids)
    return experience, metrics, events


def rewards_of(spec: RLSpec, groups: Sequence[Group]) -> tuple[Tensor, Tensor | None]:
    """The rewards [B], each the weighted sum of the graders, in float64; 0 for answers that were not graded.

    If each grader's scores are normalised separately (GDPO): the scores [B, R] and the graders' weights [R].
    """
    if spec.objective.advantage.several == "sum_then_normalize":
        return torch.tensor([reward or 0.0 for group in groups for reward in group.rewards], dtype=torch.float64), None
    names = [grader.name or grader.kind for grader in spec.reward.graders]
    graded = [sample for group in groups for sample in group.graded]
    scores = [[0.0 if sample.total is None else sample.scores[name] or 0.0 for name in names] for sample in graded]
    weights = torch.tensor([grader.weight for grader in spec.reward.graders], dtype=torch.float64)
    return torch.tensor(scores, dtype=torch.float64), weights


def update(
    attempt: Attempt, objective: Objective, experience: Experience, step: int, numbers: Sequence[int]
) -> tuple[dict[str, float], list[EventRow]]:
    """`minibatches x epochs` optimizer steps on one rollout; metrics are over all of them.

    `numbers` are the places of the groups' rows in their source, for events about skipped steps.
    """
    spec, policy, e = attempt.spec, attempt.policy, experience
    assert isinstance(spec, RLSpec)
    measured, norms, events, rate, size = Metrics(), list[float](), list[EventRow](), 0.0, spec.rollout.group_size
    for number, chosen in enumerate(minibatches(len(e.sequences), spec, step)):
        rows = torch.tensor(chosen, device=e.old_log_probs.device)
        width = int(max(len(e.sequences[i].completion) for i in chosen))  # the policy pads these rows to it

        def of(tensor: Tensor | None, rows: Tensor = rows, width: int = width) -> Tensor | None:
            return None if tensor is None else tensor[rows, :width]

        prepared = objective.prepare(
            response_mask=e.response_mask[rows, :width],
            advantages=e.advantages[rows],
            old_log_probs=of(e.old_log_probs),
            rollout_log_probs=of(e.rollout_log_probs),
            ref_log_probs=of(e.ref_log_probs),
            group_ids=e.group_ids[rows],
            longest=spec.rollout.max_completion_tokens,
            seed=derive(spec.seed, step, f"objective/{number}"),
        )
        measured += prepared.metrics

        suspects = Suspects()

        def loss(log_probs: Tensor, index: Tensor, prepared: Prepared = prepared, suspects: Suspects = suspects) -> Tensor:
            nonlocal measured
            value, outputs = objective.loss(log_probs, prepared.rows(index))
            measured += outputs.metrics
            return suspects.watch(value, log_probs, index)

        policy.accumulate(
            [e.sequences[i] for i in chosen],
            loss,
            temperature=spec.rollout.temperature,
            microbatch_tokens=spec.update.microbatch_tokens,
        )
        outcome = policy.step()
        count_skipped(attempt.progress, bool(outcome["skipped"]), step)
        if outcome["skipped"]:
            cause, local = suspects.name()
            named = [{"row": numbers[chosen[i] // size], "group": chosen[i] // size, "sample": chosen[i] % size} for i in local]
            events.append(step_skipped(step, number, cause, named))
        rate = outcome["learning_rate"]
        norms.append(outcome["grad_norm"])
        attempt.tenure.check(Phase.UPDATING)
    finished = measured.finish()
    finished[POLICY_LOSS] /= len(norms)  # the mean over optimizer steps; parts of one step add up
    finished |= {
        "optimizer/grad_norm": fmean(norms),
        "optimizer/learning_rate": rate,
        "optimizer/skipped": float(len(events)),
    }
    return finished, events


def pad(rows: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """Ragged rows as a tensor of the shape of `like`, padded with 0."""
    padded = torch.zeros(like.shape, dtype=like.dtype)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row, dtype=like.dtype)
    return padded.to(like.device)


def minibatches(count: int, spec: RLSpec, step: int) -> list[list[int]]:
    """The sequences of each optimizer step: for every epoch a new order, drawn from the seed, cut into equal parts."""
    size, parts = count // spec.update.minibatches, list[list[int]]()
    for epoch in range(spec.update.epochs):
        generator = torch.Generator().manual_seed(derive(spec.seed, step, f"minibatches/{epoch}"))
        order = torch.randperm(count, generator=generator).tolist()
        parts += [order[start : start + size] for start in range(0, count, size)]
    return parts
