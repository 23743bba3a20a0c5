"""What the API asks for: one transaction each, then the doorbell. A bell that was not heard is rung again by the reconciler."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sqlalchemy import update
from sqlalchemy.orm import Session

from service.doorbell import Doorbell
from service.errors import Conflict, FieldError, InvalidRequest, NotFound
from service.ids import new_id, utcnow
from service.jobs import moves
from service.jobs.state import ACTIONS, FINAL, Status, Wish, allowed_actions
from service.store import checkpoints, datasets, events, jobs
from service.store.session import Store
from service.store.tables import Job

if TYPE_CHECKING:
    from service.jobs.resolve import Resolved

# Asked for again, these are answered with the job as it is: a client that got no answer may repeat itself.
ALREADY = {
    "pause": frozenset({Status.PAUSING, Status.PAUSED}),
    "resume": frozenset[Status](),
    "cancel": frozenset({Status.CANCELLING, Status.CANCELLED}),
}
WISHES = {Status.PAUSING: Wish.PAUSE, Status.CANCELLING: Wish.CANCEL}


def create_job(
    store: Store,
    doorbell: Doorbell,
    *,
    project: str,
    sent: dict[str, Any],
    resolved: "Resolved",
    parent_id: str | None = None,
    also: Callable[[Session, Job], None] | None = None,
) -> Job:
    """Queue a job. `also` runs in the same transaction: there an idempotency key is completed with the job's answer.

    Raises InvalidRequest when a checkpoint or dataset that `resolved` names was deleted meanwhile.
    """
    now, spec = utcnow(), resolved.spec
    resources = spec.get("resources", {})
    job = Job(
        id=new_id("job"),
        project=project,
        kind=resolved.kind,
        name=spec["name"],
        tags=list(spec["tags"]),
        user_metadata=spec["metadata"],
        spec_sent=sent,
        spec=spec,
        spec_sha256=resolved.spec_sha256,
        data_sha256=resolved.data_sha256,
        resolved={},
        parent_id=parent_id,
        from_checkpoint_id=resolved.from_checkpoint_id,
        status=Status.QUEUED.value,
        status_reason="created",
        max_steps=resolved.max_steps,
        priority=resources.get("priority", 50),
        resource_class=resources.get("class", "any"),
        created_at=now,
        updated_at=now,
        queued_at=now,
        rung_at=now,
    )
    with store.begin() as session:
        _hold_inputs(session, job)
        session.add(job)
        session.flush()
        created = ("created", {"kind": job.kind, "name": job.name, "parent_id": parent_id, "status": job.status})
        events.append_all(session, job.id, [created, ("queued", {"resource_class": job.resource_class})], now=now)
        session.refresh(job)
        if also is not None:
            also(session, job)
    _ring(store, doorbell, job)
    return job


def _hold_inputs(session: Session, job: Job) -> None:
    """What the job starts from must still be there when it is queued; from then on it cannot be deleted."""
    wanted: list[tuple[str, str, Callable[[Session, str, str], Any]]] = []
    if job.from_checkpoint_id is not None:
        wanted.append(("/model/from_checkpoint", job.from_checkpoint_id, checkpoints.hold))
    for part in ("train", "eval"):
        source = job.spec.get("data", {}).get(part) or {}
        if source.get("source") == "dataset":
            wanted.append((f"/data/{part}/id", source["id"], datasets.hold))
    for pointer, id_, hold in wanted:
        try:
            hold(session, job.project, id_)
        except NotFound as error:
            raise InvalidRequest(error.detail, [FieldError(pointer, error.detail, "not_found", got=id_)]) from error


def pause(store: Store, doorbell: Doorbell, project: str, job_id: str) -> Job:
    """A queued job pauses at once; a running one saves a checkpoint first."""
    return _act(store, doorbell, project, job_id, "pause")


def resume(store: Store, doorbell: Doorbell, project: str, job_id: str) -> Job:
    """A paused job queues again, and goes on from its last checkpoint."""
    return _act(store, doorbell, project, job_id, "resume")


def cancel(store: Store, doorbell: Doorbell, project: str, job_id: str) -> Job:
    """A job that nobody runs is cancelled at once; a running one when its worker has seen the wish."""
    return _act(store, doorbell, project, job_id, "cancel")


def _act(store: Store, doorbell: Doorbell, project: str, job_id: str, action: str) -> Job:
    with store.begin() as session:
        job = jobs.get(session, project, job_id, lock=True)
        status = Status(job.status)
        if status in ALREADY[action]:
            return job
        target = ACTIONS[action].get(status)
        if target is None:
            raise _illegal(job, action)
        now, wish = utcnow(), WISHES.get(target)
        values: dict[str, Any] = {"wish": None if wish is None else wish.value}
        if target is Status.QUEUED:
            values |= {"rung_at": now}
        moves.move(session, job, target, f"{action}_requested", now, **values)
    doorbell.signal(job.id, "events" if wish is None else "wish")
    if target is Status.QUEUED:
        _ring(store, doorbell, job)
    return job


def delete(store: Store, project: str, job_id: str) -> None:
    """Remove a job that has ended, with its events, metrics and rollouts. Its checkpoints stay."""
    with store.begin() as session:
        job = jobs.get(session, project, job_id, lock=True)
        if Status(job.status) not in FINAL:
            raise _illegal(job, "delete")
        jobs.remove(session, job_id)


def _illegal(job: Job, action: str) -> Conflict:
    allowed = allowed_actions(Status(job.status))
    return Conflict(
        f"job {job.id} is {job.status}; {action} is not possible now",
        code="illegal_transition",
        hint=f"possible now: {', '.join(allowed) or 'nothing'}",
        allowed_moves=allowed,
        job_status=job.status,
    )


def _ring(store: Store, doorbell: Doorbell, job: Job) -> None:
    """After the commit. The row says already that the bell was rung; when it was not, the reconciler shall not wait."""
    if doorbell.ring(job.id, job.resource_class):
        return
    with store.begin() as session:
        unheard = update(Job).where(Job.id == job.id, Job.status == Status.QUEUED.value).values(rung_at=None)
        session.execute(unheard, execution_options={"synchronize_session": False})
