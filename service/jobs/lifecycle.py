"""The API's operations on jobs. Each is one transaction, then a ring; if the ring is lost, the reconciler rings again."""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sqlalchemy import update
from sqlalchemy.orm import Session

from service import tracing
from service.doorbell import Doorbell, class_of
from service.errors import Busy, Conflict, FieldError, InvalidRequest, NotFound
from service.ids import new_id
from service.jobs import moves
from service.jobs.lease import IDLE
from service.settings import Settings
from service.states import ACTIONS, FINAL, HELD, Status, Wish, allowed_actions
from service.store import checkpoints, clock, datasets, events, jobs, operations, usage
from service.store.jobs import SmallJob
from service.store.operations import Asked, Load
from service.store.session import Store
from service.store.tables import Job, Operation
from service.validation.words import counted

if TYPE_CHECKING:
    from service.jobs.resolve import Resolved

# A repeated request for one of these returns the job unchanged, so a client that got no response can retry.
ALREADY = {
    "pause": frozenset({Status.PAUSING, Status.PAUSED}),
    "resume": frozenset[Status](),
    "cancel": frozenset({Status.CANCELLING, Status.CANCELLED}),
}
CANCEL_GRACE_S = 60.0


def create_job(
    store: Store,
    doorbell: Doorbell,
    *,
    project: str,
    sent: dict[str, Any],
    resolved: "Resolved",
    parent_id: str | None = None,
    key_id: str | None = None,
    also: Callable[[Session, Job], None] | None = None,
) -> Job:
    """Queue a job. `also` runs in the same transaction, to complete an idempotency key with the response.

    Raises NotFound when the parent was deleted meanwhile, InvalidRequest when it was a checkpoint or dataset that `resolved`
    names.
    """
    spec = resolved.spec
    budget = spec.get("limits", {}).get("budget") or {}
    resources, deadline_s = spec.get("resources", {}), spec.get("limits", {}).get("deadline_s")
    with store.begin() as session:
        now = clock.now(session)
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
            resolved={} if (trace := tracing.here()) is None else {"traceparent": trace},
            parent_id=parent_id,
            from_checkpoint_id=resolved.from_checkpoint_id,
            status=Status.QUEUED.value,
            status_reason="created",
            max_steps=resolved.max_steps,
            priority=resources.get("priority", 50),
            resource_class=class_of(resources.get("class", "any"), resources.get("gpus", 1)),
            created_at=now,
            updated_at=now,
            queued_at=now,
            rung_at=now,
            key_id=key_id,
            budget_tokens=budget.get("tokens"),
            budget_worker_s=budget.get("worker_s"),
            deadline_at=None if deadline_s is None else now + timedelta(seconds=deadline_s),
            base_key=resolved.base_key,
        )
        if parent_id is not None:  # before its checkpoints: in the order in which a delete takes them
            jobs.hold(session, project, parent_id)
        _hold_inputs(session, job)
        created = ("created", {"kind": job.kind, "name": job.name, "parent_id": parent_id, "status": job.status})
        events.begin(session, job, [created, ("queued", {"resource_class": job.resource_class})], now=now)
        if also is not None:
            also(session, job)
    _ring(store, doorbell, job)
    return job


def _hold_inputs(session: Session, job: Job) -> None:
    """Check that the job's inputs still exist. Once the job is queued, they cannot be deleted."""
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


def append_operations(
    store: Store,
    doorbell: Doorbell,
    settings: Settings,
    project: str,
    job_id: str,
    asked: Sequence[Asked],
    *,
    also: Callable[[Session, list[Operation]], None] | None = None,
) -> list[Operation]:
    """Log operations of a session or sampler, all or none, and wake its worker; they are durable when this returns. A repeat
    returns the rows of the first time, also where an alias that it names was promoted or deleted since: what is named is
    looked up once, when it is logged.

    A session that rests because it was idle is queued again; one that its owner paused keeps them until it is resumed.
    Raises NotFound, Conflict `session_over`, InvalidRequest `seq_reused` or of a `lookup`, Busy if too much waits already.
    """
    woken, trace = None, tracing.here()
    # Without the ORM, which would take longer than the database. Its worker begins while the disk is still written to.
    with store.write(synced=False) as connection:
        job, now = jobs.lock_small(connection, job_id), clock.now(connection)
        if job is None or job.project != project or job.kind not in operations.KINDS:
            raise NotFound(f"no session {job_id} in this project")
        before = operations.load(connection, job.id)
        appended = [operations.append(connection, job_id, each, now, trace) for each in asked]
        rows, fresh = [row for row, _ in appended], [row for row, new in appended if new]
        if fresh and job.status in FINAL:
            raise Conflict(
                f"the {job.kind} {job.id} has ended: {job.status} ({job.status_reason})",
                code="session_over",
                hint="start another session, from one of its checkpoints: model.from_checkpoint",
                job_status=job.status,
            )
        if fresh:
            _has_room(settings, job, before, len(fresh), sum(row.size_bytes for row in fresh))
        named = [(each, row) for each, (row, new) in zip(asked, appended, strict=True) if new and each.lookup is not None]
        rests = bool(fresh) and job.status == Status.PAUSED and job.status_reason == IDLE
        if rests or named or also is not None:
            with Session(connection, expire_on_commit=False) as session:
                for each, row in named:
                    assert each.lookup is not None
                    operations.rewrite(session, row, each.lookup(session, project))
                if rests:
                    woken = jobs.get(session, project, job_id)
                    moves.move(session, woken, Status.QUEUED, "operation", now, rung_at=now)
                if also is not None:
                    also(session, rows)
                session.commit()  # into the connection's transaction
    if woken is not None:
        _ring(store, doorbell, woken)
    elif fresh:
        doorbell.signal(job_id, "operation")
    store.sync()
    return rows


def withdraw_operation(store: Store, operation_id: str) -> None:
    """Its caller went away: if it still waits, nobody shall work for it. Of unordered lanes only."""
    with store.begin() as session:
        operations.withdraw(session, operation_id)


def _has_room(settings: Settings, job: SmallJob, waiting: Load, count: int, size_bytes: int) -> None:
    most, most_bytes = settings.max_waiting_operations, settings.max_waiting_operation_bytes
    if waiting.count + count > most or (waiting.count and waiting.size_bytes + size_bytes > most_bytes):
        raise Busy(
            f"{job.id} has {counted(waiting.count, 'waiting operation')} "
            f"({waiting.size_bytes} bytes); allowed are {most} ({most_bytes})",
            code="session_full",
            hint="wait for answers before sending more",
        )


def pause(store: Store, doorbell: Doorbell, project: str, job_id: str, *, grace_s: float | None = None) -> Job:
    """A queued job pauses at once; a running one saves a checkpoint first.

    A worker that has not done so within `grace_s` is killed, and the job pauses at its last checkpoint. Without `grace_s` the
    step may take as long as limits.stall_timeout_s allows.
    """
    return _act(store, doorbell, project, job_id, "pause", wish=Wish.PAUSE, grace_s=grace_s)


def resume(
    store: Store, doorbell: Doorbell, project: str, job_id: str, *, budget: Mapping[str, float | None] | None = None
) -> Job:
    """Queue a paused job, which continues from its last checkpoint. `budget` (tokens, worker_s) replaces the amounts it names.

    Raises Conflict `budget_spent` if the job has no budget left.
    """
    columns = {f"budget_{name}": value for name, value in (budget or {}).items()}
    return _act(store, doorbell, project, job_id, "resume", columns=columns)


def cancel(
    store: Store, doorbell: Doorbell, project: str, job_id: str, *, save: bool = False, grace_s: float = CANCEL_GRACE_S
) -> Job:
    """Cancel a job: at once if no worker runs it, else as soon as its worker obeys.

    `save`: the worker saves a checkpoint first. A worker that has not obeyed within `grace_s` is killed.
    """
    wish = Wish.SAVE_AND_CANCEL if save else Wish.CANCEL
    return _act(store, doorbell, project, job_id, "cancel", wish=wish, grace_s=grace_s)


def _act(
    store: Store,
    doorbell: Doorbell,
    project: str,
    job_id: str,
    action: str,
    *,
    wish: Wish | None = None,
    grace_s: float | None = None,
    columns: Mapping[str, Any] = MappingProxyType({}),
) -> Job:
    with store.begin() as session:
        job, now = jobs.get(session, project, job_id, lock=True), clock.now(session)
        status = Status(job.status)
        until = None if grace_s is None else now + timedelta(seconds=grace_s)
        if status in ALREADY[action]:
            if status in HELD and until is not None and (job.wish_until is None or until < job.wish_until):
                job.wish_until = until  # a repeated request with a shorter grace
            return job
        target = ACTIONS[action].get(status)
        if target is None:
            raise _illegal(job, action)
        values: dict[str, Any] = {"wish": wish, "wish_until": until} if target in HELD else {}
        if target is Status.QUEUED:
            values |= {"rung_at": now, "error": None, **columns}
        moves.move(session, job, target, f"{action}_requested", now, **values)
        if target is Status.QUEUED and usage.is_spent(session, job):
            raise _spent(job)
    doorbell.signal(job.id, "wish" if target in HELD else "events")
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


def _spent(job: Job) -> Conflict:
    return Conflict(
        f"job {job.id} has nothing left to spend, by its own budget or by its project's",
        code="budget_spent",
        hint="resume it with a larger budget: {tokens, worker_s}; the project's is set by the administrators (PUT /v1/budget)",
        allowed_moves=allowed_actions(Status.PAUSED),
        job_status=Status.PAUSED.value,
    )


def _illegal(job: Job, action: str) -> Conflict:
    allowed = allowed_actions(Status(job.status))
    return Conflict(
        f"job {job.id}: {action} is not possible now, its status is {job.status}",
        code="illegal_transition",
        hint=f"possible now: {', '.join(allowed) or 'nothing'}",
        allowed_moves=allowed,
        job_status=job.status,
    )


def _ring(store: Store, doorbell: Doorbell, job: Job) -> None:
    """Ring after the commit. The row already says that the bell was rung; if ringing fails, correct it for the reconciler."""
    if job.base_key is not None:
        doorbell.signal(job.base_key, "guest")  # a process that has the base already takes it without waiting for a free worker
    if doorbell.ring(job.id, job.resource_class):
        return
    with store.begin() as session:
        unheard = update(Job).where(Job.id == job.id, Job.status == Status.QUEUED.value).values(rung_at=None)
        session.execute(unheard, execution_options={"synchronize_session": False})
