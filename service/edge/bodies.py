"""Request bodies: read with limits on size and time, and parsed as JSON or YAML into plain JSON values."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from time import monotonic
from typing import Annotated, Any

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool
from starlette.types import Message

from service.edge.auth import Caller, CallerDep
from service.edge.context import Context, context_of
from service.edge.documents import canonical, parse_json, parse_yaml
from service.edge.shares import Share
from service.errors import BodyTooLarge, BodyTooSlow, UnsupportedMedia

YAML_TYPES = frozenset({"application/yaml", "text/yaml", "application/x-yaml", "text/x-yaml"})
GRACE_S, MIN_BYTES_PER_S = 30.0, 1024  # a body of n bytes may take GRACE_S + n / MIN_BYTES_PER_S seconds
MAX_YAML_BYTES = 64 * 2**10  # YAML is parsed a hundred times slower than JSON: 3 ms for each KiB
QUICK_YAML_BYTES, QUICK_JSON_BYTES = 2 * 2**10, 64 * 2**10  # parsing a body of this size takes at most ten milliseconds
TINY_BYTES = 4 * 2**10  # of JSON: a change of threads takes longer
MEDIA_TYPES = ["application/json", *sorted(YAML_TYPES)]


@dataclass(frozen=True)
class Document:
    """A parsed body."""

    data: Any

    @cached_property
    def sha256(self) -> str:
        """The hash of the values. It does not depend on the format or on the order of keys."""
        return sha256(canonical(self.data)).hexdigest()


def media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def limited(request: Request, limit: int, what: str, share: Share | None = None, *, encodings: tuple[str, ...] = ()) -> Request:
    """The same request, but reading its body raises BodyTooLarge above `limit` bytes, and BodyTooSlow if it comes too slowly.

    Raises UnsupportedMedia for a compressed body (unless `encodings` names how), and BodyTooLarge at once if Content-Length
    exceeds the limit. `share`, if given, is released while waiting for each chunk: use it for a body that goes to disk, not
    into memory.
    """
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding not in ("", "identity", *encodings):
        raise UnsupportedMedia(
            f"the body is compressed ({encoding}); send it as it is, without Content-Encoding", code="unsupported_encoding"
        )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(what, limit)
    size, waited_s = 0, 0.0  # waited_s: time spent waiting for the caller, without the time in line for a share
    resting = nullcontext if share is None else share.resting

    async def receive() -> Message:
        nonlocal size, waited_s
        began, left_s = monotonic(), GRACE_S + size / MIN_BYTES_PER_S - waited_s
        try:
            async with resting():
                async with asyncio.timeout(max(left_s, 0.001)):  # wait_for would create a task for each chunk
                    message = await request.receive()
                waited_s += monotonic() - began
        except TimeoutError:
            raise BodyTooSlow(
                f"{size} bytes of {what} came in {waited_s + monotonic() - began:.0f} s; "
                f"it must come at {MIN_BYTES_PER_S} bytes a second at least, after the first {GRACE_S:g} s"
            ) from None
        size += len(message.get("body", b""))
        if size > limit:
            raise _too_large(what, limit)
        return message

    return Request(request.scope, receive)


def _too_large(what: str, limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"{what} may have at most {limit} bytes", limit_bytes=limit)


async def _raw(request: Request, context: Context) -> bytes:
    """The body's bytes. What reads it depends on `caller`: a body is read only after its API key was checked."""
    kind, limit, what = media_type(request), context.settings.max_body_bytes, "a body"
    if kind in YAML_TYPES:
        limit, what = min(limit, MAX_YAML_BYTES), "a YAML body (send JSON, which may be longer)"
    elif kind and kind != "application/json" and not kind.endswith("+json"):
        raise UnsupportedMedia(
            f"the body's Content-Type is {kind}; taken are {', '.join(MEDIA_TYPES)}",
            hint="with curl: -H 'Content-Type: application/json' --data-binary @spec.json",
        )
    return await limited(request, limit, what).body()


async def _parsed(request: Request, caller: Caller, context: Context, raw: bytes) -> Document:
    """Parse the body in a thread, unless that takes longer than the parsing; a large one waits for its turn."""
    if len(raw) <= TINY_BYTES and media_type(request) not in YAML_TYPES:
        return Document(parse_json(raw))
    parse, quick = (parse_yaml, QUICK_YAML_BYTES) if media_type(request) in YAML_TYPES else (parse_json, QUICK_JSON_BYTES)
    async with nullcontext() if len(raw) <= quick else context.checks.turn(caller.key_id):
        return Document(await run_in_threadpool(parse, raw))


async def _document(request: Request, caller: CallerDep) -> Document:
    context = context_of(request)
    return await _parsed(request, caller, context, await _raw(request, context))


async def _document_if_any(request: Request, caller: CallerDep) -> Document:
    context = context_of(request)
    raw = await _raw(request, context)
    return await _parsed(request, caller, context, raw) if raw.strip() else Document({})


async def _turn(request: Request, caller: CallerDep) -> AsyncIterator[None]:
    async with context_of(request).checks.turn(caller.key_id):
        yield


async def _turn_to_show(request: Request, caller: CallerDep) -> AsyncIterator[None]:
    async with context_of(request).views.turn(caller.key_id):
        yield


# For work whose length the caller decides: it waits for its turn. Declare these after the body, which may arrive slowly.
TurnDep = Annotated[None, Depends(_turn, scope="function")]
ShowTurnDep = Annotated[None, Depends(_turn_to_show, scope="function")]

DocumentDep = Annotated[Document, Depends(_document)]
OptionalDocumentDep = Annotated[Document, Depends(_document_if_any)]


def documented(schema: str, example: Any = None, *, required: bool = True) -> dict[str, Any]:
    """A route's `openapi_extra`: its request body is the component `schema`, as JSON or YAML."""
    content: dict[str, Any] = {"schema": {"$ref": f"#/components/schemas/{schema}"}}
    if example is not None:
        content["example"] = example
    return {"requestBody": {"required": required, "content": {"application/json": content, "application/yaml": content}}}
