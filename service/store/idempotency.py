"""Idempotency keys: the first request claims the key, does its work, and leaves its answer for the next ones."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from math import ceil
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, select, update
from sqlalchemy.orm import Session

from service.errors import InFlight, InvalidRequest
from service.store import clock
from service.store.dialect import insert
from service.store.tables import IdempotencyKey

ABANDONED_AFTER = timedelta(seconds=60)  # a request in flight for longer has died; the next one may take its place
KEPT_FOR = timedelta(hours=24)
TRIES = 10  # to see whose a key is that is taken and freed, again and again, by requests that are refused


@dataclass(frozen=True)
class Claim:
    """This request is the one that does the work. Hand it to `complete` or `abandon`."""

    project: str
    route: str
    key: str
    taken_at: datetime


@dataclass(frozen=True)
class StoredAnswer:
    """What the first request was told."""

    status: int
    body: dict[str, Any]


def begin(
    session: Session, *, project: str, route: str, key: str, body_sha256: str, now: datetime | None = None
) -> Claim | StoredAnswer:
    """Claim the key, or learn the stored answer. Commit at once, so that others see the claim.

    Raises InvalidRequest (code idempotency_key_reused) for another body, InFlight while the first request is at work.
    """
    now = now or clock.now(session)
    claim = Claim(project, route, key, now)
    for _ in range(TRIES):
        if (found := _begin(session, claim, body_sha256)) is not None:
            return found
    raise _in_flight(claim, timedelta())


def _begin(session: Session, claim: Claim, body_sha256: str) -> Claim | StoredAnswer | None:
    """None: the key was taken a moment ago and is free again, for its request was refused."""
    fresh = insert(session, IdempotencyKey).values(
        project=claim.project,
        route=claim.route,
        key=claim.key,
        body_sha256=body_sha256,
        status=None,
        answer=None,
        created_at=claim.taken_at,
    )
    if _count(session, fresh.on_conflict_do_nothing()) == 1:
        return claim
    entry = session.scalars(select(IdempotencyKey).where(_is(claim)).execution_options(populate_existing=True)).one_or_none()
    if entry is None:
        return None
    if entry.body_sha256 != body_sha256:
        raise InvalidRequest(
            f"Idempotency-Key {claim.key!r} was used with another body; send a new key with a new request",
            code="idempotency_key_reused",
        )
    if entry.status is not None:
        return StoredAnswer(entry.status, entry.answer or {})
    stale = and_(_is(claim), IdempotencyKey.status.is_(None), IdempotencyKey.created_at == entry.created_at)
    taken_over = update(IdempotencyKey).where(stale).values(created_at=claim.taken_at)
    age = claim.taken_at - entry.created_at
    if age > ABANDONED_AFTER and _count(session, taken_over) == 1:
        return claim
    raise _in_flight(claim, age)


def _in_flight(claim: Claim, age: timedelta) -> InFlight:
    """The longer the first request has taken, the likelier it died: who asks again is to wait as long once more."""
    left_s = max(0, ceil((ABANDONED_AFTER - age).total_seconds()))
    retry_after_s = max(1, min(left_s, ceil(age.total_seconds())))
    return InFlight(
        f"the first request with Idempotency-Key {claim.key!r} has not been answered yet; try again in {retry_after_s} s. "
        f"Should it have died, another takes its place in {left_s} s",
        retry_after_s=retry_after_s,
    )


def complete(session: Session, claim: Claim, status: int, answer: dict[str, Any]) -> None:
    """Store the answer, best in the transaction that did the work: then both happen, or neither.

    Raises InFlight when the claim was taken over meanwhile; the other request answers then.
    """
    mine = update(IdempotencyKey).where(_is_mine(claim)).values(status=status, answer=answer)
    if _count(session, mine) != 1:
        raise InFlight(f"another request with Idempotency-Key {claim.key!r} took over; try again in a moment")


def abandon(session: Session, claim: Claim) -> None:
    """The request failed and changed nothing: the key is free again."""
    session.execute(delete(IdempotencyKey).where(_is_mine(claim)))


def expire(session: Session, now: datetime) -> int:
    """Forget what is older than a day. Returns how many."""
    return _count(session, delete(IdempotencyKey).where(IdempotencyKey.created_at < now - KEPT_FOR))


def _is(claim: Claim) -> ColumnElement[bool]:
    return and_(IdempotencyKey.project == claim.project, IdempotencyKey.route == claim.route, IdempotencyKey.key == claim.key)


def _is_mine(claim: Claim) -> ColumnElement[bool]:
    return and_(_is(claim), IdempotencyKey.status.is_(None), IdempotencyKey.created_at == claim.taken_at)


def _count(session: Session, statement: Any) -> int:
    """How many rows the statement touched; a driver's row count is not to be had for every kind of INSERT."""
    touched = statement.returning(IdempotencyKey.key)
    return len(session.execute(touched, execution_options={"synchronize_session": False}).all())
