"""Who is asking: an API key, as `Authorization: Bearer tml-...` or `X-API-Key: tml-...`, and the project that it belongs to."""

import logging
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.exc import OperationalError

from service.api.context import ContextDep
from service.errors import Unauthorized
from service.ids import utcnow
from service.store import keys
from service.store.session import Store
from service.store.tables import ApiKey

log = logging.getLogger(__name__)

HINT = "send the header Authorization: Bearer tml-...; `ratchet up` writes its key to the file `key` in the data directory"
MAX_KEY_LENGTH = 200
ADMIN_PROJECT = "default"  # its keys may make, list and revoke keys of every project

bearer = HTTPBearer(auto_error=False, scheme_name="bearer", description="An API key, tml-...")
api_key = APIKeyHeader(name="X-API-Key", auto_error=False, scheme_name="x-api-key", description="An API key, tml-...")


@dataclass(frozen=True)
class Caller:
    key_id: str
    project: str

    def may_manage(self, project: str) -> bool:
        """Whether this caller may make, list and revoke keys of the project."""
        return project == self.project or self.project == ADMIN_PROJECT


def _caller(
    context: ContextDep,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)],
    header: Annotated[str | None, Security(api_key)],
) -> Caller:
    text = credentials.credentials if credentials else header
    if not text:
        raise Unauthorized("no API key came with the request", code="missing_api_key", hint=HINT)
    if not text.startswith(keys.PREFIX) or len(text) > MAX_KEY_LENGTH:
        raise Unauthorized("what came is not an API key: these begin with tml-", code="invalid_api_key", hint=HINT)
    with context.store.begin(readonly=True) as session:
        key = keys.find(session, text)
    if key is None:
        raise Unauthorized("this API key is not known here, or was revoked", code="invalid_api_key", hint=HINT)
    _note_use(context.store, key)
    return Caller(key.id, key.project)


def _note_use(store: Store, key: ApiKey) -> None:
    now = utcnow()
    if key.last_used_at is not None and key.last_used_at > now - keys.TOUCH_EVERY:
        return
    try:
        with store.begin() as session:
            keys.touch(session, key.id, now)
    except OperationalError:  # the note is for people; a busy database must not cost the request
        log.warning("could not note the use of key %s", key.id, exc_info=True)


CallerDep = Annotated[Caller, Depends(_caller)]
