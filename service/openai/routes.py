"""OpenAI's routes: POST /v1/completions and /v1/chat/completions."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.sse import EventSourceResponse, format_sse_event
from starlette.concurrency import run_in_threadpool

from service.edge.auth import Caller, CallerDep
from service.edge.bodies import Document, DocumentDep, documented
from service.edge.context import Context, ContextDep
from service.edge.idempotency import IdempotencyKeyDep
from service.edge.problems import problem
from service.errors import RatchetError
from service.openai.answers import ChatAnswer, CompletionAnswer, Form
from service.openai.face import JSON, responses
from service.openai.requests import ChatRequest, CompletionRequest
from service.openai.sampled import held_back, sampled
from service.openai.waiting import WAIT_S, Waiting, append
from service.validation import parse

router = APIRouter(tags=["openai"])

FIRST_S = 10.0  # until the first part of a stream: what goes wrong before that has a status of its own
KEEP_ALIVE_S = 10.0
EVENTS = "text/event-stream"
DONE = format_sse_event(data_str="[DONE]")


async def _open(context: ContextDep, caller: CallerDep) -> AsyncIterator[AsyncExitStack]:
    """What a request holds until its answer is sent or its caller has left: an open answer of its key, and its wait."""
    with context.open_answers.hold(caller.key_id):
        async with AsyncExitStack() as held:
            yield held


OpenDep = Annotated[AsyncExitStack, Depends(_open)]


def _answers(model: type[Any]) -> dict[int | str, dict[str, Any]]:
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    content = {JSON: {"schema": schema}, EVENTS: {"schema": {"type": "string"}}}
    said = "The answer; with `stream: true` its chunks as server-sent events, ended by [DONE]."
    return {200: {"description": said, "content": content}, **responses(*STATUSES)}


STATUSES = (400, 401, 403, 404, 408, 409, 413, 414, 415, 429, 431, 500, 503, 507)
COMPLETION = {"model": "tiny", "prompt": "12+30=", "max_tokens": 4, "temperature": 0}
CHAT = {"model": "ckpt_01k0000000000000000000000", "messages": [{"role": "user", "content": "How much is 12 + 30?"}]}


@router.post(
    "/v1/completions",
    response_class=Response,
    responses=_answers(CompletionAnswer),
    openapi_extra=documented("CompletionRequest", COMPLETION),
)
async def create_completion(
    request: Request,
    context: ContextDep,
    caller: CallerDep,
    document: DocumentDep,
    held: OpenDep,
    idempotency_key: IdempotencyKeyDep,
) -> Response:
    """Continue a prompt, as OpenAI's API does: with a checkpoint, or with a base model."""
    return await _answer(request, context, caller, document, held, idempotency_key, CompletionRequest)


@router.post(
    "/v1/chat/completions",
    response_class=Response,
    responses=_answers(ChatAnswer),
    openapi_extra=documented("ChatRequest", CHAT),
)
async def create_chat_completion(
    request: Request,
    context: ContextDep,
    caller: CallerDep,
    document: DocumentDep,
    held: OpenDep,
    idempotency_key: IdempotencyKeyDep,
) -> Response:
    """Answer a chat, as OpenAI's API does: with a checkpoint, or with a base model, through its own chat template."""
    return await _answer(request, context, caller, document, held, idempotency_key, ChatRequest)


async def _answer(
    request: Request,
    context: Context,
    caller: Caller,
    document: Document,
    held: AsyncExitStack,
    key: str | None,
    kind: type[CompletionRequest] | type[ChatRequest],
) -> Response:
    asked: CompletionRequest | ChatRequest = await run_in_threadpool(parse, kind, document.data)
    route, lane = f"POST {request.url.path}", f"openai/{request.scope['request_id']}"
    parts = held.enter_context(context.signals.parts(lane))  # before the worker can tell any
    prompt = "/messages" if kind is ChatRequest else "/prompt"
    ticket = await run_in_threadpool(partial(append, context, caller, document, asked, route=route, key=key, lane=lane))
    waiting = await held.enter_async_context(Waiting(context, caller, ticket, parts, prompt=prompt, kept=key is not None))
    form = Form(asked, ticket.operation_id, ticket.created, ticket.model)
    async with caller.share.resting():
        if asked.stream:
            await waiting.news(FIRST_S, request)
        else:
            while not waiting.is_over:
                await waiting.news(WAIT_S, request)
    if not asked.stream:
        raw = await waiting.answer()
        whole = await run_in_threadpool(_whole, raw, asked, form)
        return Response(whole, media_type=JSON)
    raw = await waiting.answer() if waiting.is_over else None
    stream = _stream(request, asked, form, waiting, raw)
    return EventSourceResponse(stream, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})


def _whole(raw: bytes, asked: CompletionRequest | ChatRequest, form: Form) -> str:
    echo = asked.prompts if isinstance(asked, CompletionRequest) and asked.echo else None
    return form.whole(sampled(raw, asked.stops, echo=echo)).model_dump_json(exclude_unset=False)


async def _stream(
    request: Request, asked: CompletionRequest | ChatRequest, form: Form, waiting: Waiting, raw: bytes | None
) -> AsyncIterator[bytes]:
    """Chunks of what is told while the answers grow, and then of the rest: the stored answer is the truth."""
    told: dict[int, int] = {}  # characters sent, by answer
    try:
        while raw is None:
            for index, text in sorted(waiting.parts.texts.items()):
                certain = held_back(text, asked.stops)
                if len(certain) > told.get(index, 0):
                    if index not in told:
                        yield _events(form.begun(index))
                    yield _events([form.grown(index, certain[told.get(index, 0) :])])
                    told[index] = len(certain)
            if waiting.is_over:
                raw = await waiting.answer()
            elif not await waiting.news(KEEP_ALIVE_S):
                yield b": still here\n\n"
        answer = await run_in_threadpool(sampled, raw, asked.stops)
        for index, choice in enumerate(answer.choices):
            if index not in told:
                yield _events(form.begun(index))
            yield _events(form.ended(index, choice, told.get(index, 0)))
        yield _events(form.usage(answer.usage))
    except RatchetError as error:  # the status is sent already
        yield format_sse_event(data_str=bytes(problem(request, error).body).decode())
    yield DONE


def _events(chunks: Any) -> bytes:
    return b"".join(format_sse_event(data_str=json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))) for chunk in chunks)
