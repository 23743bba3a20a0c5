"""Routes of training sessions: made here, steered by their operations. As jobs they are followed, paused and ended under
/v1/jobs."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Literal, Self

from fastapi import Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from starlette.concurrency import run_in_threadpool

from service.api.examples import OPERATION, SESSION_SPEC
from service.api.jobs import JobsQuery, completed
from service.api.views import JobPage, JobView
from service.doorbell import Watch
from service.edge.arrays import parse_arrays
from service.edge.auth import Caller, CallerDep
from service.edge.bodies import TINY_BYTES, DocumentDep, TurnDep, documented, limited, media_type
from service.edge.context import Context, ContextDep
from service.edge.idempotency import IdempotencyKeyDep, once
from service.edge.negotiation import accepted, wait_s
from service.edge.pages import EitherWay, Page
from service.edge.problems import BODY, responses
from service.edge.router import Router
from service.errors import Conflict, InvalidRequest, NotFound, UnsupportedMedia
from service.jobs import lifecycle
from service.rewards.texts import has_texts, wrong_graders
from service.sessions import sessions
from service.sessions.body import Eval, OperationBody, Operations, asked
from service.sessions.codec import as_json, summary
from service.sessions.tensors import asked_of_tensors
from service.spec.reward import Grader
from service.spec.session import SessionSpec
from service.store import jobs, operations
from service.store.operations import Asked, Outcome
from service.store.tables import Operation
from service.validation import below, invalid, parse

router = Router(prefix="/v1/sessions", tags=["sessions"])

JSON, TENSORS = "application/json", "application/vnd.safetensors"
SMALL_BYTES = 2**16
SUMMED_BYTES = 2**13  # of an answer: what a list looks into
ONE = TypeAdapter(OperationBody)
Found = Mapping[str, Outcome]  # by id
Graders = Mapping[str, Sequence[Grader]]  # by pointer


class OperationError(BaseModel):
    """Why an operation failed. It has changed nothing, and its seq is used up."""

    model_config = ConfigDict(extra="allow")

    code: str
    detail: str
    category: Annotated[Literal["user", "server"], Field(description="who can mend it")]
    pointer: str | None = None
    hint: str | None = None


class OperationView(BaseModel):
    """An operation, and what came of it."""

    object: Literal["operation"] = "operation"
    id: str
    session_id: str
    seq: int
    kind: str
    status: Literal["waiting", "done", "failed"]
    error: OperationError | None
    result: Annotated[
        dict[str, Any] | None, Field(description="metrics, log_probs and so on; null while it waits, and when it has expired")
    ]
    summary: Annotated[
        dict[str, Any] | None,
        Field(
            description="in lists, of a result that is there: metrics; checkpoint_id, name, step; how many answers and tokens. "
            "No tokens where the result has long texts"
        ),
    ] = None
    attempt: Annotated[int | None, Field(description="the attempt that answered it")]
    created_at: datetime
    started_at: Annotated[datetime | None, Field(description="when that attempt began with it; null until it is finished")]
    finished_at: datetime | None
    expires_at: Annotated[datetime | None, Field(description="until then the result can be fetched")]

    @classmethod
    def of(cls, row: Operation | Outcome, result: dict[str, Any] | None = None) -> Self:
        names = cls.model_fields.keys() - {"object", "session_id", "result", "summary"}
        return cls(**{name: getattr(row, name) for name in names}, session_id=row.job_id, result=result)


class OperationViews(BaseModel):
    """What came of several operations that were sent at once, in their order."""

    object: Literal["list"] = "list"
    data: list[OperationView]


class OperationPage(Page[OperationView]):
    last_id: Annotated[  # pyright: ignore[reportIncompatibleVariableOverride]
        str | None, Field(description="pass it as `after` (newest first: `before`) to get the next page")
    ]
    next_seq: Annotated[int, Field(description="the seq that the session's next operation has")]
    waiting: Annotated[int, Field(description="how many operations wait in the session")]


class SessionsQuery(JobsQuery):
    kind: Literal["session", "sampler"] = "session"  # pyright: ignore[reportIncompatibleVariableOverride]


class OperationsQuery(EitherWay):
    after: Annotated[int, Field(ge=0, lt=2**53, description="oldest first: operations with a higher seq")] = 0
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    order: Annotated[
        Literal["oldest_first", "newest_first"],
        Field(description="by seq, of the ordered operations; or by when they came, newest first, of all of them"),
    ] = "oldest_first"
    before: Annotated[
        str | None, Field(max_length=64, description="newest first: only operations that came before the one with this id")
    ] = None


BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
APPLIED = {"Preference-Applied": {"description": "`wait`, where it was waited for", "schema": {"type": "string"}}}


ONE_VIEW: dict[str, Any] = {"$ref": "#/components/schemas/OperationView"}
SEVERAL_VIEWS: dict[str, Any] = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": ONE_VIEW}},
}


def _answered(schema_: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    schema = {"schema": schema_}
    return {
        200: {"description": "Done, or failed.", "content": {JSON: schema, TENSORS: BINARY}, "headers": APPLIED},
        202: {"description": "Not done yet.", "content": {JSON: schema}, "headers": APPLIED},
    }


# ---------------------------------------------------------------- sessions


@router.post(
    "",
    status_code=201,
    response_model=JobView,
    responses=responses(409, *BODY),
    openapi_extra=documented("SessionSpec", SESSION_SPEC),
)
def create_session(
    request: Request,
    context: ContextDep,
    caller: CallerDep,
    document: DocumentDep,
    turn_to_check: TurnDep,
    idempotency_key: IdempotencyKeyDep,
) -> Any:
    """Start a session: a model with its optimizer, which waits for operations."""
    with once(context.store, caller, idempotency_key, route="POST /v1/sessions", body_sha256=document.sha256) as turn:
        if turn.replay is not None:
            return turn.replay
        resolved = sessions.resolve_session(context.store, context.settings, caller.project, parse(SessionSpec, document.data))
        job = lifecycle.create_job(
            context.store,
            context.doorbell,
            project=caller.project,
            sent=document.data,
            resolved=resolved,
            key_id=caller.key_id,
            also=completed(request, turn),
        )
        return Response(JobView.new(job).model_dump_json(), 201, media_type="application/json")


@router.get("")
def list_sessions(context: ContextDep, caller: CallerDep, query: Annotated[SessionsQuery, Query()]) -> JobPage:
    """Sessions, or samplers, without their specs, newest first."""
    with context.store.begin(readonly=True) as session, below("/query"):
        rows, has_more = jobs.page(session, caller.project, **query.model_dump())
        return JobPage.read(session, rows, has_more)


@router.get("/{session_id}", responses=responses(404))
def read_session(context: ContextDep, caller: CallerDep, session_id: str) -> JobView:
    """A session, as GET /v1/jobs/{id} shows it."""
    job = sessions.get(context.store, caller.project, session_id)
    with context.store.begin(readonly=True) as session:
        return JobView.read(session, job)


# ---------------------------------------------------------------- operations


@router.post(
    "/{session_id}/operations",
    response_class=Response,
    responses=_answered({"anyOf": [ONE_VIEW, SEVERAL_VIEWS]}) | responses(404, 406, 409, 429, *BODY),
    openapi_extra=OPERATION,
)
async def append_operations(request: Request, context: ContextDep, caller: CallerDep, session_id: str) -> Response:
    """Log one operation, or several at once, and with `Prefer: wait=S` wait for what comes of them.

    Operations run in the order of `seq`. The same seq with the same body is the same operation, however often it is sent.
    """
    sent_as = media_type(request) or JSON
    if sent_as not in (JSON, TENSORS):
        raise UnsupportedMedia(f"the body's Content-Type is {sent_as}; taken are {JSON} and {TENSORS}")
    answer_as = accepted(request, (sent_as, TENSORS if sent_as == JSON else JSON))
    raw = await limited(request, context.settings.max_loss_body_bytes, "an operation").body()
    seconds = wait_s(request)
    with context.signals.watch(session_id) as watch:  # no answer is given unheard once they are logged
        async with _turn(context, caller, raw):
            many, wanted, graders, (ids, all_wait) = await run_in_threadpool(_begin, context, caller, session_id, raw, sent_as)
        if graders:
            async with context.checks.turn(caller.key_id):
                await run_in_threadpool(_check, graders)
            ids, all_wait = await run_in_threadpool(_log, context, caller, session_id, wanted)
        found = await _wait(context, caller, session_id, ids, seconds, watch if all_wait else None)
    if many:
        answered = partial(_several, context, caller, ids, found)
    else:
        answered = partial(_one, context, caller, ids[0], answer_as, found)
    response = answered() if _is_quick(ids, found) else await run_in_threadpool(answered)
    if seconds > 0:
        response.headers["Preference-Applied"] = "wait"
    return response


@router.get("/{session_id}/operations", responses=responses(404))
def list_operations(
    context: ContextDep, caller: CallerDep, session_id: str, query: Annotated[OperationsQuery, Query()]
) -> OperationPage:
    """The operations of a session or sampler without their results: in their order, or newest first."""
    job, is_back = sessions.get(context.store, caller.project, session_id), query.order == "newest_first"
    with context.store.begin(readonly=True) as session, below("/query"):
        if is_back:
            rows, has_more = operations.newest(session, job.id, before=query.before, limit=query.limit)
        else:
            rows, has_more = operations.page(session, job.id, after=query.after, limit=query.limit)
        answers = operations.beginnings(session, [row.id for row in rows], SUMMED_BYTES)
        views = [OperationView.of(row) for row in rows]
        for view in views:
            view.summary = summary(answers[view.id]) if view.id in answers else None
        cursors = [row.id if is_back else str(row.seq) for row in rows]
        waiting = operations.load(session, job.id).count
        page = OperationPage(
            data=views,
            has_more=has_more,
            first_id=cursors[0] if cursors else None,
            last_id=cursors[-1] if cursors else None,
            next_seq=operations.next_seq(session, job.id),
            waiting=waiting,
        )
    if waiting:  # else nothing is told that may not be on the disk yet
        context.store.sync()
    return page


@router.get(
    "/{session_id}/operations/{operation}",
    response_class=Response,
    responses=_answered(ONE_VIEW) | responses(404, 406, 409, 422),
)
async def read_operation(request: Request, context: ContextDep, caller: CallerDep, session_id: str, operation: str) -> Response:
    """An operation by its id or its seq. With `Prefer: wait=S` the answer comes when it is done."""
    answer_as = accepted(request, (JSON, TENSORS))
    operation_id = await run_in_threadpool(_id_of, context, caller, session_id, operation)
    found = await _wait(context, caller, session_id, [operation_id], wait_s(request))
    answered = partial(_one, context, caller, operation_id, answer_as, found)
    return answered() if _is_quick([operation_id], found) else await run_in_threadpool(answered)


def _asked(raw: bytes, sent_as: str) -> tuple[bool, list[Asked], Graders]:
    """Whether several were sent, the operations, and the graders that remain to be checked. Raises Malformed and
    InvalidRequest."""
    if sent_as == TENSORS:  # none of these is an eval
        return False, [asked_of_tensors(raw)], {}
    sent = parse_arrays(raw)
    many = isinstance(sent, dict) and "operations" in sent
    bodies = parse(Operations, sent).operations if many else [parse(ONE, sent)]
    graders = {
        f"/operations/{place}/graders" if many else "/graders": body.graders
        for place, body in enumerate(bodies)
        if isinstance(body, Eval) and has_texts(body.graders)
    }
    wanted = [asked(body, f"/operations/{place}" if many else "") for place, body in enumerate(bodies)]
    return many, wanted, graders


def _begin(
    context: Context, caller: Caller, session_id: str, raw: bytes, sent_as: str
) -> tuple[bool, list[Asked], Graders, tuple[list[str], bool]]:
    """`_asked`, and what `_log` returns if there was nothing to check, so that they are logged at once."""
    many, wanted, graders = _asked(raw, sent_as)
    return many, wanted, graders, ([], False) if graders else _log(context, caller, session_id, wanted)


def _check(graders: Graders) -> None:
    """As a job's are checked. Raises InvalidRequest and Unavailable."""
    if errors := wrong_graders(graders):
        raise invalid(errors)


def _log(context: Context, caller: Caller, session_id: str, wanted: list[Asked]) -> tuple[list[str], bool]:
    """Their ids, and whether all of them wait, once they are logged."""
    rows = lifecycle.append_operations(context.store, context.doorbell, context.settings, caller.project, session_id, wanted)
    return [row.id for row in rows], all(row.status == "waiting" for row in rows)


def _id_of(context: Context, caller: Caller, session_id: str, operation: str) -> str:
    job = sessions.get(context.store, caller.project, session_id)
    with context.store.begin(readonly=True) as session:
        if operation.isascii() and operation.isdecimal() and len(operation) < 16:
            row = operations.at(session, job.id, operations.ORDERED, int(operation))
        else:
            row = operations.get(session, caller.project, operation)
    if row is None or row.job_id != job.id:
        raise NotFound(f"no operation {operation[:40]} in session {job.id}")
    return row.id


def _turn(context: Context, caller: Caller, raw: bytes) -> AbstractAsyncContextManager[None]:
    return context.conversions.turn(caller.key_id) if len(raw) > SMALL_BYTES else nullcontext()


async def _wait(
    context: Context, caller: Caller, session_id: str, ids: list[str], seconds: float, since: Watch | None = None
) -> Found:
    """Wait until all of them are answered, for at most `seconds`. Returns those that are. `since`: see `Answers.wait`."""
    if seconds <= 0:
        return {}
    with context.open_answers.hold(caller.key_id):
        async with caller.share.resting():
            return {} if context.stopping.is_set() else await context.answers.wait(session_id, ids, seconds, since=since)


def _is_quick(ids: list[str], found: Found) -> bool:
    """Whether all are answered, and in so few bytes that a change of threads takes longer than to write them."""
    return all(id_ in found for id_ in ids) and sum(len(found[id_].answer or b"") for id_ in ids) <= TINY_BYTES


def _row(context: Context, caller: Caller, operation_id: str, found: Found) -> Operation | Outcome:
    """The operation, read now unless it was `found`."""
    if operation_id in found:
        return found[operation_id]
    with context.store.begin(readonly=True) as session:
        row = operations.get(session, caller.project, operation_id)
    if row.status == "waiting":
        context.store.sync()  # another request may have logged it this moment
    return row


def _view(row: Operation | Outcome) -> OperationView:
    return OperationView.of(row, None if row.answer is None else as_json(row.answer))


def _several(context: Context, caller: Caller, ids: list[str], found: Found) -> Response:
    views = [_view(_row(context, caller, id_, found)) for id_ in ids]
    done = all(view.status != "waiting" for view in views)
    return Response(OperationViews(data=views).model_dump_json(), 200 if done else 202, media_type=JSON)


def _one(context: Context, caller: Caller, operation_id: str, answer_as: str, found: Found) -> Response:
    row = _row(context, caller, operation_id, found)
    if answer_as == TENSORS:
        return _tensors(row)
    view = _view(row)
    headers = {"Location": f"/v1/sessions/{view.session_id}/operations/{view.id}"}
    return Response(view.model_dump_json(), 202 if view.status == "waiting" else 200, headers, JSON)


def _tensors(row: Operation | Outcome) -> Response:
    """The answer as it was computed. Raises InvalidRequest or Conflict for a failed operation, and NotFound for one expired."""
    if row.status == "waiting":
        return Response(OperationView.of(row).model_dump_json(), 202, {"Retry-After": "1"}, JSON)
    if row.error is not None:
        kind = InvalidRequest if row.error.get("category") == "user" else Conflict
        more = {name: row.error[name] for name in ("hint", "category", "pointer") if row.error.get(name) is not None}
        raise kind(row.error["detail"], code=row.error["code"], **more)
    if row.answer is None:
        raise NotFound(f"the answer of {row.id} has expired", code="answer_expired")
    return Response(row.answer, 200, {"X-Operation-Id": row.id}, TENSORS)
