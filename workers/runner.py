"""One attempt at one job: claim, load, loop, commit, release. Every error on the way is handled here."""

import hashlib
import logging
import os
from contextlib import ExitStack
from functools import cache
from pathlib import Path

from service.doorbell import Doorbell
from service.errors import JobFailed, LeaseLost
from service.jobs import lease as leases
from service.jobs.data import open_data
from service.jobs.lease import Lease
from service.rewards.rewards import Rewards
from service.settings import get_settings
from service.spec.job import JobSpec, RLSpec, SupervisedSpec
from service.spec.tensors import OF_A_JOB, uses
from service.spec.training import VllmEngine
from service.spec.work import WorkLimits
from service.states import Phase
from service.store import datasets, operations
from service.store.session import Store, open_store
from service.store.tables import Job
from service.validation import parse
from workers.identity import WORKER_ID, has_gpu, resource_classes, this_process
from workers.loops.attempt import Attempt
from workers.loops.managed import drive
from workers.loops.progress import Progress
from workers.loops.served import Served
from workers.policy.learner import Learner, Start
from workers.policy.policy import Policy
from workers.policy.warm import WarmBase
from workers.ranks.opening import Opening
from workers.ranks.policies import open_spread
from workers.ranks.ranks import Ranks
from workers.sessions.host import Host
from workers.tenure.failures import failure_of
from workers.tenure.keeper import Keeper
from workers.tenure.outcome import Failed, Interrupted, obeyed
from workers.tenure.resume import newest_checkpoint, start_checkpoint
from workers.tenure.tenure import Tenure

log = logging.getLogger(__name__)


def run_next(rung_by: str) -> None:
    """Claim the best queued job, if there is one, and run it. Returns when the job has ended or was given back; after a session
    or sampler, when all that share its base have."""
    keeper = _keeper()
    claimed = leases.claim(keeper.store, keeper.settings, os.environ[WORKER_ID], resource_classes(keeper.settings))
    if claimed is None:
        log.debug("rung by %s, but nothing is queued", rung_by)
        return
    lease, job = claimed
    if job.kind in operations.KINDS:
        _warm_base().drop()
        Host(keeper, os.environ[WORKER_ID]).run(lease, job)
    else:
        run(keeper, lease, job)


@cache
def _keeper() -> Keeper:
    """The one keeper of this process. It lives as long as the process, so that no time is lost between two jobs."""
    settings = get_settings()
    store, doorbell = open_store(settings), Doorbell(settings)
    store.on_deliveries = doorbell.ring_couriers
    return Keeper(store, settings, doorbell).start()


@cache
def _warm_base() -> WarmBase:
    """What this process keeps from one job to the next."""
    return WarmBase(get_settings().warm_base_s)


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
    with ExitStack() as closing:
        try:
            # Parsed again: an older version may have stored a spec that this version refuses with InvalidRequest.
            attempt = _load(tenure, parse(JobSpec, tenure.job.spec), closing)
            tenure.settle(drive(attempt))
        except LeaseLost:
            raise
        except Interrupted as interrupted:
            tenure.settle(obeyed(interrupted.wish))
        except Exception as error:
            tenure.settle(_failed(tenure, attempt, error))
        else:
            _warm_base().keep(attempt.policy.base)


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


def _load(tenure: Tenure, spec: RLSpec | SupervisedSpec, closing: ExitStack) -> Attempt:
    """Load data, graders and the model, at the job's newest good checkpoint, or at its start if it has none.

    What is to be closed after the attempt is given to `closing`."""
    store, settings, job = tenure.store, tenure.settings, tenure.job
    tenure.check(Phase.LOADING)
    store.blobs.discard_before(job.id, tenure.lease.attempt)
    data = open_data(spec.data, spec.seed, lambda dataset_id: _dataset_path(store, job.project, dataset_id))
    rewards = None
    if spec.reward is not None:
        secrets, networks = settings.grader_secrets, settings.grader_networks
        rewards = closing.enter_context(Rewards(spec.reward, job_id=job.id, secrets=secrets, networks=networks))
    start = spec.model.from_checkpoint
    start_from = None if start is None else start_checkpoint(store, job, start.id)
    resume_from = newest_checkpoint(tenure)
    policy, reference = _policies(tenure, spec, start_from, resume_from, closing)
    if isinstance(spec, RLSpec) and isinstance(spec.rollout.engine, VllmEngine):
        served = closing.enter_context(Served(tenure, spec.rollout.engine, policy))
        policy.facts["rollout"] = served.connect(spec.rollout)
    progress = Progress() if resume_from is None else Progress.load(resume_from)
    tenure.begin(progress.step, {**policy.facts, "process": this_process()}, saved=resume_from is not None)
    for warning in policy.facts.get("warnings", ()):
        log.warning("job %s: %s", job.id, warning)
    log.info("job %s: loaded at step %d on %s", job.id, progress.step, policy.facts["device"])
    return Attempt(tenure, spec, data=data, rewards=rewards, policy=policy, progress=progress, reference=reference)


def _policies(
    tenure: Tenure, spec: RLSpec | SupervisedSpec, start_from: Path | None, resume_from: Path | None, closing: ExitStack
) -> tuple[Learner, Policy | None]:
    """A learner with its own base, loaded from one of these checkpoints; and the reference, if the objective needs one."""
    settings, start, count = tenure.settings, spec.model.from_checkpoint, spec.resources.gpus
    weights = resume_from or start_from
    with_optimizer = start is not None and start.load == "weights+optimizer"
    opening = Opening(
        spec.model,
        tenure.job.id,
        spec.optimizer,
        _optimizer_steps(spec),
        spec.seed,
        Start(weights, weights if resume_from or with_optimizer else None, new_schedule=resume_from is None),
        settings.torch_threads,
        reference=isinstance(spec, RLSpec) and "ref_log_probs" in uses(spec.objective, OF_A_JOB).needed,
        reference_from=start_from,
        sharding=spec.resources.sharding,
    )
    device = "cuda" if has_gpu(settings) else "cpu"
    if count == 1:
        return opening.policies(device, load=_warm_base().load)
    _warm_base().drop()
    return open_spread(opening, device, closing.enter_context(Ranks(count, device)))


def _optimizer_steps(spec: RLSpec | SupervisedSpec) -> int:
    """Optimizer steps of the whole job: the length of the learning rate's schedule."""
    per_step = spec.update.minibatches * spec.update.epochs if isinstance(spec, RLSpec) else 1
    return spec.limits.max_steps * per_step


def _dataset_path(store: Store, project: str, dataset_id: str) -> Path:
    """The dataset's file, as it was uploaded. Raises JobFailed dataset_broken."""
    with store.begin(readonly=True) as session:
        dataset = datasets.get(session, project, dataset_id)
    found = ""
    for anew in (False, True):  # with a bucket, it is downloaded once more
        path = store.blobs.fetch(dataset.path, anew=anew)
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            found = ""
        if found == dataset.sha256:
            return path
    what = f"was altered: its sha256 is {found}, not {dataset.sha256}" if found else "is not on this machine"
    raise JobFailed("dataset_broken", f"the file of dataset {dataset_id} {what}")
