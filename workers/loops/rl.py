"""Reinforcement learning: sample groups, grade them, compute advantages, update several times on one rollout.

`old` is the policy that sampled. Its log_probs are the sampler's or recomputed by the trainer before the first update (see
`rescore.py`), so the ratio is 1 there and moves with each of the `minibatches x epochs` optimizer steps that follow.
"""

from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor

from service.metric_names import STALENESS, STEP_S, TOKENS_SAMPLED, TOKENS_TRAINED, WAITED_S
from service.spec.job import RLSpec
from service.states import Phase
from workers.loops import ahead, noise, rescore, update
from workers.loops.attempt import Attempt, StepResult
from workers.loops.nonfinite import Suspects, count_skipped, step_skipped
from workers.loops.sampling import Group, grade, reward_errors, reward_metrics, rollout_rows
from workers.loops.seen import Seen
from workers.loops.update import Answers, Experience, How, minibatches, pad
from workers.objectives.advantage import without_spread
from workers.objectives.objective import Objective
from workers.policy.score.layout import Sequence as TokenSequence
from workers.tenure.tenure import EventRow


def step(attempt: Attempt, step: int) -> StepResult:
    """One rollout of `prompts_per_step` groups and the optimizer steps on it."""
    spec = attempt.spec
    assert isinstance(spec, RLSpec)
    objective = Objective(spec.objective.resolve())  # resolved again: the stored one may be of an older version
    started = perf_counter()
    attempt.tenure.check(Phase.SAMPLING)
    rollout = ahead.rollout(attempt, step)
    groups = grade(attempt, rollout.asked, rollout.completions)
    updating = perf_counter()
    attempt.tenure.check(Phase.UPDATING)
    experience, metrics, events = gather(attempt, objective, groups, step)
    if noise.is_due(attempt, step):
        rounding, warnings = noise.noise(attempt, objective, experience.sequences, experience.old_log_probs, step)
        metrics |= rounding
        events += warnings
    logged = step % spec.log_rollouts.every_steps == 0 or step in (1, spec.limits.max_steps)
    shown = groups[: spec.log_rollouts.groups] if logged else []
    seen = Seen(len(shown) * spec.rollout.group_size)
    updated, skipped = learn(attempt, objective, experience, step, rollout.asked.numbers, seen.look if shown else None)
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
        "perf/sample_tokens_per_s": sampled / (updating - started - rollout.waited_s + rollout.seconds),
        "perf/update_tokens_per_s": trained / (ended - updating),
        STEP_S: ended - started,
    }
    if spec.rollout.max_staleness:
        metrics |= {STALENESS: float(rollout.staleness), WAITED_S: rollout.waited_s}
    completions = [completion for group in shown for completion in group.completions]
    told = seen.told(experience, completions, attempt.policy.text) if shown else []
    return StepResult(metrics, rollout_rows(attempt, shown, "train", step, told), events + reward_errors(groups, step))


def gather(
    attempt: Attempt, objective: Objective, groups: Sequence[Group], step: int
) -> tuple[Experience, dict[str, float], list[EventRow]]:
    """Score the sampled answers under the policy (and the reference), and turn rewards into advantages."""
    spec = attempt.spec
    assert isinstance(spec, RLSpec)
    completions = [completion for group in groups for completion in group.completions]
    sequences = [TokenSequence(group.prompt, completion.tokens) for group in groups for completion in group.completions]
    valid = torch.tensor([reward is not None for group in groups for reward in group.rewards])
    rewards, weights = rewards_of(spec, groups)
    group_ids = torch.arange(len(groups)).repeat_interleave(spec.rollout.group_size)
    old, proof, events = rescore.sampled(attempt, sequences, completions, step)
    answers = Answers(
        sequences,
        rewards,
        group_ids,
        valid,
        truncated=torch.tensor([completion.finish_reason == "length" for completion in completions]),
        reward_weights=weights,
        rollout_log_probs=pad([completion.log_probs for completion in completions]) if old is None else None,
    )
    experience, metrics = update.gather(
        attempt.policy,
        attempt.reference,
        objective,
        answers,
        temperature=spec.rollout.temperature,
        mask_truncated=spec.rollout.mask_truncated,
        old=old,
    )
    flat = without_spread(rewards, group_ids, valid).view(len(groups), -1)[:, 0]
    metrics["reward/zero_variance_fraction"] = float(flat.double().mean())
    return experience, metrics | proof, events


def rewards_of(spec: RLSpec, groups: Sequence[Group]) -> tuple[Tensor, Tensor | None]:
    """The rewards [B], each the weighted sum of the graders, in float64; 0 for answers that were not graded.

    If each grader's scores are normalised separately (GDPO): the scores [B, R] and the graders' weights [R], without graders
    of weight 0, whose spread is no signal.
    """
    if spec.objective.advantage.several == "sum_then_normalize":
        return torch.tensor([reward or 0.0 for group in groups for reward in group.rewards], dtype=torch.float64), None
    graders = [grader for grader in spec.reward.graders if grader.weight] or spec.reward.graders
    names = [grader.name or grader.kind for grader in graders]
    graded = [sample for group in groups for sample in group.graded]
    scores = [[0.0 if sample.total is None else sample.scores[name] or 0.0 for name in names] for sample in graded]
    weights = torch.tensor([grader.weight for grader in graders], dtype=torch.float64)
    return torch.tensor(scores, dtype=torch.float64), weights


def learn(
    attempt: Attempt,
    objective: Objective,
    experience: Experience,
    step: int,
    numbers: Sequence[int],
    look: update.Look | None = None,
) -> tuple[dict[str, float], list[EventRow]]:
    """`minibatches x epochs` optimizer steps on one rollout; metrics are over all of them.

    `numbers` are the places of the groups' rows in their source, for events about skipped steps.
    """
    spec, events = attempt.spec, list[EventRow]()
    assert isinstance(spec, RLSpec)
    size = spec.rollout.group_size

    def after(number: int, chosen: list[int], outcome: dict[str, float | bool], suspects: Suspects) -> None:
        count_skipped(attempt.progress, bool(outcome["skipped"]), step)
        if outcome["skipped"]:
            cause, local = suspects.name()
            named = [{"row": numbers[chosen[i] // size], "group": chosen[i] // size, "sample": chosen[i] % size} for i in local]
            events.append(step_skipped(step, number, cause, named))
        attempt.tenure.check(Phase.UPDATING)

    parts = minibatches(len(experience.sequences), spec.update.minibatches, spec.update.epochs, spec.seed, step)
    how = How(spec.rollout.temperature, spec.update.microbatch_tokens, spec.rollout.max_completion_tokens, spec.seed, step)
    return update.update(attempt.policy, objective, experience, parts, how, after, look), events
