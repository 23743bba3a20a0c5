"""API keys: made, listed, revoked. The text of a key is in the answer that makes it and nowhere else."""

from datetime import datetime
from typing import Annotated, Literal, Self

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from service.api.auth import ADMIN_PROJECT, Caller, CallerDep
from service.api.bodies import DocumentDep, documented
from service.api.context import ContextDep
from service.api.idempotency import IdempotencyKeyDep, once
from service.api.pages import Page
from service.api.problems import BODY, responses
from service.errors import Conflict, Forbidden
from service.store import keys
from service.store.tables import ApiKey
from service.validation import parse

router = APIRouter(prefix="/v1/keys", tags=["keys"])

Project = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class KeyRequest(BaseModel):
    """A key that shall be made."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=200, description="for people: whose key it is, or what for")]
    project: Annotated[
        Project | None, Field(description=f"default: that of the key that asks; another one takes a key of `{ADMIN_PROJECT}`")
    ] = None


class KeyView(BaseModel):
    """An API key, without its text."""

    id: str
    object: Literal["key"] = "key"
    name: str
    project: str
    ends_with: Annotated[str, Field(description="the last four characters, to tell keys apart")]
    created_at: datetime
    last_used_at: Annotated[datetime | None, Field(description="to the minute")]

    @classmethod
    def of(cls, key: ApiKey) -> Self:
        return cls.model_validate(key, from_attributes=True)


class NewKeyView(KeyView):
    """An API key that was just made."""

    key: Annotated[str | None, Field(description="the key itself: shown this once, kept nowhere")] = None


class KeyPage(Page[KeyView]):
    pass


class KeysQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    project: Annotated[Project | None, Field(description=f"another project's keys, for keys of `{ADMIN_PROJECT}`")] = None


@router.post("", status_code=201, responses=responses(403, 409, *BODY), openapi_extra=documented("KeyRequest"))
def create_key(context: ContextDep, caller: CallerDep, document: DocumentDep, idempotency_key: IdempotencyKeyDep) -> NewKeyView:
    """Make a key. A repetition with the same Idempotency-Key makes no second one, and is a 409: no text is kept."""
    request = parse(KeyRequest, document.data)
    project = _allowed_project(caller, request.project)
    with once(context.store, caller, idempotency_key, route="POST /v1/keys", body_sha256=document.sha256) as turn:
        if turn.replay is not None:
            raise Conflict(
                "a key was made by the first request with this Idempotency-Key, and shown then",
                code="key_shown_once",
                hint="revoke the key whose text was lost (GET /v1/keys), and make another with a new Idempotency-Key",
            )
        with context.store.begin() as session:
            key, text = keys.create(session, project=project, name=request.name)
            turn.complete(session, KeyView.of(key))
    return NewKeyView(**KeyView.of(key).model_dump(), key=text)


@router.get("", responses=responses(403))
def list_keys(context: ContextDep, caller: CallerDep, query: Annotated[KeysQuery, Query()]) -> KeyPage:
    """All keys of the project that are in force, newest first."""
    project = _allowed_project(caller, query.project)
    with context.store.begin(readonly=True) as session:
        rows = keys.page(session, project)
    return KeyPage.of([KeyView.of(row) for row in rows], [row.id for row in rows])


@router.delete("/{key_id}", status_code=204, response_class=Response, responses=responses(403, 404, 409))
def revoke_key(context: ContextDep, caller: CallerDep, key_id: str, query: Annotated[KeysQuery, Query()]) -> None:
    """Revoke a key, at once and for good. No key revokes itself, so that nobody locks himself out."""
    project = _allowed_project(caller, query.project)
    if key_id == caller.key_id:
        raise Conflict("a key cannot revoke itself", code="own_key", hint="make another key and revoke this one with it")
    with context.store.begin() as session:
        keys.revoke(session, project, key_id)


def _allowed_project(caller: Caller, project: str | None) -> str:
    project = project or caller.project
    if not caller.may_manage(project):
        raise Forbidden(
            f"this key belongs to project {caller.project}; it cannot manage keys of another one",
            hint=f"use a key of the project `{ADMIN_PROJECT}`",
        )
    return project
