"""Routes of the Tinker wire that sample. A sampling session is an immutable version of some weights."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from service.edge.auth import Caller, CallerDep
from service.edge.bodies import DocumentDep
from service.edge.context import Context, ContextDep
from service.edge.router import Router
from service.errors import FieldError, NotFound
from service.sessions.sessions import base_of_checkpoint, sampler_of
from service.states import FINAL
from service.store import checkpoints, clock, jobs, tinker
from service.store.operations import Asked
from service.store.tables import Checkpoint, TinkerModel, TinkerSampler, TinkerSession
from service.tinker import base_models, log, paths, sampling
from service.tinker.face import PREFIX
from service.tinker.requests import CreateSamplingSession, SampleAddress
from service.tinker.tickets import MOST_LAST_N, Ticket
from service.tinker.training import sampler_id_of
from service.validation import invalid, parse

router = Router(prefix=PREFIX, include_in_schema=False)


@router.post("/create_sampling_session")
def create_sampling_session(context: ContextDep, caller: CallerDep, document: DocumentDep) -> dict[str, Any]:
    """Of the base model by its name, or of a checkpoint by its path."""
    sent = parse(CreateSamplingSession, document.data)
    sampler_id = sampler_id_of(sent.session_id, sent.sampling_session_seq_id)
    with context.store.begin(readonly=True) as session:
        client = tinker.get(session, TinkerSession, caller.project, sent.session_id)
        there = tinker.find(session, TinkerSampler, caller.project, sampler_id)
        checkpoint, seed = None, 0
        if there is None and sent.model_path is not None:
            origin, checkpoint = paths.resolve(session, caller.project, paths.parse(sent.model_path, "/model_path"))
            base_model, seed = origin.base_model, _seed(session, checkpoint)
        else:
            base_model = sent.base_model
    if there is not None:
        return {"type": "create_sampling_session", "sampling_session_id": sampler_id}
    if base_model is None:
        raise invalid([FieldError("", "give base_model or model_path", "missing")])
    if checkpoint is None:
        model: dict[str, Any] = {"source": base_model}
    else:
        model = base_of_checkpoint(checkpoint.id, checkpoint.model, checkpoint.adapter)
    job = sampler_of(context.store, context.doorbell, context.settings, caller.project, model, key_id=caller.key_id)
    with context.store.begin() as session:
        if tinker.find(session, TinkerSampler, caller.project, sampler_id) is None:
            row = TinkerSampler(
                id=sampler_id,
                project=caller.project,
                session_id=client.id,
                job_id=job.id,
                checkpoint_id=None if checkpoint is None else checkpoint.id,
                base_model=base_model,
                context=base_models.context(job.spec["model"]["source"], job.spec["model"]["tiny"]),
                model_path=sent.model_path,
                seed=seed,
                created_at=clock.now(session),
            )
            session.add(row)
    return {"type": "create_sampling_session", "sampling_session_id": sampler_id}


@router.get("/samplers/{sampler_id}")
def read_sampler(context: ContextDep, caller: CallerDep, sampler_id: str) -> dict[str, Any]:
    """`base_model` is what the client's tokenizer hangs on."""
    with context.store.begin(readonly=True) as session:
        row = tinker.get(session, TinkerSampler, caller.project, sampler_id)
    return {"sampler_id": row.id, "base_model": row.base_model, "model_path": row.model_path}


@router.post("/asample")
def sample(context: ContextDep, caller: CallerDep, document: DocumentDep) -> dict[str, Any]:
    """Log one prompt. What is wrong with it is told in its answer."""
    sent = parse(SampleAddress, document.data)
    sampler = _ready(context, caller, sent.sampling_session_id)

    def make() -> Asked:
        return sampling.asked(
            document.data,
            seq=sent.seq_id,
            lane=sampler.id,
            checkpoint_id=sampler.checkpoint_id,
            context=sampler.context,
            run_seed=sampler.seed,
        )

    operation_id = log.append(context, caller, sampler.job_id, make, seq=sent.seq_id, lane=sampler.id)
    last_n = document.data.get("prompt_logprobs_last_n")
    is_right = type(last_n) is int and 0 < last_n <= MOST_LAST_N  # else it is refused, and its ticket must be one all the same
    ticket = Ticket(sampler_id=sampler.id, operation_id=operation_id, last_n=last_n if is_right else None)
    count = document.data.get("num_samples", 1)
    ids = [f"{operation_id}:{i}" for i in range(count if isinstance(count, int) and 1 <= count <= 1024 else 1)]
    return {"request_id": str(ticket), "sample_sequence_ids": ids}


@dataclass(frozen=True)
class _Ready:
    id: str
    job_id: str
    checkpoint_id: str | None  # null: the base itself
    context: int | None
    seed: int


def _seed(session: Session, checkpoint: Checkpoint) -> int:
    """Of the run that saved it; 0 if that is gone."""
    job = None if checkpoint.job_id is None else jobs.find(session, checkpoint.job_id)
    return 0 if job is None else job.spec["seed"]


def _ready(context: Context, caller: Caller, sampler_id: str) -> _Ready:
    """The sampling session with a job that samples it: made if there is none, or if the one that was has ended.

    Raises NotFound if its weights are gone.
    """
    with context.store.begin(readonly=True) as session:
        row = tinker.get(session, TinkerSampler, caller.project, sampler_id)
        job = None if row.job_id is None else jobs.find(session, row.job_id, light=True)
        checkpoint = weights(session, caller, row)
    checkpoint_id = None if checkpoint is None else checkpoint.id
    if job is None or job.status in FINAL:
        if checkpoint is None:
            model: dict[str, Any] = {"source": row.base_model}
        else:
            model = base_of_checkpoint(checkpoint.id, checkpoint.model, checkpoint.adapter)
        job = sampler_of(context.store, context.doorbell, context.settings, caller.project, model, key_id=caller.key_id)
        with context.store.begin() as session:
            stored = tinker.get(session, TinkerSampler, caller.project, sampler_id)
            stored.job_id, stored.checkpoint_id = job.id, checkpoint_id
    return _Ready(row.id, job.id, checkpoint_id, row.context, row.seed)


def weights(session: Session, caller: Caller, row: TinkerSampler) -> Checkpoint | None:
    """The checkpoint that is sampled; None: the base itself. Those of one sampling client are found by its number once they are
    saved. Raises NotFound if they are gone."""
    gone = NotFound(
        f"the weights of the sampler {row.id} are gone: they were deleted or have expired",
        code="sampler_expired",
        hint="make another sampling client: save_weights_and_get_sampling_client, or create_sampling_client with a path",
    )
    if row.checkpoint_id is not None:
        there = session.get(Checkpoint, row.checkpoint_id)
        if there is None or there.deleted_at is not None or checkpoints.is_over(session, there):
            raise gone
        return there
    if row.model_id is None:
        return None
    model = tinker.find(session, TinkerModel, caller.project, row.model_id)
    number = row.id.rpartition(":")[2]
    checkpoint = None if model is None else tinker.checkpoint_named(session, model, "sampler", f"{paths.SAMPLER}{number}")
    if checkpoint is None:
        raise gone
    return checkpoint
