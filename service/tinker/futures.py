"""Routes of the Tinker wire that give results: a long poll, as often as the client asks, until an answer expires."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from service.edge.auth import Caller, CallerDep
from service.edge.bodies import TINY_BYTES, DocumentDep
from service.edge.context import Context, ContextDep
from service.edge.problems import problem
from service.edge.router import Router
from service.errors import InvalidRequest, NotFound
from service.jobs import lifecycle
from service.jobs.lease import IDLE
from service.sessions.codec import unpack
from service.states import HELD, Status
from service.store import jobs, operations, tinker
from service.store.operations import Outcome
from service.store.tables import Operation, TinkerModel, TinkerSampler
from service.tinker import answers, compression, paths, samplers
from service.tinker.datums import in_their_names
from service.tinker.face import PREFIX
from service.tinker.log import REFUSED
from service.tinker.requests import RetrieveFuture
from service.tinker.tickets import Ticket
from service.tinker.training import PROTOBUF, sampler_id_of
from service.validation import parse

router = Router(prefix=PREFIX, include_in_schema=False)

HOLD_S = 30.0  # below the 45 s after which the client gives a request up
SAVED_BY = {
    "weights": "save_weights",
    "sampler_weights": "save_weights_for_sampler",
    "external_weights": "save_weights_external",
}
ALONE = frozenset({"sample", "forward", "forward_backward", "optim_step"})  # results for which nothing else is read
AWAY_S = 1.0  # it repeats after a 5xx without any pause


class Gone(NotFound):
    """A sampling result that has expired: the client asks for it anew when it is told so by a 410."""

    code = "result_expired"


@dataclass(frozen=True)
class Waiting:
    """Not done yet."""

    job_id: str
    operation_id: str


@dataclass(frozen=True)
class Result:
    content: bytes
    media_type: str = "application/json"


@router.post("/retrieve_future")
async def retrieve_future(request: Request, context: ContextDep, caller: CallerDep, document: DocumentDep) -> Response:
    """200 with the result, or with {error, category}; 408 if it is not there within HOLD_S; 410 for a sample that is lost."""
    ticket = Ticket.parse(parse(RetrieveFuture, document.data).request_id)
    key = (caller.project, str(ticket))
    try:
        polled = context.polled.get(key)  # so that of a thousand polls that are repeated none reads the store
        found = Waiting(*polled) if polled else await run_in_threadpool(_look, context, caller, ticket)
        if isinstance(found, Waiting) and not context.stopping.is_set():
            async with caller.share.resting():
                waiter = await context.answers.watch(found.job_id, [found.operation_id], HOLD_S)
            done = waiter.found.get(found.operation_id)
            if done is not None and _is_alone(done) and len(done.answer or b"") <= TINY_BYTES:
                found = _look(context, caller, ticket, done)
            elif waiter.over.is_set():
                found = await run_in_threadpool(_look, context, caller, ticket, done)
        if isinstance(found, Waiting):
            context.polled.put(key, (found.job_id, found.operation_id))
            state, reason = await _standing(context, found.job_id)
            return JSONResponse({"queue_state": state, "queue_state_reason": reason}, 408)
    except Gone as error:
        return problem(request, error, status=410)
    except OperationalError:
        await asyncio.sleep(AWAY_S)
        raise
    if len(found.content) <= TINY_BYTES:
        content, headers = compression.compressed(request, found.content)
    else:
        content, headers = await run_in_threadpool(compression.compressed, request, found.content)
    return Response(content, 200, headers, found.media_type)


@router.post("/cancel_future", status_code=204)
def cancel_future(context: ContextDep, caller: CallerDep, document: DocumentDep) -> Response:
    """A sample that nobody waits for any more is withdrawn, if it is not done yet. The client forgets it."""
    ticket = Ticket.parse(parse(RetrieveFuture, document.data).request_id)
    if ticket.sampler_id is None:
        raise InvalidRequest("only samples can be cancelled; what trains runs in its order", code="not_offered")
    try:
        with context.store.begin(readonly=True) as session:
            operation_id = _operation(session, caller, ticket).id
    except Gone:  # it was withdrawn before, or has expired
        return Response(status_code=204)
    lifecycle.withdraw_operation(context.store, operation_id)
    return Response(status_code=204)


def _is_alone(done: Outcome) -> bool:
    """Whether the store need not be read for this result."""
    return done.kind in ALONE and done.error is None and done.answer is not None


def _look(context: Context, caller: Caller, ticket: Ticket, done: Outcome | None = None) -> Waiting | Result:
    """`done`: what came of the ticket's operation, where the caller's right to it was checked before."""
    if done is None and ticket.operation_id is not None:
        with context.store.look() as connection:
            there = operations.outcome(connection, caller.project, ticket.operation_id)
        if there is not None and (there.lane or None) == ticket.sampler_id and there.kind != REFUSED:
            if there.status == "waiting":
                return Waiting(there.job_id, there.id)
            done = there
    if done is not None and _is_alone(done):
        return _result(done, None, ticket)
    with context.store.begin(readonly=True) as session:
        if ticket.model_id is not None:
            return _made(session, caller, ticket.model_id)
        row = done or _operation(session, caller, ticket)
        if isinstance(row, Operation) and row.kind == REFUSED:  # it need not wait for its turn to be told
            error = row.error or unpack(row.request or b"")[0]["error"]
            return _failed(error)
        if row.status == "waiting":
            return Waiting(row.job_id, row.id)
        if row.error is not None:
            return _failed(_in_its_words(session, caller, ticket, row.error))
        if row.answer is None:
            if ticket.sampler_id is not None:
                raise Gone("the answer of this request has expired")
            detail = "the answer of this request has expired; what it did is done, so do not send it again"
            return _failed({"detail": detail, "category": "user"})
        model = None if row.kind in ALONE else tinker.model_of_job(session, row.job_id)
    return _result(row, model, ticket)


def _in_its_words(session: Session, caller: Caller, ticket: Ticket, error: dict[str, Any]) -> dict[str, Any]:
    """The error of a sample whose weights were deleted while it waited, without ids of ours; of training, with the wire's names
    of tensors; others as they are."""
    if ticket.sampler_id is None:
        return {**error, "detail": in_their_names(error["detail"])}
    if error.get("code") in ("checkpoint_not_found", "session_over"):
        try:
            samplers.weights(session, caller, tinker.get(session, TinkerSampler, caller.project, ticket.sampler_id))
        except NotFound as gone:
            return {"code": gone.code, "detail": gone.detail, "hint": gone.hint, "category": "user"}
    return error


def _made(session: Session, caller: Caller, model_id: str) -> Result:
    model = tinker.get(session, TinkerModel, caller.project, model_id)
    job = None if model.job_id is None else jobs.find(session, model.job_id, light=True)
    loaded = job is not None and job.from_checkpoint_id is not None
    return _json({"model_id": model.id, "type": "load_weights" if loaded else "create_model"})


def _operation(session: Session, caller: Caller, ticket: Ticket) -> Operation:
    """Raises NotFound, and Gone for a sample of this project's that has expired."""
    assert ticket.operation_id is not None
    sampler = None
    if ticket.sampler_id is not None:
        sampler = tinker.get(session, TinkerSampler, caller.project, ticket.sampler_id)
    try:
        row = operations.get(session, caller.project, ticket.operation_id)
    except NotFound:
        if sampler is None:
            raise
        raise Gone("the answer of this request has expired") from None
    if (row.lane or None) != ticket.sampler_id:
        raise NotFound(f"no request {str(ticket)[:80]!r} in this project")
    return row


async def _standing(context: Context, job_id: str) -> tuple[str, str | None]:
    """What the client shows while it waits: a word of the wire, and why."""
    standing = context.standings.get(job_id)
    if standing is None:
        standing = await run_in_threadpool(_stands, context, job_id)
        context.standings.put(job_id, standing)
    return standing


def _stands(context: Context, job_id: str) -> tuple[str, str | None]:
    with context.store.begin(readonly=True) as session:
        job = jobs.find(session, job_id, light=True)
    if job is None or job.status in HELD:
        return "active", None
    if job.status == Status.PAUSED and job.status_reason != IDLE:
        resume = f"it goes on after `ratchet resume {job.id}`"
        return "paused_capacity", f"{job.id} is paused ({job.status_reason}); {resume}"
    return "paused_capacity", f"{job.id} is {job.status}: it waits for a worker"


# ---------------------------------------------------------------- results


def _result(row: Operation | Outcome, model: TinkerModel | None, ticket: Ticket) -> Result:
    assert row.answer is not None
    head, tensors = unpack(row.answer)
    match row.kind:
        case "sample":
            return Result(answers.sample(head, tensors, ticket.last_n), PROTOBUF)
        case "forward" | "forward_backward":
            widths = {"widths": ticket.widths()} if ticket.runs else {}
            return Result(answers.forward_backward(widths | head, tensors), PROTOBUF)
        case "optim_step":
            return _json({"metrics": {name: float(value) for name, value in head["metrics"].items() if value is not None}})
        case "load_checkpoint":
            return _json({"model_id": model.id if model else None, "type": "load_weights"})
        case "save_checkpoint":
            assert model is not None
            return _json(_saved(head["name"], head.get("purpose", "training"), model))
        case _:
            return _json(head)


def _saved(name: str, purpose: str, model: TinkerModel) -> dict[str, Any]:
    if name.startswith(paths.SAMPLER):
        sampler_id = sampler_id_of(model.session_id, int(name.removeprefix(paths.SAMPLER)))
        return {"sampling_session_id": sampler_id, "type": "save_weights_for_sampler"}
    path = paths.path_of(model.id, purpose, name)
    return {"path": str(path), "type": SAVED_BY[path.kind]}


def _failed(error: dict[str, Any]) -> Result:
    detail = error["detail"] + (f" ({error['hint']})" if error.get("hint") else "")
    return _json({"error": detail, "category": error.get("category", "server"), "code": error.get("code")})


def _json(value: dict[str, Any]) -> Result:
    return Result(json.dumps(value).encode())
