"""Routes to create, list and revoke API keys, for keys of scope `admin`. Only the response to the creation has a key's text."""

from datetime import datetime, timedelta
from time import sleep
from typing import Annotated, Literal, Self

from fastapi import Query, Response
from pydantic import BaseModel, ConfigDict, Field, field_validator

from service.edge.auth import ADMIN_PROJECT, AdminDep, Caller, CallerDep
from service.edge.bodies import DocumentDep, OptionalDocumentDep, documented
from service.edge.context import ContextDep
from service.edge.idempotency import IdempotencyKeyDep, once
from service.edge.keyring import KEPT_FOR_S
from service.edge.pages import Page
from service.edge.problems import BODY, responses
from service.edge.rate import default_burst
from service.edge.router import Router
from service.errors import Conflict, FieldError
from service.ids import utcnow
from service.spec.section import Section
from service.store import keys
from service.store.tables import ApiKey
from service.validation import invalid, parse

router = Router(prefix="/v1/keys", tags=["keys"])

Project = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


Scope = Literal["read", "write", "admin"]
NOT_OURS = "it cannot manage keys of another one"
MAX_EXPIRES_IN_S = 10 * 366 * 86_400
SLOWEST_PER_S = 1e-6  # a request in eleven days: how long a bucket takes to fill must be a number that Redis counts in


class KeyRate(Section):
    """A key's rate limit: a token bucket of `burst` requests, refilled at `requests_per_s`."""

    requests_per_s: Annotated[float, Field(ge=SLOWEST_PER_S, le=1_000_000, description="requests a second in the long run")]
    burst: Annotated[int | None, Field(ge=1, le=1_000_000, description="requests at once; default: two seconds' worth")] = None


class KeyRequest(Section):
    """A key to create."""

    @field_validator("name")
    @classmethod
    def names_of_people_are_the_sign_on_proxys(cls, name: str) -> str:
        if name.startswith(keys.SIGNED_ON):
            raise ValueError(f"a name must not begin with {keys.SIGNED_ON}, which stands for who signs in by the proxy")
        return name

    name: Annotated[
        str, Field(min_length=1, max_length=200, description="a name for people: whose key it is, or what it is for")
    ]
    project: Annotated[
        Project | None, Field(description=f"default: that of the key that asks; another one takes a key of `{ADMIN_PROJECT}`")
    ] = None
    scopes: Annotated[
        list[Scope],
        Field(min_length=1, max_length=3, description="read: GET; write: all of the project but its keys; admin: keys too"),
    ] = ["admin"]  # noqa: RUF012 (pydantic copies it)
    expires_in_s: Annotated[
        float | None, Field(ge=1, le=MAX_EXPIRES_IN_S, description="seconds until the key expires; default: it never does")
    ] = None
    rate: Annotated[KeyRate | None, Field(description="how often it may ask; default: as the operator has set")] = None


class KeyRotation(Section):
    """How long the key that is replaced goes on working."""

    grace_s: Annotated[float, Field(ge=0, le=30 * 86_400, description="seconds for which both keys work")] = 86_400.0


class KeyRateView(BaseModel):
    """A key's own rate limit."""

    requests_per_s: float
    burst: int


class KeyView(BaseModel):
    """An API key, without its text."""

    id: str
    object: Literal["key"] = "key"
    name: str
    project: str
    ends_with: Annotated[str, Field(description="the last four characters, to tell keys apart")]
    scopes: Annotated[list[Scope], Field(description="all that it may do: admin holds write, write holds read")]
    rate: Annotated[KeyRateView | None, Field(description="its own; null: as the operator has set")]
    created_at: datetime
    expires_at: Annotated[datetime | None, Field(description="from then on it is no key any more; null: never")]
    last_used_at: Annotated[datetime | None, Field(description="to the minute")]

    @classmethod
    def of(cls, key: ApiKey) -> Self:
        columns = {name: getattr(key, name) for name in cls.model_fields if name not in ("object", "rate", "key")}
        rate = None
        if key.requests_per_s is not None and key.burst is not None:
            rate = KeyRateView(requests_per_s=key.requests_per_s, burst=key.burst)
        return cls(**columns, rate=rate)


class NewKeyView(KeyView):
    """An API key that was just made."""

    key: Annotated[str | None, Field(description="the key itself: shown this once, kept nowhere")] = None


class KeyPage(Page[KeyView]):
    pass


class KeysQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    project: Annotated[Project | None, Field(description=f"another project's keys, for keys of `{ADMIN_PROJECT}`")] = None


@router.post("", status_code=201, responses=responses(403, 409, *BODY), openapi_extra=documented("KeyRequest"))
def create_key(context: ContextDep, caller: AdminDep, document: DocumentDep, idempotency_key: IdempotencyKeyDep) -> NewKeyView:
    """Create a key. Repeated with the same Idempotency-Key it creates none and gets a 409, as the key's text is not stored."""
    request = parse(KeyRequest, document.data)
    project = caller.managed(request.project, NOT_OURS)
    rate, expires_at = request.rate, _expires_at(caller, request)
    with once(context.store, caller, idempotency_key, route="POST /v1/keys", body_sha256=document.sha256) as turn:
        if turn.replay is not None:
            raise Conflict(
                "a key was made by the first request with this Idempotency-Key, and shown then",
                code="key_shown_once",
                hint="revoke the key whose text was lost (GET /v1/keys), and make another with a new Idempotency-Key",
            )
        with context.store.begin() as session:
            key, text = keys.create(
                session,
                project=project,
                name=request.name,
                scopes=request.scopes,
                expires_at=expires_at,
                requests_per_s=rate and rate.requests_per_s,
                burst=rate and (rate.burst or default_burst(rate.requests_per_s)),
            )
            turn.complete(session, KeyView.of(key))
    return NewKeyView(**KeyView.of(key).model_dump(), key=text)


@router.get("", responses=responses(403))
def list_keys(context: ContextDep, caller: AdminDep, query: Annotated[KeysQuery, Query()]) -> KeyPage:
    """All keys of the project that were not revoked, newest first."""
    project = caller.managed(query.project, NOT_OURS)
    with context.store.begin(readonly=True) as session:
        rows = keys.page(session, project)
    return KeyPage.of([KeyView.of(row) for row in rows], [row.id for row in rows])


@router.get("/self")
def read_own_key(context: ContextDep, caller: CallerDep) -> KeyView:
    """The key that asks: its project, and what it may do."""
    with context.store.begin(readonly=True) as session:
        return KeyView.of(keys.get(session, caller.project, caller.key_id))


@router.delete("/{key_id}", status_code=204, response_class=Response, responses=responses(403, 404, 409))
def revoke_key(context: ContextDep, caller: AdminDep, key_id: str, query: Annotated[KeysQuery, Query()]) -> None:
    """Revoke a key, at once and for good. A key cannot revoke itself, so that nobody locks themselves out."""
    project = caller.managed(query.project, NOT_OURS)
    if key_id == caller.key_id:
        raise Conflict("a key cannot revoke itself", code="own_key", hint="make another key and revoke this one with it")
    with context.store.begin() as session:
        keys.revoke(session, project, key_id)
    if not context.doorbell.keys_changed():
        sleep(KEPT_FOR_S)  # until no process has it in its cache


@router.post(
    "/{key_id}/rotate",
    status_code=201,
    responses=responses(403, 404, 409, *BODY),
    openapi_extra=documented("KeyRotation", required=False),
)
def rotate_key(
    context: ContextDep, caller: AdminDep, key_id: str, document: OptionalDocumentDep, query: Annotated[KeysQuery, Query()]
) -> NewKeyView:
    """Replace a key by a new one with the same name, scopes and rate. The old one works for `grace_s` more, and then no longer.

    A key may rotate itself. A key that expires is replaced by one that lasts as long as it was made to, but not beyond the key
    that asks. One that was rotated expires with its time of grace, so it is not rotated again: make another.
    """
    project = caller.managed(query.project, NOT_OURS)
    request = parse(KeyRotation, document.data)
    with context.store.begin() as session:
        until = utcnow() + timedelta(seconds=request.grace_s)
        key, text = keys.rotate(session, project, key_id, until, no_longer_than=caller.expires_at)
    if not context.doorbell.keys_changed():
        sleep(KEPT_FOR_S)  # until no process has its old end in its cache
    return NewKeyView(**KeyView.of(key).model_dump(), key=text)


def _expires_at(caller: Caller, request: KeyRequest) -> datetime | None:
    """The new key's expiry. A key that expires cannot make one that lasts longer: its own expiry would mean nothing."""
    expires_at = None if request.expires_in_s is None else utcnow() + timedelta(seconds=request.expires_in_s)
    if caller.expires_at is not None and (expires_at is None or expires_at > caller.expires_at):
        detail = f"the key that asks expires at {caller.expires_at:%Y-%m-%dT%H:%M:%SZ}; it makes no key that lasts longer"
        raise invalid([FieldError("/expires_in_s", detail, "too_long", request.expires_in_s)])
    return expires_at
