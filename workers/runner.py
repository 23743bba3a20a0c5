"""One attempt at one job: claim, load, loop, commit, release. Whatever happens in between has one place here."""

import logging
import os
import socket
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter
from sqlalchemy.exc import InterfaceError, OperationalError

from service.doorbell import Doorbell
from service.errors import Failure, InvalidRequest, JobFailed, LeaseLost, NotFound
from service.failures import CODES
from service.jobs import lease as leases
from service.jobs.data import open_data
from service.jobs.lease import Lease
from service.rewards import Rewards
from service.settings import Settings, get_settings
from service.spec.job import JobSpec, RLSpec, SupervisedSpec
from service.states import Phase, Wish
from service.store import checkpoints, datasets
from service.store.session import Store, open_store
from service.store.tables import Checkpoint, Job
from workers.heartbeat import Heartbeat
from workers.identity import WORKER_ID, has_gpu, resource_classes
from workers.log_tail import LogTail
from workers.loops import rl, supervised
from workers.loops.attempt import Attempt, BudgetSpent, Held, Stopped, drive
from workers.loops.evaluation import evaluate
from workers.loops.progress import Progress
from workers.policy.base import Base
from workers.policy.checkpoint import CheckpointBroken, verify
from workers.policy.errors import PolicyFailed, Subject
from workers.policy.learner import Learner, Start
from workers.policy.load import adapter_of
from workers.policy.policy import Policy
from workers.policy.reference import open_reference

log = logging.getLogger(__name__)

LOOPS = {"rl": rl.step, "supervised": supervised.step}
# Where a job's spec asks for what a policy refuses.
POINTERS = {
    Subject.SOURCE: "/model/source",
    Subject.ADAPTER: "/model/adapter",
    Subject.TARGET_MODULES: "/model/adapter/target_modules",
    Subject.OPTIMIZER: "/model/from_checkpoint/load",
    Subject.CHAT: "/data/chat",
}
RETRY_FIRST_S, RETRY_LAST_S = 5.0, 300.0  # the pause before a retry doubles between these


def run_next(rung_by: str) -> None:
    """Claim the best queued job, if there is one, and see it through. Returns when it is over or given back."""
    settings = get_settings()
    store, doorbell = open_store(settings), Doorbell(settings)
    try:
        claimed = leases.claim(store, settings, os.environ[WORKER_ID], resource_classes(settings))
        if claimed is None:
            log.debug("rung by %s, but nothing is queued", rung_by)
            return
        run(store, settings, doorbell, *claimed)
    finally:
        doorbell.close()
        store.close()


def run(store: Store, settings: Settings, doorbell: Doorbell, lease: Lease, job: Job) -> None:
    """Run a claimed job and write down how it ended, unless another attempt has taken over meanwhile."""
    spec: RLSpec | SupervisedSpec = TypeAdapter(JobSpec).validate_python(job.spec)
    tail = LogTail(settings)
    heartbeat = Heartbeat(store, settings, doorbell, lease, stall_timeout_s=spec.limits.stall_timeout_s, tail=tail)
    try:
        with tail, heartbeat:
            log.info("job %s: attempt %d starts", job.id, lease.attempt)
            _attempt(Held(store, settings, doorbell, lease, job, spec, heartbeat))
    except LeaseLost as lost:
        log.warning("job %s: attempt %d is over, %s", job.id, lease.attempt, lost.detail)
    finally:
        doorbell.signal(job.id, "events")


def _attempt(held: Held) -> None:
    store, lease = held.store, held.lease
    attempt: Attempt | None = None
    try:
        attempt = _load(held)
        ended = drive(attempt, LOOPS[held.spec.kind], evaluate)
        reached, spent = attempt.progress.result(ended), held.heartbeat.meter.take()
        held.heartbeat.patiently(lambda: leases.succeed(store, lease, reached, ended, spent=spent))
    except Stopped as stopped:
        _settle_wish(held, stopped.wish)
    except BudgetSpent:
        spent = held.heartbeat.meter.take()
        held.heartbeat.patiently(lambda: leases.pause(store, lease, "budget_spent", spent=spent))
    except LeaseLost:
        raise
    except Exception as error:
        _settle_failure(held, attempt, error)
    finally:
        if attempt is not None and attempt.rewards is not None:
            attempt.rewards.close()


def _settle_failure(held: Held, attempt: Attempt | None, error: Exception) -> None:
    store, lease, job, failure = held.store, held.lease, held.job, failure_of(error)
    log.log(
        logging.ERROR if failure.category == "internal" else logging.WARNING,
        "job %s failed: %s",
        job.id,
        failure.detail,
        exc_info=failure.category == "internal",
    )
    failure.phase, failure.attempt = held.heartbeat.phase.value, lease.attempt
    failure.step = attempt.progress.step if attempt is not None else job.step
    held.heartbeat.tail.add_to(failure)
    spent, patiently = held.heartbeat.meter.take(), held.heartbeat.patiently
    if failure.retryable:  # until limits.max_attempts of them, then it fails with this
        delay_s = min(RETRY_FIRST_S * 2**job.retries, RETRY_LAST_S)
        patiently(lambda: leases.release(store, lease, failure.code, failure=failure, delay_s=delay_s, spent=spent))
    elif CODES[failure.code].pauses:
        patiently(lambda: leases.park(store, lease, failure, spent=spent))
    else:
        result = attempt.progress.result("failed") if attempt is not None else None
        patiently(lambda: leases.fail(store, lease, failure, result, spent=spent))


def _settle_wish(held: Held, wish: Wish) -> None:
    store, lease, patiently = held.store, held.lease, held.heartbeat.patiently
    spent = held.heartbeat.meter.take()
    if wish is Wish.PAUSE:
        patiently(lambda: leases.pause(store, lease, spent=spent))
    elif wish in (Wish.CANCEL, Wish.SAVE_AND_CANCEL):
        patiently(lambda: leases.cancelled(store, lease, spent=spent))
    else:
        patiently(lambda: leases.release(store, lease, "drained", spent=spent))
        held.doorbell.ring(held.job.id, held.job.resource_class)  # another worker goes on at once


def failure_of(error: Exception) -> Failure:
    """What went wrong: a code, whose fault it is, and whether to try again."""
    if isinstance(error, PolicyFailed):
        return replace(error.failure, pointer=POINTERS[error.subject])
    if isinstance(error, JobFailed):
        return error.failure
    name = type(error).__name__
    if isinstance(error, InvalidRequest):  # what this worker cannot open, though the API could: a missing extra, for example
        code = error.code if error.code in CODES else "invalid_request"
        return Failure(code, error.detail, hint=error.hint, pointer=error.errors[0].pointer if error.errors else None)
    if isinstance(error, OperationalError | InterfaceError):
        return Failure("store_unavailable", "the database did not answer")
    if name == "OutOfMemoryError" or isinstance(error, MemoryError):
        return Failure("out_of_memory", str(error).split("\n", 1)[0])
    if isinstance(error, OSError):
        return Failure("io_error", f"{name}: {error.strerror or error}")
    return Failure("internal_error", f"{name} in the training process; its log has the trace")


def _load(held: Held) -> Attempt:
    """Data, graders and the model, at the newest good checkpoint of the job, else at its start."""
    store, settings, job, spec = held.store, held.settings, held.job, held.spec
    held.heartbeat.check(Phase.LOADING)
    store.blobs.discard_before(job.id, held.lease.attempt)
    data = open_data(spec.data, spec.seed, lambda dataset_id: _dataset_path(store, job.project, dataset_id))
    rewards = None
    if spec.reward is not None:
        secrets, networks = settings.grader_secrets, settings.grader_networks
        rewards = Rewards(spec.reward, job_id=job.id, secrets=secrets, networks=networks)
    start = spec.model.from_checkpoint
    start_from = None if start is None else _start_checkpoint(store, job, start.id)
    resume_from = _newest_checkpoint(store, job)
    policy, reference = _learner(held, start_from, resume_from)
    progress = Progress() if resume_from is None else Progress.load(resume_from)
    saved_at = None if resume_from is None else progress.step
    leases.rewind(store, held.lease, progress.step)
    process = {"host": socket.gethostname(), "pid": os.getpid()}
    leases.set_resolved(store, held.lease, {**policy.facts, "process": process})
    log.info("job %s: loaded at step %d on %s", job.id, progress.step, policy.facts["device"])
    return Attempt(
        **vars(held), data=data, rewards=rewards, policy=policy, progress=progress, saved_at=saved_at, reference=reference
    )


def _learner(held: Held, start_from: Path | None, resume_from: Path | None) -> tuple[Learner, Policy | None]:
    """On a base of its own, at one of these checkpoints; and the reference, if the objective needs one."""
    spec, settings, start = held.spec, held.settings, held.spec.model.from_checkpoint
    weights = resume_from or start_from
    with_optimizer = start is not None and start.load == "weights+optimizer"
    device = "cuda" if has_gpu(settings) else "cpu"
    learner = Learner(
        Base.load(spec.model, device=device, threads=settings.torch_threads, checkpoint=weights),
        adapter_of(spec.model),
        name=held.job.id,
        optimizer=spec.optimizer,
        steps=_optimizer_steps(spec),
        seed=spec.seed,
        start=Start(weights, weights if resume_from or with_optimizer else None, new_schedule=resume_from is None),
    )
    if not isinstance(spec, RLSpec) or "ref_log_probs" not in spec.objective.needs():
        return learner, None
    return learner, open_reference(learner, spec.model, start_from)


def _optimizer_steps(spec: RLSpec | SupervisedSpec) -> int:
    """How many there will be in all: what the learning rate's schedule is laid over."""
    per_step = spec.update.minibatches * spec.update.epochs if isinstance(spec, RLSpec) else 1
    return spec.limits.max_steps * per_step


def _dataset_path(store: Store, project: str, dataset_id: str) -> Path:
    with store.begin(readonly=True) as session:
        return store.blobs.path(datasets.get(session, project, dataset_id).path)


def _newest_checkpoint(store: Store, job: Job) -> Path | None:
    """The newest checkpoint of this job that is whole; a torn or altered one is passed over, by name."""
    with store.begin(readonly=True) as session:
        rows = checkpoints.of_job(session, job.id)
    for row in rows:
        try:
            return _verified(store, row)
        except CheckpointBroken as broken:
            log.error("job %s: checkpoint %s is broken (%s); trying the one before", job.id, row.id, broken)
    return None


def _start_checkpoint(store: Store, job: Job, checkpoint_id: str) -> Path:
    try:
        with store.begin(readonly=True) as session:
            row = checkpoints.get(session, job.project, checkpoint_id)
        return _verified(store, row)
    except (NotFound, CheckpointBroken) as error:
        raise JobFailed(
            "checkpoint_broken" if isinstance(error, CheckpointBroken) else "checkpoint_not_found",
            f"the job starts from {checkpoint_id}, which cannot be loaded: {error}",
            hint="fork the job with another model.from_checkpoint",
            pointer="/model/from_checkpoint",
        ) from None


def _verified(store: Store, row: Checkpoint) -> Path:
    folder = store.blobs.path(row.path)
    verify(folder, row.manifest_sha256)
    return folder
