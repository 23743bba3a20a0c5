"""The events of a job: as a list, or as a stream that ends with the job."""

from collections.abc import AsyncIterator
from contextlib import nullcontext
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Literal, Self

from fastapi import Depends, Header, Query, Request, Response
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse, format_sse_event
from pydantic import BaseModel, Field
from sqlalchemy import Row
from starlette.concurrency import run_in_threadpool

from service.edge.auth import Caller, CallerDep
from service.edge.context import Context, ContextDep
from service.edge.pages import EitherWay
from service.edge.problems import responses
from service.edge.router import Router
from service.edge.tails import Look, TailLine
from service.errors import Malformed, NotFound
from service.ids import utcnow
from service.states import FINAL, Status
from service.store import events, jobs, keys
from service.store.tables import Event

router = Router(prefix="/v1/jobs/{job_id}/events", tags=["jobs"])

KEEP_ALIVE_S = 15.0
BATCH = 500
RETRY_MS = 1000
MAX_SEQ = 2**31 - 1


class EventView(BaseModel):
    """Something that happened to a job."""

    object: Literal["event"] = "event"
    job_id: str
    seq: Annotated[int, Field(description="1, 2, 3 ... without gaps")]
    type: Annotated[str, Field(description="created, queued, status_changed, phase_changed, resolved, step, evaluation, ...")]
    data: dict[str, Any]
    created_at: datetime

    @classmethod
    def of(cls, event: Event | Row[Any]) -> Self:
        return cls.model_validate(event, from_attributes=True)


class EventPage(BaseModel):
    """Events: the cursor is the last `seq`."""

    object: Literal["list"] = "list"
    data: list[EventView]
    has_more: bool
    first_id: int | None
    last_id: Annotated[int | None, Field(description="pass it as `after` (newest first: `before`) to get the next page")]


class EventsQuery(EitherWay):
    after: Annotated[int, Field(ge=0, le=MAX_SEQ, description="oldest first: only events with a greater `seq`")] = 0
    limit: Annotated[int, Field(ge=1, le=1000, description="how many at most; a stream has no limit")] = 100
    order: Annotated[
        Literal["oldest_first", "newest_first"], Field(description="of a list; newest first it ends before `before`")
    ] = "oldest_first"
    before: Annotated[int | None, Field(ge=1, le=MAX_SEQ, description="newest first: only events with a smaller `seq`")] = None
    every_s: Annotated[
        float,
        Field(ge=0, le=10, description="of a stream: what is new is told at once, but not before so long after the last time"),
    ] = 0
    without: Annotated[
        list[Literal["step", "phase_changed"]], Field(description="newest first: types to leave out; repeatable")
    ] = Field(default_factory=list)


async def _last_event_id(
    last_event_id: Annotated[
        str | None,
        Header(description="where a stream goes on; wins over `after`", json_schema_extra={"pattern": "^[0-9]{0,9}$"}),
    ] = None,
) -> int | None:
    if not last_event_id:
        return None
    if not last_event_id.isdecimal() or len(last_event_id) > len(str(MAX_SEQ)) or int(last_event_id) > MAX_SEQ:
        raise Malformed("Last-Event-ID must be the id of an event of this job, a number", code="invalid_last_event_id")
    return int(last_event_id)


STREAMS = {
    200: {
        "description": "A list, or with `Accept: text/event-stream` a stream: id is `seq`, event is `type`, data is an Event.",
        "model": EventPage,
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


def _is_stream(request: Request) -> bool:
    return "text/event-stream" in request.headers.get("accept", "")


async def _counted(request: Request, context: ContextDep, caller: CallerDep) -> AsyncIterator[None]:
    """A stream counts from before it begins until it has ended, also one that never came to send anything."""
    with context.open_answers.hold(caller.key_id) if _is_stream(request) else nullcontext():
        yield


@router.get("", response_model=EventPage, responses=STREAMS | responses(404), dependencies=[Depends(_counted)])
async def list_events(
    request: Request,
    context: ContextDep,
    caller: CallerDep,
    job_id: str,
    query: Annotated[EventsQuery, Query()],
    last_event_id: Annotated[int | None, Depends(_last_event_id)],
) -> Response:
    """What happened to the job, oldest first. A stream goes on until the job has ended and all was told."""
    if _is_stream(request):
        await run_in_threadpool(_read, context, caller, job_id, 0, 0)  # a 404 must come before the stream begins
        after = query.after if last_event_id is None else last_event_id
        stream = _stream(context, caller, job_id, after, query.every_s)
        return EventSourceResponse(stream, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
    if query.order == "newest_first":
        rows = await run_in_threadpool(_read_back, context, caller, job_id, query)
    else:
        rows = await run_in_threadpool(_read, context, caller, job_id, query.after, query.limit + 1)
    data, more = rows[: query.limit], len(rows) > query.limit
    seqs = [event.seq for event in data]
    page = EventPage(data=data, has_more=more, first_id=seqs[0] if seqs else None, last_id=seqs[-1] if seqs else None)
    return JSONResponse(page.model_dump(mode="json"))


def _read(context: Context, caller: Caller, job_id: str, after: int, limit: int) -> list[EventView]:
    """Events after `after`, in one short transaction. Raises NotFound if the job is not this project's."""
    with context.store.begin(readonly=True) as session:
        jobs.standing(session, caller.project, job_id)
        rows = events.after(session, job_id, after, limit)
    return [EventView.of(row) for row in rows]


def _read_back(context: Context, caller: Caller, job_id: str, query: EventsQuery) -> list[EventView]:
    with context.store.begin(readonly=True) as session:
        jobs.standing(session, caller.project, job_id)
        rows = events.before(session, job_id, query.before, query.limit + 1, query.without)
    return [EventView.of(row) for row in rows]


def _look(context: Context, project: str, job_id: str, after: int | None, key_ids: frozenset[str]) -> Look:
    """New events, read once for all who follow the job with these keys, in one short transaction."""
    with context.store.look() as session:
        in_force = keys.in_force(session, key_ids, utcnow())
        status, last = jobs.standing(session, project, job_id)  # before the events: a final status comes with its event
        rows = [] if after is None or last <= after else events.after(session, job_id, after, BATCH)
    lines = [_line(EventView.of(row)) for row in rows]
    newest = lines[-1].seq if lines else last if after is None else after
    has_more = len(lines) == BATCH
    return Look(lines, newest, has_more, Status(status) in FINAL and not has_more, key_ids - in_force)


def _line(event: EventView) -> TailLine:
    return TailLine(event.seq, format_sse_event(id=str(event.seq), event=event.type, data_str=event.model_dump_json()))


async def _stream(context: Context, caller: Caller, job_id: str, after: int, every_s: float) -> AsyncIterator[bytes]:
    """The stream. Between two events it holds no thread and no connection, and does not poll."""
    look = partial(_look, context, caller.project, job_id)
    with context.tails.follow(job_id, caller.key_id, look, every_s) as tail:
        yield format_sse_event(retry=RETRY_MS, comment=f"events of {job_id}")
        while not context.stopping.is_set() and caller.key_id not in tail.revoked:
            lines = tail.behind(after)
            if lines is None:  # older than the events cached for all
                try:
                    async with context.shares.share(caller.key_id, always=True):
                        lines = await run_in_threadpool(_lines, context, caller, job_id, after)
                except NotFound:  # deleted meanwhile
                    return
            if lines:
                after = lines[-1].seq
                yield b"".join(line.text for line in lines)
            elif tail.error is not None:
                raise tail.error
            elif tail.ended:
                return
            elif not await tail.wait(KEEP_ALIVE_S):
                yield b": still here\n\n"


def _lines(context: Context, caller: Caller, job_id: str, after: int) -> list[TailLine]:
    return [_line(event) for event in _read(context, caller, job_id, after, BATCH)]
