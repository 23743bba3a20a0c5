"""Which requests the audit log tells of, and how they get into it: before their answer is complete, or with their change.

So a caller never has the whole answer to a change that the log does not tell. What failed or was refused changed nothing, and
is not told; nor is work, of which there is too much: losses, operations of sessions, samples, and the Tinker wire.
"""

import logging
import re
from typing import Any

from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.types import Scope

from service.store import audit
from service.store.session import Store

log = logging.getLogger(__name__)

CALLER = "ratchet.caller"  # ASGI scope key: who asks, set by `service.edge.auth`
TOLD = "ratchet.told"  # ASGI scope key: the transaction of the change has the entry, or there was no change
READING = frozenset({"GET", "HEAD", "OPTIONS"})
WORK = frozenset(
    {
        "/v1/jobs:validate",
        "/v1/losses",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/sessions/{session_id}/operations",
    }
)
MADE = re.compile(rb'\{"id":\s?"([A-Za-z0-9_-]{1,128})"')  # how every answer about one object begins


def is_told(scope: Scope, status: int) -> bool:
    """Whether the request made a change that the log tells."""
    route = getattr(scope.get("route"), "path_format", "")
    told = route.startswith("/v1/") and route not in WORK and scope["method"] not in READING
    return told and 200 <= status < 300 and CALLER in scope and TOLD not in scope


def tell_with(session: Session, scope: Scope, status: int, made: str) -> None:
    """Write the entry in the transaction of the change, which made this object: one commit instead of two."""
    audit.note(session, **_entry(scope, status, made))
    scope[TOLD] = True


def changed_nothing(scope: Scope) -> None:
    """The request was a dry run: the log does not tell of it."""
    scope[TOLD] = True


async def tell(scope: Scope, status: int, body: bytes) -> None:
    """Write the entry. If that fails the log of the process has it, and the request goes on."""
    made = MADE.match(body)
    entry = _entry(scope, status, made[1].decode() if made else None)
    try:
        await run_in_threadpool(_write, scope["app"].state.context.store, entry)
    except Exception:
        log.exception("the audit log lacks this: %s", entry)


def _entry(scope: Scope, status: int, made: str | None) -> dict[str, Any]:
    caller, given = scope[CALLER], list(scope.get("path_params", {}).values())
    return {
        "project": caller.project,
        "key_id": caller.key_id,
        "action": f"{scope['method']} {scope['route'].path_format}",
        "object_id": str(given[-1])[:128] if given else made,
        "status": status,
        "request_id": scope["request_id"],
    }


def _write(store: Store, entry: dict[str, Any]) -> None:
    with store.write() as connection:
        audit.note(connection, **entry)
