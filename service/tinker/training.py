"""Routes of the Tinker wire that make models and train them."""

from functools import partial
from typing import Any

from fastapi import Request
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from service.edge.auth import Caller, CallerDep
from service.edge.bodies import DocumentDep, TurnDep, media_type
from service.edge.context import Context, ContextDep
from service.edge.router import Router
from service.errors import FieldError, InvalidRequest, UnsupportedMedia
from service.jobs import lifecycle
from service.sessions.sessions import resolve_session
from service.spec.session import SessionSpec
from service.store import clock, jobs, tinker
from service.store.operations import Asked
from service.store.tables import Job, TinkerModel, TinkerSampler, TinkerSession
from service.tinker import base_models, compression, datums, log, paths
from service.tinker.face import PREFIX
from service.tinker.messages import ForwardBackwardRequest, read
from service.tinker.requests import (
    CreateModel,
    LoadWeights,
    OfModel,
    OptimStep,
    SaveWeights,
    SaveWeightsExternal,
    SaveWeightsForSampler,
)
from service.tinker.tickets import Ticket
from service.validation import invalid, parse

router = Router(prefix=PREFIX, include_in_schema=False)

PROTOBUF = "application/x-protobuf"
QUICK_BYTES = 2**16  # is read in a few milliseconds


# ---------------------------------------------------------------- models


@router.post("/create_model")
def create_model(context: ContextDep, caller: CallerDep, document: DocumentDep, turn: TurnDep) -> dict[str, Any]:
    """A session with a new adapter. The model id is made of the client's session and its number there."""
    sent = parse(CreateModel, document.data)
    if sent.optimizer_config.type != "adamw":
        raise log.not_adam("/optimizer_config/type", sent.optimizer_config)
    model: dict[str, Any] = {"source": sent.base_model, "adapter": {"kind": "full"}}
    seed = 0
    if sent.lora_config is not None:
        source = _source(context, caller, sent.base_model)
        try:
            model["adapter"] = base_models.adapter(source, sent.lora_config)
        except ValueError as error:
            raise invalid([FieldError("/lora_config", str(error), "invalid")]) from error
        seed = (sent.lora_config.seed or 0) % 2**63
    return _create(context, caller, sent, model, seed, sent.base_model)


def _source(context: Context, caller: Caller, base_model: str) -> str:
    """The folder or hub id that the name means. Raises InvalidRequest."""
    spec = SessionSpec.model_validate({"model": {"source": base_model}})
    return resolve_session(context.store, context.settings, caller.project, spec).spec["model"]["source"]


def _create(
    context: Context, caller: Caller, sent: CreateModel | LoadWeights, model: dict[str, Any], seed: int, base_model: str
) -> dict[str, Any]:
    """Make the job and the model, once for each (session, number)."""
    assert sent.session_id is not None
    model_id = f"{sent.session_id}:train:{sent.model_seq_id}"
    answer = {"request_id": str(Ticket(model_id=model_id)), "model_id": model_id}
    with context.store.begin(readonly=True) as session:
        client = tinker.get(session, TinkerSession, caller.project, sent.session_id)
        made = tinker.find(session, TinkerModel, caller.project, model_id)
        there = None if made is None or made.job_id is None else jobs.get(session, caller.project, made.job_id)
        first = None if there is None else there.spec_sent
    spec = parse(
        SessionSpec,
        {
            "name": (client.display_name or f"tinker {model_id}")[:200],
            "metadata": sent.user_metadata or {},
            "model": model,
            "seed": seed,
        },
    )
    if made is not None:
        again = spec if first is None else parse(SessionSpec, first)
        if again.model != spec.model or again.seed != spec.seed:
            detail = f"model_seq_id {sent.model_seq_id} was used for another model, {model_id}; each has a number of its own"
            raise InvalidRequest(detail, [FieldError("/model_seq_id", detail, "seq_reused")], code="seq_reused")
        return answer
    if client.finished_at is not None:
        raise InvalidRequest(f"the session {client.id} was finished; create another one", code="session_over")
    resolved = resolve_session(context.store, context.settings, caller.project, spec)

    def also(session: Session, job: Job) -> None:
        row = TinkerModel(
            id=model_id,
            project=caller.project,
            session_id=client.id,
            job_id=job.id,
            base_model=base_model,
            user_metadata=sent.user_metadata or {},
            published=[],
            created_at=job.created_at,
        )
        session.add(row)
        session.flush()

    try:
        lifecycle.create_job(
            context.store,
            context.doorbell,
            project=caller.project,
            sent=spec.model_dump(mode="json", by_alias=True),
            resolved=resolved,
            key_id=caller.key_id,
            also=also,
        )
    except IntegrityError:  # the same request came twice at once, unless it was something else
        with context.store.begin(readonly=True) as session:
            if tinker.find(session, TinkerModel, caller.project, model_id) is None:
                raise
        return _create(context, caller, sent, model, seed, base_model)  # which now finds the first one
    return answer


@router.post("/get_info")
def get_info(context: ContextDep, caller: CallerDep, document: DocumentDep) -> dict[str, Any]:
    sent = parse(OfModel, document.data)
    row, job_id = log.model(context, caller, sent.model_id)
    with context.store.begin(readonly=True) as session:
        model = jobs.get(session, caller.project, job_id).spec["model"]
    lora = model["adapter"]["kind"] == "lora"
    return {
        "type": "get_info",
        "model_id": row.id,
        "model_name": row.base_model,
        "is_lora": lora,
        "lora_rank": model["adapter"]["rank"] if lora else None,
        "model_data": {
            "arch": base_models.architecture(model["source"]),
            "model_name": row.base_model,
            "tokenizer_id": base_models.tokenizer_id(model["source"], context.settings),
        },
        "optimizer_config": {"type": "adamw"},
    }


# ---------------------------------------------------------------- steps


@router.post("/forward_backward")
async def forward_backward(request: Request, context: ContextDep, caller: CallerDep) -> dict[str, Any]:
    if media_type(request) != PROTOBUF:
        raise UnsupportedMedia(f"the body's Content-Type is {media_type(request)}; taken is {PROTOBUF}")
    raw = await compression.body(request, context.settings.max_loss_body_bytes, "a forward_backward request")
    if len(raw) <= QUICK_BYTES:
        return await run_in_threadpool(_forward_backward, context, caller, raw)
    async with context.conversions.turn(caller.key_id):
        return await run_in_threadpool(_forward_backward, context, caller, raw)


def _forward_backward(context: Context, caller: Caller, raw: bytes) -> dict[str, Any]:
    message = read(ForwardBackwardRequest, raw)
    if message.seq_id < 1:
        raise invalid([FieldError("/seq_id", f"must be 1 or more, got {message.seq_id}", "invalid", message.seq_id)])
    row, job_id = log.model(context, caller, message.model_id)
    return _future(row.id, log.append(context, caller, job_id, partial(datums.asked, message), seq=message.seq_id))


@router.post("/optim_step")
def optim_step(context: ContextDep, caller: CallerDep, document: DocumentDep) -> dict[str, Any]:
    sent = parse(OptimStep, document.data)
    row, job_id = log.model(context, caller, sent.model_id)
    return _future(row.id, log.append(context, caller, job_id, partial(log.optim_step, sent), seq=sent.seq_id))


def _future(model_id: str, operation_id: str) -> dict[str, Any]:
    return {"request_id": str(Ticket(operation_id=operation_id)), "model_id": model_id}


# ---------------------------------------------------------------- weights


@router.post("/save_weights")
def save_weights(context: ContextDep, caller: CallerDep, document: DocumentDep) -> dict[str, Any]:
    sent = parse(SaveWeights, document.data)
    row, job_id = log.model(context, caller, sent.model_id)
    make = lambda: log.save(sent, log.name_of(sent), "training", ttl_s=log.ttl_s(sent))  # noqa: E731
    return _future(row.id, log.append(context, caller, job_id, make, seq=sent.seq_id))


@router.post("/save_weights_external")
def save_weights_external(context: ContextDep, caller: CallerDep, document: DocumentDep) -> dict[str, Any]:
    """The same plain folder of peft as any checkpoint here, under a kind of path of its own."""
    sent = parse(SaveWeightsExternal, document.data)
    row, job_id = log.model(context, caller, sent.model_id)

    def make() -> Asked:
        if sent.age_encryption_recipients:
            detail = "encrypted exports are not offered here; leave age_encryption_recipients out"
            raise invalid([FieldError("/age_encryption_recipients", detail, "not_offered")])
        return log.save(sent, log.name_of(sent, paths.EXTERNAL), "sampler", ttl_s=log.ttl_s(sent))

    return _future(row.id, log.append(context, caller, job_id, make, seq=sent.seq_id))


@router.post("/save_weights_for_sampler")
def save_weights_for_sampler(context: ContextDep, caller: CallerDep, document: DocumentDep) -> dict[str, Any]:
    """Under a name, or for one sampling client (sampling_session_seq_id): an immutable version in either case."""
    sent = parse(SaveWeightsForSampler, document.data)
    row, job_id = log.model(context, caller, sent.model_id)
    number = sent.sampling_session_seq_id
    if sent.path is not None or number is None:
        make = lambda: log.save(sent, log.name_of(sent), "sampler", ttl_s=log.ttl_s(sent))  # noqa: E731
        return _future(row.id, log.append(context, caller, job_id, make, seq=sent.seq_id))
    sampler_id = sampler_id_of(row.session_id, number)

    def make_ephemeral() -> Asked:
        return log.save(sent, f"{paths.SAMPLER}{number}", "sampler", ttl_s=log.ttl_s(sent) or log.EPHEMERAL_S)

    def also(session: Session) -> None:
        if tinker.find(session, TinkerSampler, caller.project, sampler_id) is None:
            spec = jobs.get(session, caller.project, job_id).spec
            model = spec["model"]
            session.add(
                TinkerSampler(
                    id=sampler_id,
                    project=caller.project,
                    session_id=row.session_id,
                    model_id=row.id,
                    base_model=row.base_model,
                    context=base_models.context(model["source"], model["tiny"]),
                    seed=spec["seed"],
                    created_at=clock.now(session),
                )
            )

    return _future(row.id, log.append(context, caller, job_id, make_ephemeral, seq=sent.seq_id, also=also))


def sampler_id_of(session_id: str, number: int) -> str:
    return f"{session_id}:sample:{number}"


@router.post("/load_weights")
def load_weights(context: ContextDep, caller: CallerDep, document: DocumentDep, turn: TurnDep) -> dict[str, Any]:
    """Into a new model, which then starts from the checkpoint, or in its turn into one that is there."""
    sent = parse(LoadWeights, document.data)
    if sent.optimizer_config is not None and sent.optimizer_config.type != "adamw":
        raise log.not_adam("/optimizer_config/type", sent.optimizer_config)
    if sent.model_id is not None and sent.seq_id is not None:
        row, job_id = log.model(context, caller, sent.model_id)
        make = partial(log.load, sent)
        return _future(row.id, log.append(context, caller, job_id, make, seq=sent.seq_id))
    if sent.session_id is None or sent.model_seq_id is None:
        raise invalid([FieldError("", "give session_id and model_seq_id, or model_id and seq_id", "missing")])
    with context.store.begin(readonly=True) as session:
        origin, checkpoint = paths.resolve(session, caller.project, paths.parse(sent.path, "/path"))
    model: dict[str, Any] = {
        "from_checkpoint": {"id": checkpoint.id, "load": "weights+optimizer" if sent.optimizer else "weights"}
    }
    if sent.base_model is not None and sent.base_model != origin.base_model:
        model["source"] = sent.base_model
    return _create(context, caller, sent, model, 0, origin.base_model)
