"""A small real run, for what the figures say of ratios: the `tiny` model learns to add, and what its loss saw is kept.

The prompt says about how many sums to write ("8>"), the answer is sums and an end token ("3+4=07,9+5=14,"), so answers are
of very different lengths. A supervised warm-up teaches the form and some of the arithmetic; then comes what
workers/loops/rl.py does, at its shortest: sample, grade, update four times on one rollout.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from service.spec.model import ModelSpec
from service.spec.objective import ObjectiveSpec
from service.spec.training import OptimizerSpec
from workers.objectives import Objective
from workers.policy.base import Base
from workers.policy.learner import Learner, Start
from workers.policy.load import adapter_of
from workers.policy.score.layout import Sequence
from workers.seeds import derive

SUMS = (1, 2, 4, 8, 16, 32)  # about how many a prompt asks for
SUM = re.compile(r"(\d)\+(\d)=(\d\d),")
SUM_TOKENS = 7
LONGEST = 64 * SUM_TOKENS


@dataclass(frozen=True)
class Run:
    """How long, and how large."""

    warm_up_steps: int = 250
    rollouts: int = 12
    groups_a_size: int = 8  # prompts of each of SUMS in a rollout
    group_size: int = 8
    updates: int = 4  # optimizer steps a rollout, each on its own part of it
    learning_rate: float = 1e-4
    objective: str = "gspo"
    seed: int = 0


@dataclass(frozen=True)
class Seen:
    """What the last of a rollout's updates saw: log-probs now and when it was sampled, of rows no update had learnt from."""

    log_probs: Tensor
    old_log_probs: Tensor
    response_mask: Tensor
    advantages: Tensor


def written(wanted: int, generator: random.Random) -> str:
    """Right sums; after each the text ends with a chance of one in `wanted`."""
    text = ""
    while not text or (generator.random() >= 1 / wanted and len(text) + SUM_TOKENS < LONGEST):
        a, b = generator.randrange(10), generator.randrange(10)
        text += f"{a}+{b}={a + b:02d},"
    return text


def reward(answer: str) -> float:
    """The share of right sums, among as many as an answer of that length has room for."""
    right = sum(int(a) + int(b) == int(c) for a, b, c in SUM.findall(answer))
    return right / max(1, -(-len(answer) // SUM_TOKENS))


def record(run: Run, folder: Path) -> tuple[list[Seen], list[float]]:
    """Train, and keep what the last update of each rollout saw; and the mean reward of each rollout."""
    warm_up(run, folder)
    policy = load(run, run.learning_rate, run.rollouts * run.updates, weights_from=folder)
    objective = Objective(ObjectiveSpec.model_validate(run.objective).resolve())
    seen, means = list[Seen](), list[float]()
    for number in range(run.rollouts):
        rollout = sampled(policy, run, number)
        advantages = objective.advantages(rollout.rewards, rollout.group_ids)
        order = torch.randperm(len(advantages), generator=torch.Generator().manual_seed(derive(run.seed, number, "order")))
        updates = [update(policy, objective, rollout, advantages, rows) for rows in order.chunk(run.updates)]
        seen.append(updates[-1])
        means.append(float(rollout.rewards.mean()))
    return seen, means


@dataclass(frozen=True)
class Rollout:
    """B answers, padded to T tokens."""

    sequences: list[Sequence]
    rewards: Tensor
    group_ids: Tensor
    old_log_probs: Tensor
    response_mask: Tensor


def sampled(policy: Learner, run: Run, number: int) -> Rollout:
    prompts = [policy.text.encode(f"{k}>") for k in SUMS for _ in range(run.groups_a_size)]
    seed = derive(run.seed, number, "rollout")
    groups = policy.sample(prompts, group_size=run.group_size, max_tokens=LONGEST, temperature=1.0, seed=seed)
    pairs = [(prompt, answer) for prompt, group in zip(prompts, groups, strict=True) for answer in group]
    sequences = [Sequence(prompt, answer.tokens) for prompt, answer in pairs]
    rewards = torch.tensor([reward(answer.text) for _, answer in pairs], dtype=torch.float64)
    group_ids = torch.arange(len(groups)).repeat_interleave(run.group_size)
    old = policy.score(sequences)
    return Rollout(sequences, rewards, group_ids, old.log_probs, old.mask)


def update(policy: Learner, objective: Objective, rollout: Rollout, advantages: Tensor, rows: Tensor) -> Seen:
    """One optimizer step on some of the answers, and what it saw."""
    sequences = [rollout.sequences[i] for i in rows]
    width = max(len(sequence.completion) for sequence in sequences)
    old_log_probs, mask = rollout.old_log_probs[rows, :width], rollout.response_mask[rows, :width]
    step = objective.prepare(response_mask=mask, advantages=advantages[rows], old_log_probs=old_log_probs)
    log_probs_now = torch.zeros_like(old_log_probs)

    def loss(log_probs: Tensor, index: Tensor) -> Tensor:
        log_probs_now[index] = log_probs.detach()
        return objective.loss(log_probs, step.rows(index))[0]

    policy.accumulate(sequences, loss)
    policy.step()
    return Seen(log_probs_now, old_log_probs, mask, advantages[rows])


def warm_up(run: Run, folder: Path) -> None:
    policy, generator = load(run, 2e-3, run.warm_up_steps), random.Random(run.seed)
    for _ in range(run.warm_up_steps):
        asked = [generator.choice(SUMS) for _ in range(32)]
        batch = [Sequence(policy.text.encode(f"{k}>"), policy.text.encode_answer(written(k, generator))) for k in asked]
        tokens = sum(len(sequence.completion) for sequence in batch)
        policy.accumulate(batch, lambda log_probs, rows, tokens=tokens: -log_probs.sum() / tokens)
        policy.step()
    policy.save(folder)


def load(run: Run, learning_rate: float, steps: int, weights_from: Path | None = None) -> Learner:
    schedule = {"kind": "constant", "warmup_steps": 10}
    model = ModelSpec.model_validate({"source": "tiny", "tiny": {"context": 512, "seed": run.seed}})
    return Learner(
        Base.load(model, device="cpu", threads=1, checkpoint=weights_from),
        adapter_of(model),
        name="figures",
        optimizer=OptimizerSpec.model_validate({"learning_rate": learning_rate, "schedule": schedule}),
        steps=steps,
        seed=run.seed,
        start=Start(weights_from),
    )
