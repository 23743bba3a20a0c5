"""Runs a managed job step by step, from the step at which its attempt was loaded to its end.

A loop module only defines one training step (`TrainingStep`). The driver here checks for wishes, evaluates, commits, saves and
stops early. Metrics are committed before the checkpoint that covers them. This order makes a resume exact: a process that dies
in between repeats the step from the previous checkpoint and writes the same rows again. A checkpoint on the way only stops the
loop for a copy; it becomes durable and visible during the steps that follow.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.exc import InterfaceError, OperationalError

from service.errors import JobFailed, LeaseLost
from service.failures import CODES
from service.jobs import moves
from service.metric_names import STEP_S
from service.states import Phase, Wish
from workers.loops import known_metrics, rl, supervised
from workers.loops.attempt import Attempt, StepResult, TrainingStep
from workers.loops.evaluation import evaluate
from workers.loops.implausible import implausible
from workers.loops.measure import measure
from workers.loops.no_signal import given_up, no_signal
from workers.tenure.outcome import Interrupted, Outcome, Paused, Succeeded, obeyed
from workers.tenure.tenure import Contents

log = logging.getLogger(__name__)

STEPS: dict[str, TrainingStep] = {"rl": rl.step, "supervised": supervised.step}


def drive(attempt: Attempt) -> Outcome:
    """Run until max_steps, target_reached or no_improvement, or until a wish or a spent budget ends the job sooner.

    Progress has then been saved, except after a cancel that does not ask for it."""
    try:
        return _driven(attempt)
    except Interrupted as interrupted:
        return obeyed(interrupted.wish)
    finally:
        if attempt.ahead is not None:
            attempt.tenure.meter.sampled(attempt.ahead.end())


def _driven(attempt: Attempt) -> Outcome:
    spec, progress = attempt.spec, attempt.progress
    while not measure(attempt):
        if (interrupted := _interrupted(attempt)) is not None:
            return interrupted
    made_up = _owes_evaluation(attempt)
    if made_up:
        with _saving(attempt):
            evaluation = _evaluation(attempt)
        _commit(attempt, evaluation)
    ended = progress.reason_to_stop(spec.early_stopping)
    if made_up and 0 < progress.step < spec.limits.max_steps and progress.leads(spec.kept_best) and ended is None:
        attempt.tenure.saved_at = None  # what is there was saved when the evaluation failed, and does not know its result
        _save(attempt, behind=True)
    while ended is None and progress.step < spec.limits.max_steps:
        if (interrupted := _interrupted(attempt)) is not None:
            return interrupted
        _in_time(attempt)
        with _saving(attempt):
            result = STEPS[spec.kind](attempt, progress.step + 1)
        progress.step += 1
        evaluates = _owes_evaluation(attempt)
        if evaluates:
            with _saving(attempt, result):
                result = result + _evaluation(attempt)
        _commit(attempt, result)
        ended = progress.reason_to_stop(spec.early_stopping)
        if ended is None and (hopeless := given_up(progress, spec)) is not None:
            _save(attempt)
            raise hopeless
        if _is_to_be_saved(attempt, evaluated=evaluates) and ended is None and progress.step < spec.limits.max_steps:
            _save(attempt, behind=True)
    _save(attempt, final=True)
    ended = ended or "max_steps"
    return Succeeded(progress.result(ended), ended)


def _is_to_be_saved(attempt: Attempt, *, evaluated: bool) -> bool:
    """Whether the step is one of checkpoints.every_steps, or its evaluation is a new best. To be asked once per step."""
    leads = evaluated and attempt.progress.leads(attempt.spec.kept_best)  # on scheduled steps too, so that it is remembered
    return leads or attempt.progress.step % attempt.spec.checkpoints.every_steps == 0


def _interrupted(attempt: Attempt) -> Outcome | None:
    """The outcome if the job must stop here, because of a wish of its owner or worker or a spent budget; else None."""
    if attempt.tenure.could_not_save:
        _save(attempt)  # now, and not at the next checkpoint: if this one fails, too, the attempt ends
    wish = attempt.tenure.check()
    if wish is None and not attempt.tenure.budget_spent:
        return None
    if wish is not Wish.CANCEL:
        _save(attempt)
    return Paused("budget_spent") if wish is None else obeyed(wish)


def _in_time(attempt: Attempt) -> None:
    """If the job has no time left, save and raise JobFailed."""
    job, allowed_s, run_s = attempt.tenure.job, attempt.spec.limits.max_runtime_s, attempt.tenure.run_s
    if job.deadline_at is not None and attempt.tenure.now > job.deadline_at:
        _save(attempt)
        failed = moves.deadline(job)
        raise JobFailed(failed.code, failed.detail)
    if run_s > allowed_s:
        _save(attempt)
        raise JobFailed(
            "max_runtime",
            f"the job ran for {run_s:.0f} s, allowed are {allowed_s:.0f} s (limits.max_runtime_s)",
        )


@contextmanager
def _saving(attempt: Attempt, result: StepResult | None = None) -> Iterator[None]:
    """If the work inside fails, save the progress made before it, so that no complete step is lost. Nothing is saved if the
    weights have changed since. `result` belongs to a complete step that is not committed yet."""
    progress, updates = attempt.progress, attempt.policy.updates
    try:
        yield
    except (LeaseLost, OperationalError, InterfaceError):  # the lease is lost, or the database is away
        raise
    except Interrupted as interrupted:  # while answers were sampled elsewhere: no weights have changed
        if result is not None:
            _commit(attempt, result)
        if interrupted.wish is not Wish.CANCEL:
            _save(attempt)
        raise
    except Exception as error:
        phase = attempt.tenure.phase
        pauses = isinstance(error, JobFailed) and CODES[error.code].pauses
        if attempt.policy.updates == updates and (progress.step > 0 or pauses):
            with _or_logged():
                if result is not None:
                    _commit(attempt, result)
                _save(attempt)
        attempt.tenure.blame(Phase.GRADING if pauses and phase is Phase.SAMPLING else phase)
        raise


@contextmanager
def _or_logged() -> Iterator[None]:
    """Log a failure inside instead of raising it, because the earlier failure is the one to report."""
    try:
        yield
    except LeaseLost:
        raise
    except Exception:
        log.warning("the progress before a failure could not be saved", exc_info=True)


def _owes_evaluation(attempt: Attempt) -> bool:
    """Whether an evaluation is due at the current step. One that failed is repeated when the job continues."""
    spec, progress = attempt.spec, attempt.progress
    if attempt.data.eval is None or progress.evaluated_at == progress.step:
        return False
    return progress.evaluated_at is None or _is_due(progress.step, spec.eval.every_steps, spec.limits.max_steps)


def _evaluation(attempt: Attempt) -> StepResult:
    attempt.tenure.check(Phase.EVALUATING)
    progress = attempt.progress
    result = evaluate(attempt, progress.step)
    progress.evaluated(progress.step, result.metrics, attempt.spec.early_stopping)
    return result


def _commit(attempt: Attempt, result: StepResult) -> None:
    known_metrics.check(result.metrics, attempt.spec.kind, strict=attempt.tenure.settings.strict_metrics)
    progress = attempt.progress
    events = list(result.events)
    events += implausible(progress, result.metrics)
    if STEP_S in result.metrics:
        events += no_signal(progress, attempt.spec, result.metrics)
    if progress.evaluated_at == progress.step:
        events.append(("evaluation", {"step": progress.step, "metrics": progress.last}))
    attempt.tenure.commit_step(progress.step, result.metrics, result.rollouts, events)


def _save(attempt: Attempt, *, final: bool = False, behind: bool = False) -> None:
    progress = attempt.progress

    def write(folder: Path) -> None:
        attempt.policy.save(folder)
        progress.save(folder)

    measured = progress.last if progress.evaluated_at == progress.step else {}
    contents = Contents(progress.step, attempt.policy.kind, write, measured)
    attempt.tenure.save(contents, attempt.spec.checkpoints, attempt.spec.kept_best, final=final, behind=behind)


def _is_due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last
