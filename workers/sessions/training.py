"""The operations that train, on one learner: each reads its request, checks it, and computes its answer.

Until the first gradient is added everything can still be refused, with nothing changed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from service.jobs.lease import finite
from service.metric_names import LOSS_SUM, POLICY_LOSS, REWARD_MEAN, TOKENS_TRAINED
from service.sessions.codec import pack
from service.validation.words import counted
from workers.loops import update
from workers.loops.nonfinite import Suspects
from workers.loops.update import Experience, How, minibatches
from workers.losses.batch import bytes_of
from workers.policy.learner import Learner
from workers.policy.policy import Policy
from workers.sessions.requests import Groups, Request, groups_of, refused, rows_of, settings_of

SUM = "loss:sum"  # in answers: a name, and how to put together what several calls answered


@dataclass(frozen=True)
class Done:
    """What an operation gave: its answer, the metrics of the session's step if it was one, and what it cost."""

    head: dict[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    trained: int = 0  # tokens
    sampled: int = 0

    @property
    def answer(self) -> bytes:
        return pack(self.head, {name: bytes_of(tensor.cpu()) for name, tensor in self.tensors.items()})


@dataclass
class Trainer:
    """A session's learner with its reference, which is opened when an objective first needs it."""

    learner: Learner
    seed: int
    open_reference: Callable[[], Policy]
    beat: Callable[[], None]  # says that there is progress, between the optimizer steps of one operation
    loss: float = 0.0  # of the gradients since the last optimizer step
    _reference: Policy | None = None

    def reference_for(self, groups: Groups) -> Policy | None:
        if groups.needs_reference and self._reference is None:
            self._reference = self.open_reference()
        return self._reference if groups.needs_reference else None

    def unload(self) -> None:
        if self._reference is not None and self._reference.adapter is not None:
            self._reference.unload()
        self.learner.unload()


def forward(trainer: Trainer, request: Request, seq: int) -> Done:
    """Log-probs and the loss, without a gradient."""
    learner = trainer.learner
    if "loss" in request.head:
        rows = rows_of(request, learner.text, learner.base.device)
        log_probs = learner.score_targets(rows.items)
        loss = float(rows.of(log_probs, torch.arange(len(log_probs), device=log_probs.device)))
        return _answered_rows(request, loss, log_probs)
    groups, experience, how, measured = _experience(trainer, request, seq)
    everyone = list(range(len(experience.sequences)))
    prepared = update.prepare(groups.objective, experience, everyone, how)
    with torch.no_grad():
        value, outputs = groups.objective.loss(experience.old_log_probs, prepared.rows())
    measured |= (prepared.metrics + outputs.metrics).finish() | {SUM: float(value)}
    return _answered(measured, groups.cuts, groups.flat(experience.old_log_probs))


def forward_backward(trainer: Trainer, request: Request, seq: int) -> Done:
    """Add the gradient of the loss. Answers the log-probs that it was computed of."""
    learner = trainer.learner
    if "loss" in request.head:
        rows = rows_of(request, learner.text, learner.base.device)
        loss, log_probs = learner.accumulate_targets(rows.items, rows.of)
        trainer.loss += loss
        return _answered_rows(request, loss, log_probs, trained=len(rows.items.tokens_N))
    groups, experience, how, measured = _experience(trainer, request, seq)
    everyone = list(range(len(experience.sequences)))
    prepared = update.prepare(groups.objective, experience, everyone, how)
    loss, more = update.accumulate(learner, groups.objective, experience, everyone, prepared, how, Suspects())
    trainer.loss += loss
    measured |= (prepared.metrics + more).finish() | {SUM: loss}
    trained = int(experience.response_mask.sum())
    return _answered(measured, groups.cuts, groups.flat(experience.old_log_probs), trained=trained)


def optim_step(trainer: Trainer, request: Request, seq: int) -> Done:
    """One optimizer step from the gradients since the last one."""
    did = trainer.learner.step(settings_of(request.head))
    metrics = {f"optimizer/{name}": float(value) for name, value in did.items()} | {LOSS_SUM: trainer.loss}
    trainer.loss = 0.0
    return Done({"metrics": finite(did)}, metrics=metrics)


def train_step(trainer: Trainer, request: Request, seq: int) -> Done:
    """Advantages, minibatches and optimizer steps, as a managed job does them on a rollout.

    Gradients that were added before and not used yet take part in the first optimizer step."""
    head = request.head
    groups, experience, how, measured = _experience(trainer, request, seq)
    count, parts, epochs = len(experience.sequences), head["minibatches"], head["epochs"]
    if count % parts:
        raise refused(
            "invalid_minibatches", f"minibatches must divide the {counted(count, 'answer')}, got {parts}", "/minibatches"
        )
    cut = minibatches(count, parts, epochs, trainer.seed, seq)
    measured |= update.update(trainer.learner, groups.objective, experience, cut, how, lambda *_: trainer.beat())
    measured |= _rewards(groups)
    trained = int(experience.response_mask.sum()) * epochs
    trainer.loss = 0.0
    metrics = {**measured, TOKENS_TRAINED: float(trained)}
    told = {**metrics, SUM: measured[POLICY_LOSS]}
    return Done({"metrics": finite(told)}, {"advantages": experience.advantages.float()}, metrics, trained)


TRAINING: Mapping[str, Callable[[Trainer, Request, int], Done]] = {
    "forward": forward,
    "forward_backward": forward_backward,
    "optim_step": optim_step,
    "train_step": train_step,
}
MUTATING = frozenset({"forward_backward", "optim_step", "train_step"})
STEPS = frozenset({"optim_step", "train_step"})  # after which no gradient is left over


def _experience(trainer: Trainer, request: Request, seq: int) -> tuple[Groups, Experience, How, dict[str, float]]:
    """The answers, scored and with advantages."""
    head, learner = request.head, trainer.learner
    groups = groups_of(request, learner.text)
    settings = settings_of(head) if "optimizer" in head else None
    how = How(head["temperature"], head.get("microbatch_tokens", "auto"), groups.longest, trainer.seed, seq, settings)
    experience, measured = update.gather(
        learner, trainer.reference_for(groups), groups.objective, groups.answers, temperature=how.temperature
    )
    return groups, experience, how, measured


def _rewards(groups: Groups) -> dict[str, float]:
    """Mean and spread of the rewards that were sent; of several graders, of their weighted sum."""
    answers = groups.answers
    if answers.rewards is None:
        return {}
    rewards = answers.rewards.double()
    if rewards.dim() == 2:
        weights = torch.ones(rewards.shape[1]) if answers.reward_weights is None else answers.reward_weights
        rewards = rewards @ weights.double().to(rewards.device)
    return {REWARD_MEAN: float(rewards.mean()), "reward/std": float(rewards.std(correction=0))}


def _answered_rows(request: Request, loss: float, log_probs: Tensor, *, trained: int = 0) -> Done:
    done = _answered({SUM: loss}, request.tensors["cu_seqlens"].long(), log_probs, trained=trained)
    return replace(done, head=done.head | {"widths": request.head["widths"]}) if "widths" in request.head else done


def _answered(metrics: Mapping[str, float], cuts: Tensor, log_probs: Tensor, *, trained: int = 0) -> Done:
    return Done({"metrics": finite(metrics)}, {"cu_seqlens": cuts, "log_probs": log_probs.float()}, trained=trained)
