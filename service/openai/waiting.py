"""From a request to its operation, and the wait for what comes of it."""

import asyncio
from contextlib import suppress
from time import monotonic
from typing import Any, Self

from fastapi import Request
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from service.doorbell import Parts
from service.edge.auth import Caller
from service.edge.bodies import Document
from service.edge.context import Context
from service.edge.idempotency import once
from service.errors import Conflict, FieldError, InvalidRequest, NotFound, RatchetError, Unavailable
from service.jobs import lifecycle
from service.jobs.lease import IDLE
from service.openai import models
from service.openai.operations import asked
from service.openai.requests import ChatRequest, CompletionRequest
from service.sessions.sessions import sampler_of
from service.states import Status
from service.store import operations
from service.store.tables import Operation

LOOK_S = 1.0  # between two looks whether the caller is still there
WAIT_S = 600.0  # as long as OpenAI's client waits
CODES = {"sequence_too_long": "context_length_exceeded"}  # where OpenAI's clients know a code of their own


class Ticket(BaseModel):
    """The operation of a request. With an Idempotency-Key it is stored for repeats."""

    operation_id: str
    job_id: str
    model: str
    created: int


def append(
    context: Context,
    caller: Caller,
    document: Document,
    request: CompletionRequest | ChatRequest,
    *,
    route: str,
    key: str | None,
    lane: str,
) -> Ticket:
    """Log the request's operation with the project's sampler of its model. A repeat with the same `key` gets the first one's.

    Raises NotFound `model_not_found`, Conflict, Busy.
    """
    with once(context.store, caller, key, route=route, body_sha256=document.sha256) as turn:
        if turn.replay is not None:
            return Ticket.model_validate_json(bytes(turn.replay.body))
        target = models.target(context.store, context.settings, caller.project, request.model)
        try:
            sampler = sampler_of(
                context.store, context.doorbell, context.settings, caller.project, target.model, key_id=caller.key_id
            )
        except InvalidRequest as error:
            raise models.not_found(request.model, error.detail.removeprefix("/model/source: ")) from error
        if sampler.status == Status.PAUSED and sampler.status_reason != IDLE:
            raise Conflict(
                f"the sampler of this model, {sampler.id}, is paused ({sampler.status_reason})",
                code="sampler_paused",
                hint=f"resume it: POST /v1/jobs/{sampler.id}/resume",
            )
        tickets: list[Ticket] = []

        def note(session: Any, rows: list[Operation]) -> None:
            [row] = rows
            created = int(row.created_at.timestamp())
            tickets.append(Ticket(operation_id=row.id, job_id=sampler.id, model=target.id, created=created))
            turn.complete(session, tickets[-1])

        lifecycle.append_operations(
            context.store,
            context.doorbell,
            context.settings,
            caller.project,
            sampler.id,
            [asked(request, target.checkpoint, lane)],
            also=note,
        )
        return tickets[-1]


class Waiting:
    """The wait for an operation. An operation that still waits at the end is withdrawn, unless it is `kept` for a repeat."""

    def __init__(self, context: Context, caller: Caller, ticket: Ticket, parts: Parts, *, prompt: str, kept: bool) -> None:
        """`prompt`: where the request has it, a JSON pointer."""
        self._context, self._caller, self.ticket, self.parts, self._kept = context, caller, ticket, parts, kept
        self._places = {"/prompts": prompt, "/prompt_tokens": prompt, "/checkpoint": "/model"}
        self._found = False  # what came of it
        self._answered = asyncio.create_task(context.answers.wait(ticket.job_id, [ticket.operation_id], WAIT_S))
        self._answered.add_done_callback(lambda _: parts.rung.set())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.is_over or self._answered.cancel():
            await asyncio.wait([self._answered])
        if not self._kept and not self._found:
            await run_in_threadpool(lifecycle.withdraw_operation, self._context.store, self.ticket.operation_id)

    @property
    def is_over(self) -> bool:
        return self._answered.done()

    async def news(self, seconds: float, request: Request | None = None) -> bool:
        """Wait for parts or the end, for at most `seconds`. True if there are any.

        Raises Unavailable if the server stops, and ClientDisconnect if the caller of `request` has left.
        """
        until = monotonic() + seconds
        while not self.parts.rung.is_set():
            left = until - monotonic()
            if left <= 0:
                return False
            with suppress(TimeoutError):
                await asyncio.wait_for(self.parts.rung.wait(), min(LOOK_S, left))
            if self._context.stopping.is_set():
                raise Unavailable("the service stops; ask again", code="stopping")
            if request is not None and not self.is_over and await request.is_disconnected():
                raise ClientDisconnect
        self.parts.rung.clear()
        return True

    async def answer(self) -> bytes:
        """What came of the operation, once it is over. Raises what went wrong."""
        async with self._context.shares.share(self._caller.key_id, always=True):
            return await run_in_threadpool(self._answer)

    def _answer(self) -> bytes:
        with self._context.store.begin(readonly=True) as session:
            try:
                row = operations.get(session, self._caller.project, self.ticket.operation_id)
            except NotFound:
                raise NotFound("the answer to this Idempotency-Key has expired", code="answer_expired") from None
        self._found = row.status != "waiting"
        if row.error is not None:
            raise self._what_went_wrong(row.error)
        if row.answer is None:
            hint = "workers must be running, and free for this model"
            raise Unavailable(f"no answer came within {WAIT_S:g} s", code="no_answer", hint=hint)
        return row.answer

    def _what_went_wrong(self, error: dict[str, Any]) -> RatchetError:
        """A failed operation as an error of HTTP."""
        named, where, hint = str(error["code"]), str(error.get("pointer") or ""), error.get("hint")
        code = CODES.get(named, named)
        if error.get("category") != "user":
            return Unavailable(error["detail"], code=code, hint=hint)
        found = FieldError(self._places.get(where, where), error["detail"], code)
        return InvalidRequest(error["detail"], [found], code=code, hint=hint)
