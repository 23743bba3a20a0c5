"""Datasets: uploaded as JSONL, listed, looked into, deleted."""

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from fastapi import Query, Response
from pydantic import BaseModel, ConfigDict, Field

from service.edge.auth import CallerDep
from service.edge.bodies import TurnDep
from service.edge.context import ContextDep
from service.edge.idempotency import IdempotencyKeyDep
from service.edge.pages import Page, PageQuery
from service.edge.problems import BODY, files_missing, responses
from service.edge.router import Router
from service.edge.uploads import MULTIPART, UploadDep, kept
from service.ids import utcnow
from service.jobs.data import JsonlRows
from service.store import datasets
from service.store.tables import Dataset
from service.validation import below, parse

router = Router(prefix="/v1/datasets", tags=["datasets"])

MAX_PAGE_BYTES = 4 * 2**20


class ColumnView(BaseModel):
    types: Annotated[list[str], Field(description="JSON types of its values")]
    rows: Annotated[int, Field(description="in how many rows it stands")]


class DatasetView(BaseModel):
    """An uploaded file of rows."""

    id: str
    object: Literal["dataset"] = "dataset"
    name: str
    rows: int
    columns: dict[str, ColumnView]
    sha256: str
    size_bytes: int
    created_at: datetime

    @classmethod
    def of(cls, row: Dataset) -> Self:
        return cls.model_validate(row, from_attributes=True)


class DatasetPage(Page[DatasetView]):
    pass


class RowsPage(BaseModel):
    """Some rows of the file; first_id and last_id are their numbers, from 0."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    has_more: bool
    first_id: int | None
    last_id: int | None
    total: int


Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]


class UploadQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Annotated[Name | None, Field(description="for people; default: the file's name")] = None


class RowsQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    offset: Annotated[int, Field(ge=0, le=10**9, description="number of the first row, from 0")] = 0
    limit: Annotated[int, Field(ge=1, le=1000, description="how many at most")] = 20


BODY_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "application/jsonl": {"schema": {"type": "string", "description": "one JSON object a line"}},
            MULTIPART: {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary"}},
                }
            },
        },
    }
}


@router.post("", status_code=201, response_model=DatasetView, responses=responses(409, *BODY), openapi_extra=BODY_SCHEMA)
def create_dataset(
    context: ContextDep,
    caller: CallerDep,
    query: Annotated[UploadQuery, Query()],
    idempotency_key: IdempotencyKeyDep,
    upload: UploadDep,
    turn_to_check: TurnDep,
) -> Any:
    """Upload rows as JSONL, one object per line. Every line is checked; errors give the line's number."""
    name = parse(Name, query.name or upload.name or "unnamed", "/name")
    return kept(context, caller, idempotency_key, upload, name=name, route="POST /v1/datasets", view=DatasetView.of, status=201)


@router.get("")
def list_datasets(context: ContextDep, caller: CallerDep, query: Annotated[PageQuery, Query()]) -> DatasetPage:
    """Datasets of the project, newest first."""
    with context.store.begin(readonly=True) as session, below("/query"):
        rows, has_more = datasets.page(session, caller.project, **query.model_dump())
    return DatasetPage.of([DatasetView.of(row) for row in rows], [row.id for row in rows], has_more)


@router.get("/{dataset_id}", responses=responses(404))
def read_dataset(context: ContextDep, caller: CallerDep, dataset_id: str) -> DatasetView:
    with context.store.begin(readonly=True) as session:
        return DatasetView.of(datasets.get(session, caller.project, dataset_id))


@router.get("/{dataset_id}/rows", responses=responses(404))
def read_rows(
    context: ContextDep, caller: CallerDep, turn_to_read: TurnDep, dataset_id: str, query: Annotated[RowsQuery, Query()]
) -> RowsPage:
    """Rows by number: as many as are asked for, and no more than 4 MiB of them at once, but one at least."""
    with context.store.begin(readonly=True) as session:
        dataset = datasets.get(session, caller.project, dataset_id)
    end = query.offset + query.limit
    try:
        rows = JsonlRows(context.store.blobs.fetch(dataset.path), end)
        data = rows[query.offset : rows.within(query.offset, end, MAX_PAGE_BYTES)]
    except FileNotFoundError:
        raise files_missing(f"dataset {dataset_id}") from None
    last = query.offset + len(data)
    return RowsPage(
        data=data,
        has_more=last < dataset.rows,
        first_id=query.offset if data else None,
        last_id=last - 1 if data else None,
        total=dataset.rows,
    )


@router.delete("/{dataset_id}", status_code=204, response_class=Response, responses=responses(404, 409))
def delete_dataset(context: ContextDep, caller: CallerDep, dataset_id: str) -> None:
    """Delete a dataset, unless a job that has not ended reads it."""
    with context.store.begin() as session:
        path = datasets.mark_deleted(session, caller.project, dataset_id, utcnow()).path
    context.store.blobs.delete(path)  # if this process dies here, the sweep removes the file
