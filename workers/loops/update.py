"""What jobs and sessions do with answers that have rewards: advantages, and several optimizer steps on them.

    experience, metrics = gather(policy, reference, objective, answers, temperature=...)
    metrics = update(policy, objective, experience, minibatches(...), ...)

`old` is the policy before the first of these optimizer steps; if it sampled the answers, the ratio is exactly 1 there and moves
with each step that follows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor

from service.metric_names import POLICY_LOSS
from workers.loops.nonfinite import Suspects
from workers.objectives.metrics import Metrics
from workers.objectives.objective import Objective
from workers.objectives.objective import OptimizerStep as Prepared
from workers.objectives.outputs import LossOutputs
from workers.policy.learner import Learner
from workers.policy.optimizer import StepSettings
from workers.policy.policy import Policy, Scores
from workers.policy.score.layout import Sequence as TokenSequence
from workers.seeds import derive


@dataclass(frozen=True)
class Answers:
    """B answers to prompts, with their rewards or advantages; the longest has T tokens."""

    sequences: list[TokenSequence]
    rewards: Tensor | None  # [B], or [B, R] if each grader's scores are normalised separately
    group_ids: Tensor  # [B] answers of one group are compared with each other
    valid: Tensor  # [B] bool, False where there is no reward
    truncated: Tensor  # [B] bool, True where the answer was cut at the token limit
    reward_weights: Tensor | None = None  # [R]
    rollout_log_probs: Tensor | None = None  # [B, T] as the sampler reported them
    response_mask: Tensor | None = None  # [B, T] bool; None: all tokens of the answers count
    advantages: Tensor | None = None  # [B] or [B, T], in place of rewards


@dataclass(frozen=True)
class Experience:
    """Answers, ready for training: B sequences, padded to T answer tokens."""

    sequences: list[TokenSequence]
    response_mask: Tensor  # [B, T] bool, True on the tokens to learn from
    old_log_probs: Tensor  # [B, T]
    rollout_log_probs: Tensor | None  # [B, T]
    ref_log_probs: Tensor | None  # [B, T]
    advantages: Tensor  # [B] or [B, T]
    group_ids: Tensor  # [B]


def gather(
    policy: Policy,
    reference: Policy | None,
    objective: Objective,
    answers: Answers,
    *,
    temperature: float,
    mask_truncated: bool = False,
    old: Scores | None = None,
) -> tuple[Experience, dict[str, float]]:
    """Score the answers under the policy (and the reference), and turn rewards into advantages. `old`: the policy's own scores,
    if they are already known."""
    sequences, a = answers.sequences, answers
    old = old or policy.score(sequences, temperature=temperature)
    old_log_probs, device = old.log_probs, old.log_probs.device
    answered = old.mask if a.response_mask is None else old.mask & a.response_mask.to(device)
    metrics = {"policy/entropy": float(old.entropy[answered].mean())}
    ref_log_probs = None
    if reference is not None:
        ref_log_probs = reference.score(sequences, temperature=temperature).log_probs
    rollout_log_probs = None if a.rollout_log_probs is None else a.rollout_log_probs.to(device)
    rewards = None if a.rewards is None else a.rewards.to(device)
    valid, group_ids, truncated = a.valid.to(device), a.group_ids.to(device), a.truncated.to(device)
    if a.advantages is not None:
        advantages = a.advantages.to(device)
    else:
        assert rewards is not None
        score = objective.with_kl(
            rewards,
            old_log_probs=old_log_probs,
            response_mask=answered,
            ref_log_probs=ref_log_probs,
            rollout_log_probs=rollout_log_probs,
        )
        weights = None if a.reward_weights is None else a.reward_weights.to(device)
        advantages = objective.advantages(score, group_ids, lengths=answered.sum(1), valid=valid, reward_weights=weights)
    mask = objective.select(answered, rewards=rewards, group_ids=group_ids, truncated=truncated, valid=valid)
    if mask_truncated:
        mask = mask & ~truncated.unsqueeze(1)
    metrics["advantage/abs_mean"] = float(advantages.abs().mean())
    return Experience(sequences, mask, old_log_probs, rollout_log_probs, ref_log_probs, advantages, group_ids), metrics


@dataclass(frozen=True)
class How:
    """How an update treats its answers. `settings`: of every optimizer step; None: the learner's own schedule."""

    temperature: float
    microbatch_tokens: int | Literal["auto"]
    longest: float  # tokens of the longest possible answer
    seed: int
    step: int  # with the seed, what the draws of this update derive from
    settings: StepSettings | None = None


# Called after each optimizer step with its number, its rows, what it did, and what may have made it skip.
After = Callable[[int, list[int], dict[str, float | bool], Suspects], None]
# Called for each micro-batch: the places of its rows in the experience, their log-probs [B, T], what the loss made of them.
Look = Callable[[list[int], Tensor, LossOutputs], None]


def update(
    policy: Learner,
    objective: Objective,
    experience: Experience,
    parts: Sequence[list[int]],
    how: How,
    after: After,
    look: Look | None = None,
) -> dict[str, float]:
    """One optimizer step for the rows of each part. The metrics are over all of them."""
    measured, norms, rate, skipped = Metrics(), list[float](), 0.0, 0
    for number, chosen in enumerate(parts):
        suspects = Suspects()
        prepared = prepare(objective, experience, chosen, how, number)
        accumulated = accumulate(policy, objective, experience, chosen, prepared, how, suspects, look)[1]
        measured += prepared.metrics + accumulated
        outcome = policy.step(how.settings)
        rate, skipped = outcome["learning_rate"], skipped + bool(outcome["skipped"])
        norms.append(outcome["grad_norm"])
        after(number, chosen, outcome, suspects)
    finished = measured.finish()
    finished[POLICY_LOSS] /= len(norms)  # the mean over optimizer steps; parts of one step add up
    return finished | {
        "optimizer/grad_norm": fmean(norms),
        "optimizer/learning_rate": rate,
        "optimizer/skipped": float(skipped),
    }


def prepare(objective: Objective, experience: Experience, chosen: list[int], how: How, number: int = 0) -> Prepared:
    """What the loss of these rows needs, as one optimizer step."""
    e = experience
    rows = torch.tensor(chosen, device=e.old_log_probs.device)
    width = int(max(len(e.sequences[i].completion) for i in chosen))  # the policy pads these rows to it

    def of(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[rows, :width]

    return objective.prepare(
        response_mask=e.response_mask[rows, :width],
        advantages=e.advantages[rows] if e.advantages.dim() == 1 else e.advantages[rows, :width],
        old_log_probs=of(e.old_log_probs),
        rollout_log_probs=of(e.rollout_log_probs),
        ref_log_probs=of(e.ref_log_probs),
        group_ids=e.group_ids[rows],
        longest=how.longest,
        seed=derive(how.seed, how.step, f"objective/{number}"),
    )


def accumulate(
    policy: Learner,
    objective: Objective,
    experience: Experience,
    chosen: list[int],
    prepared: Prepared,
    how: How,
    suspects: Suspects,
    look: Look | None = None,
) -> tuple[float, Metrics]:
    """Add the gradient of the loss of these rows. Returns the loss (nan if it is not finite), and what was measured.

    Rows that cannot move the policy do not go through the model. If no row can, one does: its gradient is 0, and that is
    not the same as none to an optimizer with moments."""
    measured = Metrics()
    sequences = [experience.sequences[i] for i in chosen]
    teaching = objective.teaching(prepared.tensors).nonzero().squeeze(1).tolist()

    def loss(log_probs: Tensor, index: Tensor) -> Tensor:
        nonlocal measured
        value, outputs = objective.loss(log_probs, prepared.rows(index))
        measured += outputs.metrics
        if look is not None:
            look([chosen[place] for place in index.tolist()], log_probs, outputs)
        return suspects.watch(value, log_probs, index)

    total = policy.accumulate(
        sequences,
        loss,
        rows=teaching or [min(range(len(sequences)), key=lambda row: sum(map(len, sequences[row])))],
        temperature=how.temperature,
        microbatch_tokens=how.microbatch_tokens,
    )
    return total, measured


def minibatches(count: int, parts: int, epochs: int, seed: int, step: int) -> list[list[int]]:
    """The sequences of each optimizer step: for every epoch a new order, drawn from the seed, cut into `parts` equal ones."""
    size, cut = count // parts, list[list[int]]()
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(derive(seed, step, f"minibatches/{epoch}"))
        order = torch.randperm(count, generator=generator).tolist()
        cut += [order[start : start + size] for start in range(0, count, size)]
    return cut


def pad(rows: Sequence[Sequence[float]]) -> Tensor:
    """Ragged rows as one float32 tensor, padded with 0."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0.0] * (longest - len(row))] for row in rows], dtype=torch.float32)
