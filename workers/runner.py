"""One attempt at one job: claim, load, loop, commit, release. Every error on the way is handled here."""

import logging
import os
import socket
from dataclasses import replace
from functools import cache
from pathlib import Path

from sqlalchemy.exc import InterfaceError, OperationalError

from service.doorbell import Doorbell
from service.errors import Failure, InvalidRequest, JobFailed, LeaseLost, NotFound
from service.failures import CODES
from service.jobs import lease as leases
from service.jobs.data import open_data
from service.jobs.lease import Lease
from service.rewards.rewards import Rewards
from service.settings import get_settings
from service.spec.job import JobSpec, RLSpec, SupervisedSpec
from service.spec.tensors import OF_A_JOB, uses
from service.spec.work import WorkLimits
from service.states import Phase
from service.store import checkpoints, datasets
from service.store.session import Store, open_store
from service.store.tables import Checkpoint, Job
from service.validation import parse
from workers.identity import WORKER_ID, has_gpu, resource_classes
from workers.loops.attempt import Attempt
from workers.loops.managed import drive
from workers.loops.progress import Progress
from workers.policy.base import Base
from workers.policy.checkpoint import CheckpointBroken, verify
from workers.policy.errors import PolicyFailed, Subject
from workers.policy.learner import Learner, Start
from workers.policy.load import adapter_of
from workers.policy.policy import Policy
from workers.policy.reference import open_reference
from workers.tenure.keeper import Keeper
from workers.tenure.outcome import Failed
from workers.tenure.tenure import Tenure

log = logging.getLogger(__name__)

# The place in a job's spec for each subject of a policy's failure, as a JSON pointer.
POINTERS = {
    Subject.SOURCE: "/model/source",
    Subject.ADAPTER: "/model/adapter",
    Subject.TARGET_MODULES: "/model/adapter/target_modules",
    Subject.TARGET_PARAMETERS: "/model/adapter/target_parameters",
    Subject.OPTIMIZER: "/model/from_checkpoint/load",
    Subject.CHAT: "/data/chat",
}


def run_next(rung_by: str) -> None:
    """Claim the best queued job, if there is one, and run it. Returns when the job has ended or was given back."""
    keeper = _keeper()
    claimed = leases.claim(keeper.store, keeper.settings, os.environ[WORKER_ID], resource_classes(keeper.settings))
    if claimed is None:
        log.debug("rung by %s, but nothing is queued", rung_by)
        return
    run(keeper, *claimed)


@cache
def _keeper() -> Keeper:
    """The one keeper of this process. It lives as long as the process, so that no time is lost between two jobs."""
    settings = get_settings()
    return Keeper(open_store(settings), settings, Doorbell(settings)).start()


def run(keeper: Keeper, lease: Lease, job: Job) -> None:
    """Run a claimed job and record how it ended, unless another attempt has taken over meanwhile."""
    stall_timeout_s = job.spec.get("limits", {}).get("stall_timeout_s", WorkLimits().stall_timeout_s)
    try:
        with Tenure(keeper, lease, job, stall_timeout_s=stall_timeout_s) as tenure:
            log.info("job %s: attempt %d starts", job.id, lease.attempt)
            RUNS[job.kind](tenure)
    except LeaseLost as lost:
        log.warning("job %s: attempt %d is over, %s", job.id, lease.attempt, lost.detail)


def _managed(tenure: Tenure) -> None:
    """Load, run and settle a managed job, that is, a job whose loop Ratchet runs."""
    attempt: Attempt | None = None
    try:
        # Parsed again: an older version may have stored a spec that this version refuses with InvalidRequest.
        attempt = _load(tenure, parse(JobSpec, tenure.job.spec))
        tenure.settle(drive(attempt))
    except LeaseLost:
        raise
    except Exception as error:
        tenure.settle(_failed(tenure, attempt, error))
    finally:
        if attempt is not None and attempt.rewards is not None:
            attempt.rewards.close()


# For each kind of job, the function that runs it from its claim to its end.
RUNS = {"rl": _managed, "supervised": _managed}


def _failed(tenure: Tenure, attempt: Attempt | None, error: Exception) -> Failed:
    failure = failure_of(error)
    log.log(
        logging.ERROR if failure.category == "internal" else logging.WARNING,
        "job %s failed: %s",
        tenure.job.id,
        failure.detail,
        exc_info=failure.category == "internal",
    )
    if attempt is None:
        return Failed(failure, tenure.job.step)
    return Failed(failure, attempt.progress.step, attempt.progress.result("failed"))


def failure_of(error: Exception) -> Failure:
    """What went wrong: a code, whose fault it is, and whether to try again."""
    if isinstance(error, PolicyFailed):
        return replace(error.failure, pointer=POINTERS[error.subject])
    if isinstance(error, JobFailed):
        return error.failure
    name = type(error).__name__
    if isinstance(error, InvalidRequest):  # the API could open it, but this worker cannot: an extra is missing, for example
        code = error.code if error.code in CODES else "invalid_request"
        return Failure(code, error.detail, hint=error.hint, pointer=error.errors[0].pointer if error.errors else None)
    if isinstance(error, OperationalError | InterfaceError):
        return Failure("store_unavailable", "the database did not answer")
    if name == "OutOfMemoryError" or isinstance(error, MemoryError):
        return Failure("out_of_memory", str(error).split("\n", 1)[0])
    if isinstance(error, OSError):
        return Failure("io_error", f"{name}: {error.strerror or error}")
    return Failure("internal_error", f"{name} in the training process; its log has the trace")


def _load(tenure: Tenure, spec: RLSpec | SupervisedSpec) -> Attempt:
    """Load data, graders and the model, at the job's newest good checkpoint, or at its start if it has none."""
    store, settings, job = tenure.store, tenure.settings, tenure.job
    tenure.check(Phase.LOADING)
    store.blobs.discard_before(job.id, tenure.lease.attempt)
    data = open_data(spec.data, spec.seed, lambda dataset_id: _dataset_path(store, job.project, dataset_id))
    rewards = None
    if spec.reward is not None:
        secrets, networks = settings.grader_secrets, settings.grader_networks
        rewards = Rewards(spec.reward, job_id=job.id, secrets=secrets, networks=networks)
    start = spec.model.from_checkpoint
    start_from = None if start is None else _start_checkpoint(store, job, start.id)
    resume_from = _newest_checkpoint(store, job)
    policy, reference = _learner(tenure, spec, start_from, resume_from)
    progress = Progress() if resume_from is None else Progress.load(resume_from)
    process = {"host": socket.gethostname(), "pid": os.getpid()}
    tenure.begin(progress.step, {**policy.facts, "process": process}, saved=resume_from is not None)
    for warning in policy.facts.get("warnings", ()):
        log.warning("job %s: %s", job.id, warning)
    log.info("job %s: loaded at step %d on %s", job.id, progress.step, policy.facts["device"])
    return Attempt(tenure, spec, data=data, rewards=rewards, policy=policy, progress=progress, reference=reference)


def _learner(
    tenure: Tenure, spec: RLSpec | SupervisedSpec, start_from: Path | None, resume_from: Path | None
) -> tuple[Learner, Policy | None]:
    """A learner with its own base, loaded from one of these checkpoints; and the reference, if the objective needs one."""
    settings, start = tenure.settings, spec.model.from_checkpoint
    weights = resume_from or start_from
    with_optimizer = start is not None and start.load == "weights+optimizer"
    device = "cuda" if has_gpu(settings) else "cpu"
    learner = Learner(
        Base.load(spec.model, device=device, threads=settings.torch_threads, checkpoint=weights),
        adapter_of(spec.model),
        name=tenure.job.id,
        optimizer=spec.optimizer,
        steps=_optimizer_steps(spec),
        seed=spec.seed,
        start=Start(weights, weights if resume_from or with_optimizer else None, new_schedule=resume_from is None),
    )
    if not isinstance(spec, RLSpec) or "ref_log_probs" not in uses(spec.objective, OF_A_JOB).needed:
        return learner, None
    return learner, open_reference(learner, spec.model, start_from)


def _optimizer_steps(spec: RLSpec | SupervisedSpec) -> int:
    """Optimizer steps of the whole job: the length of the learning rate's schedule."""
    per_step = spec.update.minibatches * spec.update.epochs if isinstance(spec, RLSpec) else 1
    return spec.limits.max_steps * per_step


def _dataset_path(store: Store, project: str, dataset_id: str) -> Path:
    with store.begin(readonly=True) as session:
        return store.blobs.path(datasets.get(session, project, dataset_id).path)


def _newest_checkpoint(store: Store, job: Job) -> Path | None:
    """The newest complete checkpoint of this job. Torn or altered ones are skipped, and the log names them."""
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
