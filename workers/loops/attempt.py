"""One attempt at a job: what both loops need, and the driver that runs them step by step.

A loop only says what one training step is (`Step`). The driver looks for wishes, evaluates, commits, saves, stops early.
The order inside a step is what makes a resume exact: metrics are committed first, then the checkpoint that covers them,
so a process that dies in between repeats the step from the checkpoint before and writes the same rows again.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from time import monotonic
from typing import Any

from service.doorbell import Doorbell
from service.errors import JobFailed
from service.failures import CODES
from service.ids import new_id, utcnow
from service.jobs import lease as leases
from service.jobs import moves
from service.jobs.data import Data
from service.jobs.lease import CheckpointRow, Lease, RolloutRow
from service.rewards import Rewards
from service.settings import Settings
from service.spec.job import RLSpec, SupervisedSpec
from service.states import Phase, Wish
from service.store.session import Store
from service.store.tables import Job
from workers.heartbeat import Heartbeat
from workers.loops.progress import Progress
from workers.policy.checkpoint import write_manifest
from workers.policy.learner import Learner
from workers.policy.policy import Policy

log = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 10  # optimizer steps with a non-finite gradient before the job fails


class Stopped(Exception):
    """The owner, or a stopping worker, wants the loop to end here; everything worth keeping has been saved."""

    def __init__(self, wish: Wish) -> None:
        super().__init__(wish.value)
        self.wish = wish


class BudgetSpent(Exception):
    """The job, or its project, has nothing left to spend; what was done has been saved."""


Event = tuple[str, dict[str, Any]]  # type and data


@dataclass(frozen=True)
class StepResult:
    """What one training step gives to be kept."""

    metrics: dict[str, float]
    rollouts: list[RolloutRow] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def __add__(self, other: "StepResult") -> "StepResult":
        metrics = {**self.metrics, **other.metrics}
        return StepResult(metrics, self.rollouts + other.rollouts, self.events + other.events)


@dataclass
class Held:
    """A claimed job, and what the worker that holds it talks to."""

    store: Store
    settings: Settings
    doorbell: Doorbell
    lease: Lease
    job: Job
    spec: RLSpec | SupervisedSpec
    heartbeat: Heartbeat


@dataclass
class Attempt(Held):
    """And, once loaded, the parts that are alive for the length of one attempt."""

    data: Data
    rewards: Rewards | None
    policy: Learner
    progress: Progress
    saved_at: int | None  # the step of the newest checkpoint
    budget_spent: bool = False
    reference: Policy | None = None  # where the objective needs its log_probs

    def phase(self, phase: Phase) -> None:
        """Between pieces of work: says what comes next, and raises LeaseLost for a zombie."""
        self.heartbeat.check(phase)

    def count_skipped(self, skipped: bool, step: int) -> None:
        """A loss or gradient that is not finite never reaches the weights; too many in a row end the job."""
        self.progress.skipped_in_a_row = self.progress.skipped_in_a_row + 1 if skipped else 0
        if self.progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise JobFailed(
                "non_finite_loss",
                f"the gradient was not finite in {MAX_SKIPPED_IN_A_ROW} optimizer steps in a row, up to step {step}",
            )


Step = Callable[[Attempt, int], StepResult]
Evaluate = Callable[[Attempt, int], StepResult]


def drive(attempt: Attempt, step: Step, evaluate: Evaluate) -> str:
    """Run to the end. Returns why it ended: max_steps, target_reached or no_improvement. Raises Stopped for a wish."""
    spec, progress = attempt.spec, attempt.progress
    if attempt.data.eval is not None and progress.evaluated_at is None:
        _commit(attempt, _evaluation(attempt, evaluate))
    ended = progress.reason_to_stop(spec.early_stopping)
    while ended is None and progress.step < spec.limits.max_steps:
        _obey(attempt)
        _in_time(attempt)
        result = _step(attempt, step)
        if attempt.data.eval is not None and _is_due(progress.step, spec.eval.every_steps, spec.limits.max_steps):
            evaluation = _evaluation(attempt, evaluate)
            result = result + evaluation
        _commit(attempt, result)
        ended = progress.reason_to_stop(spec.early_stopping)
        if ended is None and progress.step < spec.limits.max_steps and progress.step % spec.checkpoints.every_steps == 0:
            save(attempt)
    save(attempt, final=True)
    return ended or "max_steps"


def _step(attempt: Attempt, step: Step) -> StepResult:
    """The next step. When the job has to pause before anything was learnt in it, what came before is saved."""
    try:
        result = step(attempt, attempt.progress.step + 1)
    except JobFailed as failed:
        if CODES[failed.code].pauses and attempt.heartbeat.phase in (Phase.SAMPLING, Phase.GRADING):
            save(attempt)
            attempt.heartbeat.phase = Phase.GRADING
        raise
    attempt.progress.step += 1
    return result


def save(attempt: Attempt, *, final: bool = False) -> None:
    """Write a checkpoint so that it is either wholly there or not at all, then point the job at it."""
    if attempt.saved_at == attempt.progress.step and not final:
        return
    attempt.phase(Phase.SAVING)
    keep, row = attempt.spec.checkpoints, _write(attempt, final=final)
    spent = attempt.heartbeat.meter.take()
    attempt.heartbeat.patiently(lambda: leases.commit_checkpoint(attempt.store, attempt.lease, row, spent=spent))
    for path in attempt.heartbeat.patiently(lambda: leases.retain(attempt.store, attempt.lease, keep)):
        attempt.store.blobs.delete(path)
    attempt.saved_at = attempt.progress.step
    log.info("job %s: checkpoint %s at step %d", attempt.job.id, row.id, attempt.saved_at)
    attempt.doorbell.signal(attempt.job.id, "events")


def _write(attempt: Attempt, *, final: bool) -> CheckpointRow:
    """The folder, in the blob store. What could not be written whole is removed at once: the disk may be full."""
    blobs, progress, checkpoint_id = attempt.store.blobs, attempt.progress, new_id("ckpt")
    relative = f"checkpoints/{attempt.job.id}/{checkpoint_id}"
    folder = blobs.temporary_dir((attempt.job.id, attempt.lease.attempt))
    try:
        attempt.policy.save(folder)
        progress.save(folder)
        manifest_sha256 = write_manifest(folder)
        size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        blobs.commit_dir(folder, relative)
    except BaseException:
        blobs.discard(folder)
        raise
    return CheckpointRow(
        id=checkpoint_id,
        step=progress.step,
        adapter=attempt.policy.kind,
        model=attempt.job.spec["model"],
        path=relative,
        size_bytes=size_bytes,
        manifest_sha256=manifest_sha256,
        metrics=progress.last if progress.evaluated_at == progress.step else {},
        has_optimizer=True,
        is_final=final,
    )


def _is_due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


def _evaluation(attempt: Attempt, evaluate: Evaluate) -> StepResult:
    attempt.phase(Phase.EVALUATING)
    progress, spec = attempt.progress, attempt.spec
    result = evaluate(attempt, progress.step)
    progress.evaluated(progress.step, result.metrics, spec.early_stopping)
    return result


def _commit(attempt: Attempt, result: StepResult) -> None:
    step, events = attempt.progress.step, [*result.events]
    if attempt.progress.evaluated_at == step:
        events.append(("evaluation", {"step": step, "metrics": attempt.progress.last}))
    spent, tries = attempt.heartbeat.meter.take(), count()

    def commit() -> bool:
        return leases.commit_step(
            attempt.store,
            attempt.lease,
            step,
            result.metrics,
            result.rollouts,
            events,
            spent=spent,
            again=next(tries) > 0,
        )

    attempt.budget_spent = attempt.heartbeat.patiently(commit)
    attempt.doorbell.signal(attempt.job.id, "events")


def _obey(attempt: Attempt) -> None:
    wish = attempt.heartbeat.check()
    if wish is None:
        if attempt.budget_spent:
            save(attempt)
            raise BudgetSpent
        return
    if wish is not Wish.CANCEL:
        save(attempt)
    raise Stopped(wish)


def _in_time(attempt: Attempt) -> None:
    allowed = attempt.spec.limits.max_runtime_s
    spent = attempt.job.run_s + (monotonic() - attempt.heartbeat.started)
    late = attempt.job.deadline_at is not None and utcnow() > attempt.job.deadline_at
    if late:
        save(attempt)
        failed = moves.deadline(attempt.job)
        raise JobFailed(failed.code, failed.detail)
    if spent > allowed:
        save(attempt)
        raise JobFailed(
            "max_runtime",
            f"the job ran for {spent:.0f} s, allowed are {allowed:.0f} s (limits.max_runtime_s)",
        )
