"""Authentication by API key, sent as `Authorization: Bearer tml-...` or `X-API-Key: tml-...`. A key has a project, scopes
and a rate limit."""

import logging
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

from fastapi import Request, Security
from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase
from fastapi.security.utils import get_authorization_scheme_param
from sqlalchemy.exc import OperationalError
from starlette.concurrency import run_in_threadpool

from service.edge import sso
from service.edge.audit import CALLER
from service.edge.context import Context, context_of
from service.edge.rate import RateReply, Turn
from service.edge.shares import Share
from service.errors import Forbidden, RateLimited, Unauthorized
from service.ids import utcnow
from service.store import keys
from service.store.keys import Known
from service.store.session import Store
from service.validation.words import counted

log = logging.getLogger(__name__)

HINT = "send the header Authorization: Bearer tml-...; `ratchet up` writes its key to the file `key` in the data directory"
MAX_KEY_LENGTH = 200
ADMIN_PROJECT = "default"  # its admin keys may create, list and revoke keys of every project
READING = frozenset({"GET", "HEAD"})
ANSWER_HEADERS = "ratchet.answer_headers"  # ASGI scope key: headers that the middleware adds to the answer, even to an error
SHARE = "ratchet.share"  # ASGI scope key: the request's share of its key's, which the middleware ends when the answer is made
KEY_HEADER = "X-API-Key"
DESCRIPTION = "An API key, tml-..."


@dataclass(frozen=True)
class Caller:
    key_id: str
    project: str
    scopes: frozenset[str]
    expires_at: datetime | None
    share: Share  # this request's, of what its key may have of the process

    def require(self, scope: str) -> None:
        """Raises Forbidden, naming the scope, if the key lacks it."""
        if scope not in self.scopes:
            raise Forbidden(
                f"this takes an API key with the scope {scope!r}; this one has {', '.join(sorted(self.scopes, reverse=True))}",
                code="scope_missing",
                hint=f"use a key that was made with the scope {scope!r} (POST /v1/keys with a key of scope 'admin')",
                missing_scope=scope,
            )

    def managed(self, project: str | None, refusal: str) -> str:
        """The project to manage, by default the caller's own. Only ADMIN_PROJECT manages others, else Forbidden (`refusal`)."""
        project = project or self.project
        if project != self.project and self.project != ADMIN_PROJECT:
            raise Forbidden(
                f"this key belongs to project {self.project}; {refusal}", hint=f"use a key of the project `{ADMIN_PROJECT}`"
            )
        return project


class Admission(SecurityBase):
    """A dependency that lets in who shows a key with this scope; by default `read` for GET and HEAD, and `write` for all else.

    It has no dependencies of its own: FastAPI walks through those anew at each place where their dependent stands. That the key
    may also come as X-API-Key is added to the security schemes of openapi.json by `service.api.schema`.
    """

    def __init__(self, scope: str | None = None) -> None:
        self.model, self.scheme_name = HTTPBearer(description=DESCRIPTION), "bearer"
        self._scope = scope

    async def __call__(self, request: Request) -> Caller:
        caller = request.scope.get(CALLER) or await _admitted(request, context_of(request))
        caller.require(self._scope or ("read" if request.method in READING else "write"))
        return caller


CallerDep = Annotated[Caller, Security(Admission())]
AdminDep = Annotated[Caller, Security(Admission("admin"))]


async def _admitted(request: Request, context: Context) -> Caller:
    """Once a request: identify the key, check that it is valid, count the request against its rate limit, wait for a share."""
    scheme, text = get_authorization_scheme_param(request.headers.get("authorization"))
    if scheme.lower() != "bearer" or not text:
        text = request.headers.get(KEY_HEADER)
    user = None
    if not text:
        if (user := sso.user_of(request, context.settings)) is None:
            raise Unauthorized("no API key came with the request", code="missing_api_key", hint=HINT)
        text = sso.text_of(context.settings, user)
    elif not text.startswith(keys.PREFIX) or len(text) > MAX_KEY_LENGTH:
        raise Unauthorized("what came is not an API key: these begin with tml-", code="invalid_api_key", hint=HINT)
    key = taken = None
    if (known := context.keyring.find(text)) is not None:
        taken = await _take_turn(context, known.key)
        key = known.key if taken.edition == known.edition else None
    if key is None:
        key = await _looked_up(context, text, user)
    _check_in_force(key, utcnow())
    turn = (taken or await _take_turn(context, key)).turn
    if turn is not None:
        request.scope[ANSWER_HEADERS] = turn.headers
        _check_turn(turn)
    request.scope[SHARE] = share = await context.shares.enter(key.id)
    request.scope[CALLER] = caller = Caller(key.id, key.project, frozenset(key.scopes), key.expires_at, share)
    return caller


async def _looked_up(context: Context, text: str, user: str | None) -> Known:
    """Read the key from the store and cache it for a short time."""
    context.keyring.forget(text)
    looked_at = context.keyring.now()
    edition = await context.limiter.edition()  # read before the key, so that a revocation in between is noticed
    key = await run_in_threadpool(_look, context, text, user)
    if key is None:
        raise Unauthorized("this API key is not known here, or was revoked", code="invalid_api_key", hint=HINT)
    if edition is not None:
        context.keyring.keep(text, key, edition, looked_at)
    return key


def _look(context: Context, text: str, user: str | None) -> Known | None:
    """Runs in a thread. It also updates `last_used_at`: a key in use is looked up every few seconds."""
    store = context.store
    if user is not None:
        key = sso.look(store, context.settings, user)
    else:
        with store.look() as connection:
            key = keys.known(connection, text)
    if key is not None:
        _note_use(store, key, utcnow())
    return key


def _check_in_force(key: Known, now: datetime) -> None:
    if key.expires_at is not None and key.expires_at <= now:
        raise Unauthorized("this API key has expired", code="expired_api_key", hint="ask for a new one")


async def _take_turn(context: Context, key: Known) -> RateReply:
    return await context.limiter.take(key.id, context.limiter.rate(key.requests_per_s, key.burst))


def _check_turn(turn: Turn) -> None:
    if not turn.allowed:
        raise RateLimited(
            f"this API key may ask {turn.rate.requests_per_s:g} times a second, and {counted(turn.rate.burst, 'time')} at once",
            hint="wait for the seconds of Retry-After, or have a key made with a higher rate",
            retry_after_s=turn.retry_after_s,
        )


def _note_use(store: Store, key: Known, now: datetime) -> None:
    expired = key.expires_at is not None and key.expires_at <= now
    if expired or (key.last_used_at is not None and key.last_used_at > now - keys.TOUCH_EVERY):
        return
    try:
        with store.begin() as session:
            keys.touch(session, key.id, now)
    except OperationalError:  # last_used_at only informs people; a busy database must not fail the request
        log.warning("could not note the use of key %s", key.id, exc_info=True)
