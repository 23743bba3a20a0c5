"""Bodies that go to a file on the disk: JSONL as it is, or in a form."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from tempfile import TemporaryFile
from typing import IO, Annotated, Any

from fastapi import Depends, Request
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from service.edge.auth import Caller, CallerDep
from service.edge.bodies import limited, media_type
from service.edge.context import Context, context_of
from service.edge.idempotency import once
from service.edge.shares import Share
from service.errors import Malformed, UnsupportedMedia
from service.jobs.datasets import STORE, ingest
from service.store.blobs import room_on
from service.store.tables import Dataset

MULTIPART = "multipart/form-data"
JSONL_TYPES = (
    "application/jsonl",
    "application/x-ndjson",
    "application/x-jsonlines",
    "application/ndjson",
    "application/octet-stream",
)
MAX_MULTIPART_BYTES = 64 * 2**20  # a form is spooled to the system's temporary folder first
MAX_FIELDS = 10
CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Upload:
    """The whole body, in an unnamed file on the disk that is removed with this request."""

    file: IO[bytes]
    sha256: str
    name: str | None
    fields: Mapping[str, str]  # the other fields of a form


async def _upload(request: Request, caller: CallerDep) -> AsyncIterator[Upload]:
    """Rows as the body itself, or in a form."""
    if media_type(request) not in (*JSONL_TYPES, MULTIPART):
        raise UnsupportedMedia(
            f"a dataset's Content-Type is {', '.join(JSONL_TYPES[:2])} or {MULTIPART}, got {media_type(request) or 'none'}",
            hint="with curl: -H 'Content-Type: application/jsonl' --data-binary @rows.jsonl",
        )
    async with _received(request, caller.share, context_of(request)) as upload:
        yield upload


async def _form(request: Request, caller: CallerDep) -> AsyncIterator[Upload]:
    """Rows in a form."""
    if media_type(request) != MULTIPART:
        raise UnsupportedMedia(
            f"a file comes as {MULTIPART}, got {media_type(request) or 'none'}",
            hint="with curl: -F purpose=fine-tune -F file=@rows.jsonl",
        )
    async with _received(request, caller.share, context_of(request)) as upload:
        yield upload


UploadDep = Annotated[Upload, Depends(_upload, scope="function")]
FormDep = Annotated[Upload, Depends(_form, scope="function")]


@asynccontextmanager
async def _received(request: Request, share: Share, context: Context) -> AsyncIterator[Upload]:
    """Received without holding a thread, however slowly it comes; read only for those who showed a key."""
    limit, kind = context.settings.max_dataset_bytes, media_type(request)
    root = context.store.blobs.root
    with room_on(STORE):
        await run_in_threadpool(root.mkdir, parents=True, exist_ok=True)
    with room_on(STORE), TemporaryFile(dir=root) as file:
        if kind == MULTIPART:
            limit = min(limit, MAX_MULTIPART_BYTES)
            form_of = limited(request, limit, "a form (send a longer file as the body itself)", share).form
            with room_on("the disk with the service's temporary files (send the rows as the body itself, not as a form)"):
                form = await form_of(max_files=1, max_fields=MAX_FIELDS)
            try:
                part = form.get("file")
                if not isinstance(part, UploadFile):
                    raise Malformed("the form has no field `file` with a file in it", code="missing_file")
                digest = await _spool(_chunks_of(part), file)
                fields = {name: value for name, value in form.items() if isinstance(value, str)}
                yield Upload(file, digest, part.filename, fields)
            finally:
                await form.close()
        else:
            digest = await _spool(limited(request, limit, "a dataset", share).stream(), file)
            yield Upload(file, digest, None, {})


async def _chunks_of(part: UploadFile) -> AsyncIterator[bytes]:
    while chunk := await part.read(CHUNK_BYTES):
        yield chunk


async def _spool(chunks: AsyncIterator[bytes], file: IO[bytes]) -> str:
    """Write to the file in a thread, in pieces large enough to be worth it. Returns the sha256."""
    digest, waiting = sha256(), bytearray()

    def flush() -> None:
        digest.update(waiting)
        file.write(waiting)
        waiting.clear()

    async for chunk in chunks:
        waiting += chunk
        if len(waiting) >= CHUNK_BYTES:
            await run_in_threadpool(flush)
    await run_in_threadpool(flush)
    file.seek(0)
    return digest.hexdigest()


def kept(
    context: Context,
    caller: Caller,
    idempotency_key: str | None,
    upload: Upload,
    *,
    name: str,
    route: str,
    view: Callable[[Dataset], BaseModel],
    status: int,
) -> Any:
    """The upload as a dataset of this name, made once for an Idempotency-Key: its view, or the answer to the first request."""
    sent = sha256(f"{name}\n{upload.sha256}".encode()).hexdigest()
    with once(context.store, caller, idempotency_key, route=route, body_sha256=sent) as turn:
        if turn.replay is not None:
            return turn.replay
        dataset = ingest(
            context.store,
            caller.project,
            name,
            upload.file,
            context.settings.max_dataset_bytes,
            also=lambda session, dataset: turn.complete(session, view(dataset), status),
        )
    return view(dataset)
