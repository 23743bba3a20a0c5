"""A worker's writes to the store. Each one checks the lease: a worker that has lost it changes nothing and gets LeaseLost.

A lease is (job, attempt, owner). The attempt is the fencing token: the statement that sets the job running also increases it
by one, so no two workers ever hold the same attempt. Times are read from the database's clock, and durations from the workers'
monotonic clocks, because a machine's wall clock may be wrong or be set during the work.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from math import isfinite
from typing import Any

from sqlalchemy import Connection, update
from sqlalchemy.orm import Session

from service.doorbell import Doorbell
from service.errors import Failure, LeaseLost
from service.jobs import moves
from service.metric_names import EVAL_LOSS, EVAL_REWARD_MEAN, is_live
from service.settings import Settings
from service.spec.job import CheckpointsSpec, KeepBest
from service.states import HELD, Phase, Status, Wish
from service.store import checkpoints, clock, events, jobs, metrics, operations, rollouts, usage, workers
from service.store.checkpoints import CheckpointRow
from service.store.jobs import SmallJob
from service.store.operations import Answered
from service.store.rollouts import RolloutRow
from service.store.session import Store
from service.store.tables import Checkpoint, Job, Worker
from service.store.usage import NOTHING, Spent

__all__ = ["Answered", "CheckpointRow", "Lease", "RolloutRow"]

IDLE = "idle"  # why a session rests that will go on by itself when an operation comes


@dataclass(frozen=True)
class Lease:
    job_id: str
    attempt: int
    owner: str


@contextmanager
def _holding(store: Store, lease: Lease) -> Iterator[tuple[Session, Job]]:
    """A transaction in which the job is locked. Raises LeaseLost if the lease no longer holds the job."""
    with store.begin() as session:
        job = jobs.find(session, lease.job_id, lock=True, light=True)
        # A job that is no longer held has no owner; one that was claimed again has a higher attempt.
        if job is None or job.attempt != lease.attempt or job.lease_owner != lease.owner:
            raise _lost(lease, job)
        yield session, job


@contextmanager
def _stepping(store: Store, lease: Lease) -> Iterator[tuple[Connection, SmallJob]]:
    """The same for what every step does, without the ORM, which would take longer than the database."""
    with store.write() as connection:
        job = jobs.lock_small(connection, lease.job_id)
        if job is None or job.attempt != lease.attempt or job.lease_owner != lease.owner:
            raise _lost(lease, job)
        yield connection, job


def _lost(lease: Lease, job: Job | SmallJob | None) -> LeaseLost:
    now_is = "gone" if job is None else f"{job.status}, attempt {job.attempt}"
    return LeaseLost(f"attempt {lease.attempt} of {lease.job_id} no longer holds the job (it is {now_is})")


# ---------------------------------------------------------------- taking and keeping


def claim(store: Store, settings: Settings, owner: str, classes: Collection[str]) -> tuple[Lease, Job] | None:
    """Take the next queued job of these resource classes; None if there is none, or if this worker is draining."""
    with store.begin() as session:
        if workers.is_draining(session, owner):
            return None
        while (job := jobs.next_queued(session, classes, now := clock.now(session))) is not None:
            if usage.is_spent(session, job):
                _rest(session, job, now)
            elif _take(session, job, owner, now, settings):
                session.refresh(job)
                return Lease(job.id, job.attempt, owner), job
        return None


def claim_beside(
    store: Store, settings: Settings, owner: str, classes: Collection[str], base_key: str, limit: int
) -> list[tuple[Lease, Job]]:
    """Take at most `limit` queued sessions and samplers of this base, for a process that holds the base already."""
    taken: list[tuple[Lease, Job]] = []
    with store.begin() as session:
        if workers.is_draining(session, owner):
            return []
        now = clock.now(session)
        for job in jobs.queued_of_base(session, classes, base_key, now, limit):
            if usage.is_spent(session, job):
                _rest(session, job, now)
            elif _take(session, job, owner, now, settings):
                session.refresh(job)
                taken.append((Lease(job.id, job.attempt, owner), job))
    return taken


def queued(store: Store, classes: Collection[str], base_key: str | None) -> tuple[bool, bool]:
    """Whether sessions or samplers of this base are queued that could start on a worker of these classes, and other jobs."""
    with store.look() as connection:
        return jobs.queued(connection, classes, base_key, clock.now(connection))


def _rest(session: Session, job: Job, now: datetime) -> None:
    """Pause a queued job whose budget is spent, unless it has left the queue meanwhile."""
    current = jobs.find(session, job.id, lock=True, light=True)
    if current is not None and current.status == Status.QUEUED:
        moves.move(session, current, Status.PAUSED, "budget_spent", now)


def _take(session: Session, job: Job, owner: str, now: datetime, settings: Settings) -> bool:
    """Claim the job by compare-and-swap. False if it was changed first, for example claimed by another worker."""
    unchanged = (Job.id == job.id, Job.status == Status.QUEUED.value, Job.attempt == job.attempt)
    attempt = job.attempt + 1
    columns = {
        "status": Status.RUNNING.value,
        "status_reason": "claimed",
        "attempt": attempt,
        "lease_owner": owner,
        "lease_until": now + timedelta(seconds=settings.lease_ttl_s),
        "claimed_at": now,
        "started_at": job.started_at or now,
        "phase": Phase.LOADING.value,
    }
    taken = update(Job).where(*unchanged).values(**columns).returning(Job.id)
    if session.scalar(taken, execution_options={"synchronize_session": False}) is None:
        return False
    said = {"from": Status.QUEUED.value, "to": Status.RUNNING.value, "reason": "claimed", "attempt": attempt}
    events.append(session, job.id, "status_changed", said, now=now)
    usage.waited(session, job, attempt, now)
    return True


def renew_all(
    store: Store, settings: Settings, held: Collection[Lease] | Mapping[Lease, float]
) -> dict[Lease, Wish | LeaseLost | None]:
    """Hold all these jobs for another lease_ttl_s, in one statement. A lost lease does not affect the others.

    If `held` gives the seconds that each job has run, its `claimed_at` becomes now minus these, even if the clock was set.
    Returns for each lease the wish of the job's owner (cancel before pause) or of its draining worker, or LeaseLost.
    """
    ran_s = held if isinstance(held, Mapping) else {}
    with store.begin() as session:
        since = {lease.job_id: clock.at(session, -timedelta(seconds=seconds)) for lease, seconds in ran_s.items()}
        until = clock.at(session, timedelta(seconds=settings.lease_ttl_s))
        renewed = jobs.renew(session, [(lease.job_id, lease.attempt, lease.owner) for lease in held], until, since)
        answers: dict[Lease, Wish | LeaseLost | None] = {
            Lease(row.id, row.attempt, row.owner): _wish(row.status, row.wish, draining=bool(row.draining)) for row in renewed
        }
        for lease in held:
            if lease not in answers:
                answers[lease] = _lost(lease, jobs.find(session, lease.job_id, light=True))
    return answers


def _wish(status: str, wish: str | None, *, draining: bool) -> Wish | None:
    if status == Status.CANCELLING:
        return Wish.SAVE_AND_CANCEL if wish == Wish.SAVE_AND_CANCEL else Wish.CANCEL
    if status == Status.PAUSING:
        return Wish.PAUSE
    return Wish.DRAIN if draining else None


def set_phase(store: Store, lease: Lease, phase: Phase) -> None:
    with _stepping(store, lease) as (connection, job):
        if job.phase != phase:
            name = Phase(phase).value
            events.append_all(connection, job.id, [("phase_changed", {"phase": name})], phase=name)


def rewind(store: Store, lease: Lease, step: int, *, anew: bool = False) -> None:
    """Start an attempt at `step`: delete what earlier attempts wrote for later steps, which this attempt will write again.

    `anew`: the attempt starts without a checkpoint, so the evaluation before the first step is deleted, too.
    """
    kept = -1 if anew else step
    with _holding(store, lease) as (session, job):
        job.step = step
        usage.revoke(session, job, kept)
        metrics.forget_after(session, job.id, kept)
        rollouts.forget_after(session, job.id, kept)


def set_resolved(store: Store, lease: Lease, facts: dict[str, Any]) -> None:
    """Store what the worker found out: device, dtype, revision, parameters, versions. Later facts are added to earlier ones."""
    with _holding(store, lease) as (session, job):
        job.resolved = {**job.resolved, **facts}
        session.flush()
        events.append(session, job.id, "resolved", facts)


# ---------------------------------------------------------------- progress


def commit_step(
    store: Store,
    lease: Lease,
    step: int,
    metrics_: Mapping[str, float | None],
    rollouts_: Sequence[RolloutRow] = (),
    events_: Sequence[tuple[str, dict[str, Any]]] = (),
    *,
    spent: Spent = NOTHING,
    again: bool = False,
) -> bool:
    """Write all results of a step, in one transaction. If this attempt or a later one repeats the step, it overwrites them.

    Returns True if a budget is now spent: the job must then pause.
    `again`: the answer to the last try was lost. If that try was committed, nothing is written, so that no event is sent and
    no usage is counted twice.
    """
    with _stepping(store, lease) as (connection, job):
        if again and metrics.written(connection, job.id, step, attempt=lease.attempt):
            return usage.is_spent(connection, job)
        now, steps = clock.now(connection), max(0, step - job.step)  # 0 for an evaluation at the current step
        metrics.write(connection, job.id, step, metrics_, attempt=lease.attempt, now=now)
        rollouts.write(connection, job.id, rollouts_, attempt=lease.attempt, now=now)
        said = [_step_event(step, job.max_steps, metrics_), *events_]
        events.append_all(connection, job.id, said, now=now, step=step)
        usage.add(connection, job, spent, now, steps=steps)
        return usage.is_spent(connection, job)


def _step_event(step: int, max_steps: int, metrics_: Mapping[str, float | None]) -> tuple[str, dict[str, Any]]:
    """What followers are told of a job's step."""
    headline = finite({name: value for name, value in metrics_.items() if is_live(name)})
    return "step", {"step": step, "max_steps": max_steps, "metrics": headline}


def finite(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """The values with None for NaN and infinity, which JSON does not have. The metrics store null for them, too."""
    return {name: value if value is not None and isfinite(value) else None for name, value in values.items()}


def commit_checkpoint(
    store: Store, lease: Lease, row: CheckpointRow, *, spent: Spent = NOTHING, after: Spent = NOTHING
) -> None:
    """Point the job at a checkpoint whose folder is in the blob store: a resume now starts there. A repeat does nothing.

    `after`: what steps have committed since the checkpoint's content was copied, which it does not cover.
    """
    with _holding(store, lease) as (session, job):
        _put_checkpoint(session, job, lease, row, spent, after)


def _put_checkpoint(session: Session, job: Job, lease: Lease, row: CheckpointRow, spent: Spent, after: Spent = NOTHING) -> None:
    if session.get(Checkpoint, row.id) is not None:
        return
    now = clock.now(session)
    checkpoints.create(session, row, project=job.project, job_id=job.id, attempt=lease.attempt, now=now)
    if row.purpose == "training":
        job.checkpoint_id = row.id
        job.crashes = job.retries = 0  # a long job may have any number of faults, as long as it progresses between them
    session.flush()
    usage.add(session, job, spent, now)
    if row.purpose == "training":
        usage.save(session, job, now, after)
    said = {"checkpoint_id": row.id, "step": row.step} | ({} if row.name is None else {"name": row.name})
    events.append(session, job.id, "checkpoint_saved", said, now=now)


# ---------------------------------------------------------------- operations of sessions


def answer_operations(
    store: Store, settings: Settings, lease: Lease, answered: Sequence[Answered], *, spent: Spent = NOTHING
) -> bool:
    """Store what came of some operations, in one transaction, in their order. One that was answered before keeps its answer.

    Returns True if a budget is now spent. Safe to repeat, except that a repeat of a try that was committed counts `spent` again
    only if some answer is new, or its operation was withdrawn: what it took is counted all the same.
    """
    with _stepping(store, lease) as (connection, job):
        now = clock.now(connection)
        expires_at = now + timedelta(seconds=settings.operation_answer_ttl_s)
        step, said, is_new = job.step, list[tuple[str, dict[str, Any]]](), not answered
        for each in answered:
            new = operations.answer(connection, job.id, each, attempt=lease.attempt, now=now, expires_at=expires_at)
            step, is_new = step if each.step is None else each.step, is_new or new
            if each.metrics:
                metrics.write(connection, job.id, step, each.metrics, attempt=lease.attempt, now=now)
                if new:
                    said.append(_step_event(step, job.max_steps, each.metrics))
        if not is_new:
            _, withdrawn = operations.outcomes(connection, [each.id for each in answered])
            is_new = bool(withdrawn)
        if said or step != job.step:
            events.append_all(connection, job.id, said, now=now, step=step)
        if is_new:
            usage.add(connection, job, spent, now, steps=max(0, step - job.step), kept=job.kind == "sampler")
        # A sampler saves nothing: its answers are its progress, unless what may have killed its worker is still to come.
        if is_new and job.kind == "sampler" and job.crashes and not operations.has_suspects(connection, job.id, lease.attempt):
            jobs.forgive(connection, job.id)
        return usage.is_spent(connection, job)


def commit_snapshot(
    store: Store,
    settings: Settings,
    lease: Lease,
    row: CheckpointRow,
    *,
    replay_from: int | None,
    answered: Answered | None = None,
    overwrite: bool = False,
    keep_last: int | None = None,
    broken: Collection[str] = (),
    spent: Spent = NOTHING,
) -> list[str]:
    """Record a session's checkpoint, and what it makes needless, in one transaction. A repeat does nothing.

    replay_from  with purpose training: no replay starts before this seq, so that earlier operations' requests are forgotten
    answered     the save_checkpoint that asked for it
    overwrite    a checkpoint of the same name and purpose is deleted; if it is pinned or in use, as soon as it is not
    keep_last    how many checkpoints without a name stay
    broken       ids of those that cannot be read: they do not count, and go with the ones that do not stay

    Returns the blob paths of deleted checkpoints, which the caller must remove.
    """
    with _holding(store, lease) as (session, job):
        now, removed = clock.now(session), list[Checkpoint]()
        before = None if row.name is None else checkpoints.named(session, job.id, row.purpose, row.name)
        _put_checkpoint(session, job, lease, row, spent)
        if overwrite and before is not None and before.id != row.id:
            gone, kept = checkpoints.remove(session, [before.id], now)
            removed += gone
            if kept:
                checkpoints.unname(before, now)
            session.flush()
        if answered is not None:
            expires_at = now + timedelta(seconds=settings.operation_answer_ttl_s)
            operations.answer(session, job.id, answered, attempt=lease.attempt, now=now, expires_at=expires_at)
        if row.purpose == "training" and replay_from is not None:
            operations.forget_requests(session, job.id, replay_from)
        if keep_last is not None:
            unnamed = [there for there in checkpoints.of_job(session, job.id) if there.name is None]
            kept_ids = {there.id for there in [there for there in unnamed if there.id not in broken][:keep_last]}
            gone, _ = checkpoints.remove(session, [there.id for there in unnamed if there.id not in kept_ids], now)
            removed += gone
        return [there.path for there in removed]


def rest(store: Store, lease: Lease, done: int, *, spent: Spent = NOTHING) -> Status:
    """Let a session that was idle leave its worker, after ordered operation `done`. If one came meanwhile, it is queued."""

    def do(session: Session, job: Job, now: datetime) -> Status:
        if operations.has_waiting(session, job.id, done):
            return moves.end(session, job, Status.QUEUED, "operation", now)
        return moves.end(session, job, Status.PAUSED, IDLE, now)

    return _end(store, lease, spent, do, leaves=True)


def retain(
    store: Store, lease: Lease, keep: CheckpointsSpec, best: Sequence[KeepBest] = (), broken: Collection[str] = ()
) -> list[str]:
    """Mark as deleted the checkpoints that keep_last, keep_best and the rules in `best` do not keep. Returns their blob paths,
    which the caller must remove. `broken`: ids of those that cannot be read, of which none is kept in place of a sound one.

    A checkpoint stays if it is pinned, or if a job that has not ended resumes from it or starts from it.
    """
    with _holding(store, lease) as (session, job):
        there = checkpoints.of_job(session, job.id)
        sound = [row for row in there if row.id not in broken]
        rules = [*best, *([keep.keep_best] if keep.keep_best else [])]
        kept_ids = {row.id for row in (*sound[: keep.keep_last], *(row for rule in rules for row in best_of(sound, rule)))}
        removed, _ = checkpoints.remove(session, [row.id for row in there if row.id not in kept_ids], clock.now(session))
        return [row.path for row in removed]


def best_of(there: list[Checkpoint], rule: KeepBest) -> list[Checkpoint]:
    """The best `rule.count` of the checkpoints that were evaluated when saved, the best first; of equals the later step."""
    measured = [row for row in there if isinstance(row.metrics.get(rule.metric), int | float)]
    measured.sort(key=lambda row: row.metrics[rule.metric], reverse=rule.mode == "max")
    return measured[: rule.count]


def best_checkpoint(session: Session, job: Job) -> Checkpoint | None:
    """Of the job's checkpoints that are not deleted, the one with the best evaluation; None if none was evaluated when saved.

    The rule is the job's: early_stopping, else keep_best, else the highest mean reward, else the lowest loss.
    """
    there = checkpoints.of_job(session, job.id)
    rules = [*_rules(job), KeepBest(metric=EVAL_REWARD_MEAN), KeepBest(metric=EVAL_LOSS, mode="min")]
    return next((rows[0] for rule in rules if (rows := best_of(there, rule))), None)


def _rules(job: Job) -> list[KeepBest]:
    """What the job's spec says about the best evaluation, the first rule first."""
    stop, keep = job.spec.get("early_stopping"), job.spec.get("checkpoints", {}).get("keep_best")
    own = [] if stop is None else [KeepBest(metric=stop["metric"], mode=stop["mode"])]
    return own if keep is None else [*own, KeepBest(**keep)]


# ---------------------------------------------------------------- letting go


def _end(
    store: Store, lease: Lease, spent: Spent, do: Callable[[Session, Job, datetime], Status], *, leaves: bool = False
) -> Status:
    """`spent`: what the attempt spent since its last commit, for the ledger. `leaves`: its worker lets it go by its own will. A
    session has saved itself before that and a sampler has nothing to save, so nothing that they spent is wasted."""
    with _holding(store, lease) as (session, job):
        now = clock.now(session)
        if spent.ran_s is not None:  # measured by a monotonic clock
            job.claimed_at, job.lease_until = now - timedelta(seconds=spent.ran_s), now
        usage.add(session, job, spent, now)
        if leaves and job.kind in operations.KINDS:
            usage.save(session, job, now)
        return do(session, job, now)


def pause(store: Store, lease: Lease, reason: str = "paused", *, spent: Spent = NOTHING) -> Status:
    """The job pauses, because its owner wished it or for another reason."""

    def do(session: Session, job: Job, now: datetime) -> Status:
        return moves.end(session, job, Status.PAUSED, reason, now)

    return _end(store, lease, spent, do, leaves=True)


def cancelled(store: Store, lease: Lease, *, spent: Spent = NOTHING) -> Status:
    """The job is cancelled, as its owner wished. What came after its last checkpoint is lost; a sampler has nothing to lose."""

    def do(session: Session, job: Job, now: datetime) -> Status:
        if job.kind == "sampler":
            usage.save(session, job, now)
        return moves.end(session, job, Status.CANCELLED, "cancelled", now)

    return _end(store, lease, spent, do)


def succeed(store: Store, lease: Lease, result: dict[str, Any], reason: str, *, spent: Spent = NOTHING) -> Status:
    """The job has succeeded. If a cancel came first, the job is cancelled but its result is kept."""

    def do(session: Session, job: Job, now: datetime) -> Status:
        values = {"result": _with_best(session, job, result), "error": None}
        return moves.end(session, job, Status.SUCCEEDED, reason, now, **values)

    return _end(store, lease, spent, do)


def finish(
    store: Store, settings: Settings, lease: Lease, result: dict[str, Any], answered: Answered, *, spent: Spent = NOTHING
) -> Status:
    """The session has succeeded, and in the same transaction its last operation is answered: who reads the answer finds the
    session ended."""

    def do(session: Session, job: Job, now: datetime) -> Status:
        expires_at = now + timedelta(seconds=settings.operation_answer_ttl_s)
        operations.answer(session, job.id, answered, attempt=lease.attempt, now=now, expires_at=expires_at)
        values = {"result": _with_best(session, job, result), "error": None}
        return moves.end(session, job, Status.SUCCEEDED, "finished", now, **values)

    return _end(store, lease, spent, do)


def fail(
    store: Store, lease: Lease, failure: Failure, result: dict[str, Any] | None = None, *, spent: Spent = NOTHING
) -> Status:
    """The job ends with a named failure."""

    def do(session: Session, job: Job, now: datetime) -> Status:
        values = {} if result is None else {"result": _with_best(session, job, result)}
        return moves.fail(session, job, failure, now, **values)

    return _end(store, lease, spent, do)


def _with_best(session: Session, job: Job, result: dict[str, Any]) -> dict[str, Any]:
    """The result, with the best evaluation by the job's rule, and the checkpoint that holds it. One that was as good or better,
    if only by less than early stopping counts, is kept in its place, and is named."""
    rule = next(iter(_rules(job)), None)
    if rule is None:
        return result
    best, rows = result.get("best"), best_of(checkpoints.of_job(session, job.id), rule)
    if rows:
        value, sign = rows[0].metrics[rule.metric], 1 if rule.mode == "max" else -1
        if best is None or sign * value >= sign * best["value"]:
            best = {"value": value, "step": rows[0].step, "checkpoint_id": rows[0].id}
    return result if best is None else {**result, "best": {"metric": rule.metric, "checkpoint_id": None, **best}}


def park(store: Store, lease: Lease, failure: Failure, *, spent: Spent = NOTHING) -> Status:
    """Pause the job because something must be fixed before it can continue. A resume starts from its last checkpoint."""

    def do(session: Session, job: Job, now: datetime) -> Status:
        error = moves.tell(session, job, failure, now)
        return moves.end(session, job, Status.PAUSED, failure.code, now, error=error)

    return _end(store, lease, spent, do)


def release(
    store: Store,
    lease: Lease,
    reason: str,
    *,
    failure: Failure | None = None,
    delay_s: float = 0.0,
    counts_as_crash: bool = False,
    spent: Spent = NOTHING,
) -> Status:
    """Give the job back after a drain or a retryable failure. Returns its new status.

    The job goes back to the queue, unless its owner wished otherwise. It fails if it has no retries left.
    """

    def do(session: Session, job: Job, now: datetime) -> Status:
        if counts_as_crash:
            return moves.lost(session, job, "worker_lost", now)
        later = {"not_before": now + timedelta(seconds=delay_s)} if delay_s > 0 and job.status == Status.RUNNING else {}
        if failure is None:
            return moves.end(session, job, Status.QUEUED, reason, now, **later)
        retries = job.retries + 1
        if job.status == Status.RUNNING and retries >= int(job.spec.get("limits", {}).get("max_attempts", 3)):
            return moves.fail(session, job, failure, now, retries=retries)
        return moves.put_back(session, job, failure, now, retries=retries, **later)

    return _end(store, lease, spent, do, leaves=failure is None and not counts_as_crash)


def worker_lost(store: Store, doorbell: Doorbell, owner: str) -> list[str]:
    """For the parent of a dead child: settle the child's jobs at once, as the reconciler would. Returns their ids."""
    with store.begin(readonly=True) as session:
        held = jobs.held(session, owner=owner)
    settled: list[Job] = []
    for job_id in held:
        with store.begin() as session:
            job = jobs.find(session, job_id, lock=True, light=True)
            if job is not None and job.lease_owner == owner and job.status in HELD:
                moves.lost(session, job, "worker_lost", clock.now(session))
                settled.append(job)
    for job in settled:
        doorbell.signal(job.id, "events")
        if job.status == Status.QUEUED:
            doorbell.ring(job.id, job.resource_class)
    return [job.id for job in settled]


@dataclass(frozen=True)
class InHands:
    """The jobs that a worker holds: whether there are none, and those that it did not pause or cancel in time."""

    nothing: bool
    disobeyed: list[str]


def in_hands_of(store: Store, owner: str, now: datetime | None = None) -> InHands:
    """As of now. The worker's parent ends a training process that does not obey, then settles its jobs."""
    with store.look() as connection:
        held = jobs.in_hands_of(connection, owner)
        now = now or clock.now(connection)
    asked = (Status.PAUSING, Status.CANCELLING)
    late = [job.id for job in held if job.status in asked and job.wish_until is not None and job.wish_until < now]
    return InHands(not held, late)


def unresponsive(store: Store, doorbell: Doorbell, job_id: str, now: datetime) -> Status | None:
    """Settle a job whose training process was ended because it did not obey. None if it had released the job meanwhile."""
    with store.begin() as session:
        job = jobs.find(session, job_id, lock=True, light=True)
        went_to = None if job is None else moves.unresponsive(session, job, now)
    if went_to is not None:
        doorbell.signal(job_id, "events")
    return went_to


# ---------------------------------------------------------------- the workers' own table


def hello(store: Store, worker: Worker) -> None:
    """Record that a worker has started. Sets its `last_seen_at`."""
    with store.begin() as session:
        worker.last_seen_at = clock.now(session)
        workers.hello(session, worker)


def seen(store: Store, worker: Worker) -> None:
    """Record a sign of life. Sets the worker's `last_seen_at`."""
    with store.begin() as session:
        worker.last_seen_at = clock.now(session)
        workers.seen(session, worker)


def draining(store: Store, worker_id: str) -> None:
    """Mark this worker as draining: it takes no further job, and the next renewal of its current one returns DRAIN."""
    with store.begin() as session:
        workers.set_draining(session, worker_id)


def goodbye(store: Store, worker_id: str) -> None:
    """Record that this worker has ended in an orderly way."""
    with store.begin() as session:
        workers.goodbye(session, worker_id)
