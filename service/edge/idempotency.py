"""Idempotency-Key: the first request does the work and stores its answer in one transaction; repeats get that answer."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Header
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.orm import Session

from service.edge.auth import Caller
from service.errors import Malformed
from service.store import idempotency
from service.store.idempotency import Claim, StoredAnswer
from service.store.session import Store

log = logging.getLogger(__name__)

MAX_LENGTH = 255


async def _key(  # not in a thread, which takes longer than the check
    idempotency_key: Annotated[
        str | None,
        Header(
            description="any text of yours, the same for each repetition of one request; kept for a day",
            json_schema_extra={"pattern": "^[ -~]+$", "maxLength": MAX_LENGTH},
        ),
    ] = None,
) -> str | None:
    if idempotency_key is None:
        return None
    if not (0 < len(idempotency_key) <= MAX_LENGTH and idempotency_key.isascii() and idempotency_key.isprintable()):
        raise Malformed(f"an Idempotency-Key has 1 to {MAX_LENGTH} printable ASCII characters", code="invalid_idempotency_key")
    return idempotency_key


IdempotencyKeyDep = Annotated[str | None, Depends(_key)]


@dataclass(frozen=True)
class Once:
    """The state of one request, with or without an Idempotency-Key."""

    replay: JSONResponse | None  # the stored answer of the first request: send it and do no work
    claim: Claim | None

    def complete(self, session: Session, answer: BaseModel, status: int = 201) -> None:
        """Store the answer in the transaction of the work. Does nothing without an Idempotency-Key."""
        if self.claim is not None:
            idempotency.complete(session, self.claim, status, answer.model_dump(mode="json", by_alias=True))


@contextmanager
def once(store: Store, caller: Caller, key: str | None, *, route: str, body_sha256: str) -> Iterator[Once]:
    """Wrap the work of a request. If the work raises, it has changed nothing, and the key is free again.

    Raises InFlight while the first request is running, InvalidRequest if the key was used with another body.
    """
    if key is None:
        yield Once(None, None)
        return
    with store.begin() as session:
        state = idempotency.begin(session, project=caller.project, route=route, key=key, body_sha256=body_sha256)
    if isinstance(state, StoredAnswer):
        yield Once(_replay(state.status, state.body), None)
        return
    try:
        yield Once(None, state)
    except BaseException:
        _abandon(store, state)
        raise


def _replay(status: int, body: dict[str, Any]) -> JSONResponse:
    return JSONResponse(body, status, {"Idempotency-Replayed": "true"})


def _abandon(store: Store, claim: Claim) -> None:
    try:
        with store.begin() as session:
            idempotency.abandon(session, claim)
    except Exception:  # the request's own error matters more; the claim expires in a minute
        log.warning("could not free an Idempotency-Key", exc_info=True)
