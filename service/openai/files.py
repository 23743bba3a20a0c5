"""OpenAI's files: each is a dataset. A file of purpose `fine-tune` is JSONL, checked line by line when it comes."""

from typing import Annotated, Any, Literal, Self

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field

from service.edge.auth import CallerDep
from service.edge.bodies import TurnDep
from service.edge.context import ContextDep
from service.edge.downloads import Download
from service.edge.idempotency import IdempotencyKeyDep
from service.edge.pages import Page
from service.edge.problems import files_missing
from service.edge.router import Router
from service.edge.uploads import MULTIPART, FormDep, kept
from service.ids import utcnow
from service.openai.face import responses
from service.store import datasets
from service.store.tables import Dataset
from service.validation import below, parse

router = Router(prefix="/v1/files", tags=["openai"])

PURPOSE = "fine-tune"
READS, BODY = (400, 401, 403, 414, 429, 431, 500, 503), (408, 413, 415, 507)
JSONL = {"application/jsonl": {"schema": {"type": "string"}}}
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]


class FileView(BaseModel):
    """A dataset, as OpenAI's clients see it."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: Annotated[int, Field(description="seconds since 1970")]
    expires_at: None = None
    filename: str
    purpose: Literal["fine-tune"] = PURPOSE
    status: Literal["processed"] = "processed"

    @classmethod
    def of(cls, row: Dataset) -> Self:
        return cls(id=row.id, bytes=row.size_bytes, created_at=int(row.created_at.timestamp()), filename=row.name)


class FilePage(Page[FileView]):
    pass


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class FilesQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    after: Annotated[str | None, Field(max_length=128, description="last_id of the page before")] = None
    limit: Annotated[int, Field(ge=1, le=10_000, description="how many at most")] = 1000
    order: Annotated[Literal["desc"], Field(description="newest first; no other order is offered")] = "desc"
    purpose: Annotated[Literal["fine-tune"], Field(description="the only one")] = PURPOSE


class _Fields(BaseModel):
    """What stands in the form beside the file."""

    model_config = ConfigDict(extra="forbid")

    purpose: Literal["fine-tune"]


FORM = {
    "requestBody": {
        "required": True,
        "content": {
            MULTIPART: {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"enum": [PURPOSE]}},
                }
            }
        },
    }
}


@router.post("", responses=responses(*READS, *BODY, 409), openapi_extra=FORM, response_model=FileView)
def create_file(
    context: ContextDep, caller: CallerDep, idempotency_key: IdempotencyKeyDep, upload: FormDep, turn_to_check: TurnDep
) -> Any:
    """Upload JSONL, one object a line, as a dataset. Every line is checked; errors give the line's number."""
    parse(_Fields, dict(upload.fields))
    name = parse(Name, upload.name or "unnamed", "/file")
    return kept(context, caller, idempotency_key, upload, name=name, route="POST /v1/files", view=FileView.of, status=200)


@router.get("", responses=responses(*READS))
def list_files(context: ContextDep, caller: CallerDep, query: Annotated[FilesQuery, Query()]) -> FilePage:
    """The project's datasets, newest first."""
    with context.store.begin(readonly=True) as session, below("/query"):
        rows, has_more = datasets.page(session, caller.project, after=query.after, limit=query.limit)
    return FilePage.of([FileView.of(row) for row in rows], [row.id for row in rows], has_more)


@router.get("/{file_id}", responses=responses(*READS, 404))
def retrieve_file(context: ContextDep, caller: CallerDep, file_id: str) -> FileView:
    with context.store.begin(readonly=True) as session:
        return FileView.of(datasets.get(session, caller.project, file_id))


@router.get(
    "/{file_id}/content",
    response_class=Download,
    responses={
        200: {"content": JSONL, "description": "The rows, one a line."},
        206: {"content": JSONL, "description": "The range of their bytes that the header Range names."},
        **responses(*READS, 404),
    },
)
def retrieve_file_content(context: ContextDep, caller: CallerDep, file_id: str) -> Download:
    """The rows as they are stored: blank lines and a byte order mark are gone."""
    with context.store.begin(readonly=True) as session:
        dataset = datasets.get(session, caller.project, file_id)
    path = context.store.blobs.fetch(dataset.path)
    if not path.is_file():
        raise files_missing(f"file {file_id}")
    return Download(path, media_type="application/jsonl")


@router.delete("/{file_id}", responses=responses(*READS, 404, 409))
def delete_file(context: ContextDep, caller: CallerDep, file_id: str) -> FileDeleted:
    """Delete a file, unless a job that has not ended reads it."""
    with context.store.begin() as session:
        path = datasets.mark_deleted(session, caller.project, file_id, utcnow()).path
    context.store.blobs.delete(path)
    return FileDeleted(id=file_id)
