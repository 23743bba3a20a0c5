"""Request bodies: read with a limit while they stream, decoded as JSON or YAML, and made of plain JSON values only."""

import asyncio
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from time import monotonic
from typing import Annotated, Any

from fastapi import Depends, Request
from starlette.types import Message

from service.edge.auth import CallerDep
from service.edge.context import ContextDep
from service.edge.documents import canonical, parse_json, parse_yaml
from service.errors import BodyTooLarge, BodyTooSlow, UnsupportedMedia

YAML_TYPES = frozenset({"application/yaml", "text/yaml", "application/x-yaml", "text/x-yaml"})
GRACE_S, MIN_BYTES_PER_S = 30.0, 1024  # a body of n bytes may take GRACE_S + n / MIN_BYTES_PER_S seconds
MAX_YAML_BYTES = 2 * 2**20  # YAML is parsed a hundred times slower than JSON
MEDIA_TYPES = ["application/json", *sorted(YAML_TYPES)]


@dataclass(frozen=True)
class Document:
    """A parsed body."""

    data: Any

    @cached_property
    def sha256(self) -> str:
        """Of the values: neither the format nor the order of keys changes it."""
        return sha256(canonical(self.data)).hexdigest()


def media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def limited(request: Request, limit: int, what: str) -> Request:
    """The same request, whose body raises BodyTooLarge as soon as it is known to be longer than `limit` bytes."""
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding not in ("", "identity"):
        raise UnsupportedMedia(
            f"the body is compressed ({encoding}); send it as it is, without Content-Encoding", code="unsupported_encoding"
        )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(what, limit)
    size, started = 0, monotonic()

    async def receive() -> Message:
        nonlocal size
        left_s = started + GRACE_S + size / MIN_BYTES_PER_S - monotonic()
        try:
            async with asyncio.timeout(max(left_s, 0.001)):  # wait_for would make a task of each piece
                message = await request.receive()
        except TimeoutError:
            raise BodyTooSlow(
                f"{size} bytes of {what} came in {monotonic() - started:.0f} s; "
                f"it must come at {MIN_BYTES_PER_S} bytes a second at least, after the first {GRACE_S:g} s"
            ) from None
        size += len(message.get("body", b""))
        if size > limit:
            raise _too_large(what, limit)
        return message

    return Request(request.scope, receive)


def _too_large(what: str, limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"{what} may have at most {limit} bytes", limit_bytes=limit)


async def _raw(request: Request, caller: CallerDep, context: ContextDep) -> bytes:
    """Read only for those who showed a key."""
    kind, limit, what = media_type(request), context.settings.max_body_bytes, "a body"
    if kind in YAML_TYPES:
        limit, what = min(limit, MAX_YAML_BYTES), "a YAML body (JSON may be longer)"
    elif kind and kind != "application/json" and not kind.endswith("+json"):
        raise UnsupportedMedia(
            f"the body's Content-Type is {kind}; taken are {', '.join(MEDIA_TYPES)}",
            hint="with curl: -H 'Content-Type: application/json' --data-binary @spec.json",
        )
    return await limited(request, limit, what).body()


def _document(request: Request, raw: Annotated[bytes, Depends(_raw)]) -> Document:
    return Document(parse_yaml(raw) if media_type(request) in YAML_TYPES else parse_json(raw))


def _document_if_any(request: Request, raw: Annotated[bytes, Depends(_raw)]) -> Document:
    return _document(request, raw) if raw.strip() else Document({})


DocumentDep = Annotated[Document, Depends(_document)]
OptionalDocumentDep = Annotated[Document, Depends(_document_if_any)]


def documented(schema: str, example: Any = None, *, required: bool = True) -> dict[str, Any]:
    """For a route's `openapi_extra`: its body is this component, as JSON or YAML."""
    content: dict[str, Any] = {"schema": {"$ref": f"#/components/schemas/{schema}"}}
    if example is not None:
        content["example"] = example
    return {"requestBody": {"required": required, "content": {"application/json": content, "application/yaml": content}}}
