"""Loss requests are read and checked here, computed by a stateless worker, and answered as soon as the result is there."""

import re
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import UTC, datetime
from functools import partial
from math import ceil
from time import monotonic, time
from typing import Annotated

from fastapi import Header, Request, Response
from starlette.concurrency import run_in_threadpool

from service.api.loss_views import ANSWERED, SENT, LossTicket
from service.doorbell import Watch
from service.edge.auth import Caller, CallerDep
from service.edge.bodies import limited, media_type
from service.edge.context import Context, ContextDep
from service.edge.negotiation import MAX_WAIT_S, accepted, wait_s
from service.edge.problems import BODY, responses
from service.edge.router import Router
from service.edge.shares import Share
from service.errors import NotFound, Unavailable, UnsupportedMedia
from service.ids import new_id
from service.losses import intake
from service.losses.answers import as_json
from service.losses.intake import JSON, TENSORS
from service.relay.orders import Answer
from service.relay.queue import RING_AGAIN_S, Standing

router = Router(prefix="/v1/losses", tags=["losses"])

SMALL_BYTES = 2**16
LOSS_ID = re.compile(r"loss_[0-9a-z]{26}")


Prefer = Annotated[
    str | None,
    Header(description=f"`wait=S`: hold the answer until it is there, for at most S seconds (and {MAX_WAIT_S})"),
]


# ---------------------------------------------------------------- routes


@router.post("", response_class=Response, responses=ANSWERED | responses(406, 429, *BODY), openapi_extra=SENT)
async def compute_losses(request: Request, context: ContextDep, caller: CallerDep, prefer: Prefer = None) -> Response:
    """Compute losses, and what else is wanted, of batches of log-probs. Items that are wrong are refused in their place.

    The response has the format of the body, or the one that Accept names. Nothing is stored: an answer is forgotten when it was
    sent, or, if the caller did not wait for it, after some minutes.
    """
    sent_as = _sent_as(request)
    answer_as = accepted(request, (sent_as, TENSORS if sent_as == JSON else JSON))
    loss_id = new_id("loss")
    raw = await limited(request, context.settings.max_loss_body_bytes, "a loss request").body()
    deadline = time() + context.settings.loss_time_limit_s  # from here: the caller's connection may be slow
    make = partial(intake.order, raw, sent_as, loss_id, caller.project, deadline)
    if intake.is_quick(raw, sent_as):
        order = make()
    else:
        async with _turn(context, caller, raw):
            order = await run_in_threadpool(make)
    del raw, make  # both may be large, and the wait long
    with context.signals.watch(loss_id) as bell:  # before it is pushed, so that no answer is missed
        must_ring = await context.losses.push(caller.project, loss_id, order, deadline)
        del order
        if must_ring:
            await run_in_threadpool(context.doorbell.ring_losses)
        seconds = wait_s(request)
        look = partial(context.losses.collect, caller.project, loss_id)
        answer = await _answer(context, caller.share, look, deadline, bell, seconds) if seconds else None
    if answer is None:
        return _ticket(context, loss_id, deadline)
    response = await _response(context, caller, answer, answer_as)
    response.headers["Preference-Applied"] = "wait"
    return response


@router.get("/{loss_id}", response_class=Response, responses=ANSWERED | responses(404, 406))
async def get_losses(request: Request, context: ContextDep, caller: CallerDep, loss_id: str, prefer: Prefer = None) -> Response:
    """The answer of a request that was not waited for, as often as wanted until it expires: JSON, or what Accept names."""
    answer_as = accepted(request, (JSON, TENSORS))
    if not LOSS_ID.fullmatch(loss_id):
        raise _unknown(loss_id)
    look = partial(context.losses.standing, caller.project, loss_id)
    with context.signals.watch(loss_id) as bell:
        raw, deadline = await look()
        if deadline is None:
            raise _unknown(loss_id)
        seconds = wait_s(request)
        if raw is None:
            raw = await _answer(context, caller.share, look, deadline, bell, seconds)
    if raw is None:
        return _ticket(context, loss_id, deadline)
    response = await _response(context, caller, raw, answer_as)
    if seconds:
        response.headers["Preference-Applied"] = "wait"
    return response


def _unknown(loss_id: str) -> NotFound:
    return NotFound(f"no loss request {loss_id[:40]} in this project, or its answer has expired")


def _ticket(context: Context, loss_id: str, deadline: float) -> Response:
    url = f"/v1/losses/{loss_id}"
    expires = datetime.fromtimestamp(ceil(deadline + context.settings.loss_result_ttl_s), UTC)
    ticket = LossTicket(id=loss_id, url=url, expires_at=expires)
    return Response(ticket.model_dump_json(), 202, {"Location": url, "Retry-After": "1"}, JSON)


# ---------------------------------------------------------------- reading


def _sent_as(request: Request) -> str:
    kind = media_type(request) or JSON
    if kind not in (JSON, TENSORS):
        raise UnsupportedMedia(
            f"the body's Content-Type is {kind}; taken are {JSON} and {TENSORS}",
            hint="with curl: -H 'Content-Type: application/json' --data-binary @request.json",
        )
    return kind


def _turn(context: Context, caller: Caller, raw: bytes) -> AbstractAsyncContextManager[None]:
    """Few large ones at once; small ones do not wait for them."""
    return context.conversions.turn(caller.key_id) if len(raw) > SMALL_BYTES else nullcontext()


# ---------------------------------------------------------------- waiting


async def _answer(
    context: Context, share: Share, look: Callable[[], Awaitable[Standing]], deadline: float, bell: Watch, seconds: float
) -> bytes | None:
    """The worker's answer, as soon as it is there; None if the caller's wait is over first.

    Raises Unavailable if no answer will come: Redis is down or was emptied, or the request's time limit has passed.
    """
    until = monotonic() + seconds
    while True:
        if time() > deadline:
            raise await _timed_out(context)
        left = min(until - monotonic(), deadline - time())
        if left <= 0 or context.stopping.is_set():
            return None
        async with share.resting():  # as many as the key likes may wait here
            rung = await bell.wait(min(left, RING_AGAIN_S))
        raw, standing = await look()
        if raw is not None:
            return raw
        if standing is None:
            raise Unavailable("this request was lost: the queue was emptied; send it again", code="loss_lost")
        if not rung and await context.losses.must_ring():
            await run_in_threadpool(context.doorbell.ring_losses)


async def _timed_out(context: Context) -> Unavailable:
    within = f"within {context.settings.loss_time_limit_s:g} s"
    if await context.losses.worker_was_seen():
        return Unavailable(f"no worker had the time to compute it {within}; send it again", code="loss_timed_out")
    return Unavailable(
        f"nobody computed it {within}: no loss worker was seen lately", code="loss_timed_out", hint="start a worker"
    )


# ---------------------------------------------------------------- answering


async def _response(context: Context, caller: Caller, raw: bytes, answer_as: str) -> Response:
    """Raises InvalidRequest and Unavailable as the worker says."""
    answer = Answer.decode(raw)
    if answer.problem is not None:
        raise Unavailable(answer.problem["detail"], code=answer.problem["code"])
    if answer.outcome == "invalid":
        raise intake.none_answered(answer.data, intake.errors_of(answer.data))
    if answer_as == TENSORS:
        return Response(raw, media_type=TENSORS)
    if len(raw) <= SMALL_BYTES:  # a fraction of a millisecond
        return Response(as_json(answer), media_type=JSON)
    async with _turn(context, caller, raw):
        return Response(await run_in_threadpool(as_json, answer), media_type=JSON)
