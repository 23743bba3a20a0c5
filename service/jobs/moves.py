"""How a job moves from one status to another: compare-and-swap on (status, attempt), with its event in the same transaction."""

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, update
from sqlalchemy.orm import Session

from service.errors import Conflict, Failure
from service.states import FINAL, HELD, Status, allowed_actions, is_legal
from service.store import events, operations, usage
from service.store.jobs import Runtime
from service.store.tables import Job
from service.validation.words import counted

KEPT_AFTER_THE_END = timedelta(hours=1)  # the errors of operations that an ended session left undone
WISHED = frozenset({Status.PAUSING, Status.CANCELLING})


def move(session: Session, job: Job, target: Status, reason: str, now: datetime, **values: Any) -> None:
    """Move a job that this transaction has locked; `values` are further columns to set.

    The columns that follow from the target (queue times, the end, the cleared lease) are set here. `job` is refreshed. Raises
    Conflict if the move is not legal, or if the row differs from `job`.
    """
    source = Status(job.status)
    if not is_legal(source, target):
        raise Conflict(
            f"job {job.id} is {source}; it cannot become {target}",
            code="illegal_transition",
            allowed_moves=allowed_actions(source),
        )
    columns = _consequences(job, target, now) | {"status": target.value, "status_reason": reason, "updated_at": now} | values
    unchanged = (Job.id == job.id, Job.status == source.value, Job.attempt == job.attempt)
    swapped = update(Job).where(*unchanged).values(**columns).returning(Job.attempt)
    attempt = session.scalar(swapped, execution_options={"synchronize_session": False})
    if attempt is None:
        raise Conflict(f"job {job.id} was changed at the same moment; look again", code="changed_meanwhile")
    said = {"from": source.value, "to": target.value, "reason": reason, "attempt": attempt}
    if source in HELD and target not in HELD:
        usage.close(session, job, running_s(job, now), now, wasted=target is not Status.SUCCEEDED)
    events.append(session, job.id, "status_changed", said, now=now)
    if target in FINAL and job.kind in operations.KINDS:
        operations.fail_waiting(session, job.id, _over(job, target, reason), now=now, expires_at=now + KEPT_AFTER_THE_END)
    session.refresh(job)


def _over(job: Job, target: Status, reason: str) -> dict[str, Any]:
    """The error of an operation that its session's end left undone."""
    detail = f"the {job.kind} {job.id} has ended ({target.value}: {reason}) before this operation ran"
    return {"code": "session_over", "detail": detail, "category": "server" if target is Status.FAILED else "user"}


def _consequences(job: Job, target: Status, now: datetime) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    if job.status in HELD and target not in HELD:
        columns |= {
            "lease_until": None,
            "lease_owner": None,
            "claimed_at": None,
            "wish": None,
            "wish_until": None,
            "phase": None,
        }
        columns["run_s"] = job.run_s + running_s(job, now)
    if target is Status.QUEUED:
        columns |= {"queued_at": now, "rung_at": None, "not_before": None}
    if target in FINAL:
        columns["finished_at"] = now
    return columns


def running_s(job: Job | Runtime | Row[Any], now: datetime) -> float:
    """Seconds of the present attempt. What came after the end of its lease is not its worker's, nor its owner's to pay."""
    if job.claimed_at is None:
        return 0.0
    until = now if job.lease_until is None else min(now, job.lease_until)
    return max(0.0, (until - job.claimed_at).total_seconds())


def end(session: Session, job: Job, target: Status, reason: str, now: datetime, **values: Any) -> Status:
    """Take a held job from its worker and move it to `target`, or to what its owner's wish demands. Returns the new status.

    A job that should be cancelled is cancelled however the attempt ended; a job that should pause is not queued again.
    """
    source = Status(job.status)
    if source is Status.CANCELLING:
        target = Status.CANCELLED
    elif source is Status.PAUSING and target is Status.QUEUED:
        target = Status.PAUSED
    elif source is Status.RUNNING and target is Status.PAUSED:
        move(session, job, Status.PAUSING, reason, now)
    elif target is Status.CANCELLED:
        move(session, job, Status.CANCELLING, reason, now)
    move(session, job, target, reason, now, **values)
    return target


def fail(session: Session, job: Job, failure: Failure, now: datetime, **values: Any) -> Status:
    """End a job with a named failure: stored, told in an event, and the reason of the move."""
    error = tell(session, job, failure, now)
    if job.status in HELD:
        return end(session, job, Status.FAILED, failure.code, now, error=error, **values)
    move(session, job, Status.FAILED, failure.code, now, error=error, **values)
    return Status.FAILED


def tell(session: Session, job: Job, failure: Failure, now: datetime) -> dict[str, Any]:
    """Write the failure into the job's log and the ledger. Returns it as it is stored.

    That is with where the job stood, unless the failure says so itself.
    """
    error = {"attempt": job.attempt, "step": job.step, **({"phase": job.phase} if job.phase else {}), **failure.as_dict()}
    events.append(session, job.id, "failure", error, now=now)
    usage.failed(session, job, failure.code, now)
    return error


def put_back(session: Session, job: Job, failure: Failure, now: datetime, **values: Any) -> Status:
    """Move a held job back to the queue (or as near as its owner's wish allows), and say why."""
    error = tell(session, job, failure, now)
    return end(session, job, Status.QUEUED, failure.code, now, error=error, **values)


def deadline(job: Job) -> Failure:
    """The failure of a job that passed its deadline."""
    passed = "" if job.deadline_at is None else f" at {job.deadline_at:%Y-%m-%d %H:%M:%S} UTC"
    return Failure("deadline", f"the job's deadline passed{passed} (limits.deadline_s)")


def unresponsive(session: Session, job: Job, now: datetime) -> Status | None:
    """Settle a job whose worker did not obey in time, as its owner wished. We killed it, so no crash is counted."""
    if job.status not in WISHED or job.wish_until is None or job.wish_until >= now:
        return None
    detail = f"the training process did not {job.wish} in the time that it was given, and was killed"
    return put_back(session, job, Failure("unresponsive", detail), now)


def lost(session: Session, job: Job, code: str, now: datetime) -> Status:
    """Settle a held job whose worker is gone. If attempts die repeatedly without a new checkpoint, the job fails."""
    crashes = job.crashes + 1
    allowed = int(job.spec.get("limits", {}).get("max_attempts", 3))
    if job.status == Status.RUNNING and crashes >= allowed:
        detail = f"the worker was lost {counted(crashes, 'time')} without a new checkpoint (limits.max_attempts is {allowed})"
        return fail(session, job, Failure("crash_loop", detail), now, crashes=crashes)
    failure = Failure(code, f"attempt {job.attempt} ended without a word")
    return put_back(session, job, failure, now, crashes=crashes)
