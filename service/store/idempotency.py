"""Idempotency keys: the first request claims the key, does the work, and stores its answer for later requests."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from math import ceil
from typing import Any

from sqlalchemy import and_, bindparam, delete, select, update
from sqlalchemy.orm import Session

from service.errors import InFlight, InvalidRequest
from service.store import clock
from service.store.dialect import insert
from service.store.tables import IdempotencyKey

ABANDONED_AFTER = timedelta(seconds=60)  # a request in flight for longer counts as dead; the next one may take over
KEPT_FOR = timedelta(hours=24)
TRIES = 10  # to claim a key that failing requests claim and free again and again


@dataclass(frozen=True)
class Claim:
    """The right of this request to do the work. Pass it to `complete` or `abandon`."""

    project: str
    route: str
    key: str
    taken_at: datetime


@dataclass(frozen=True)
class StoredAnswer:
    """The answer to the first request."""

    status: int
    body: dict[str, Any]


def begin(
    session: Session, *, project: str, route: str, key: str, body_sha256: str, now: datetime | None = None
) -> Claim | StoredAnswer:
    """Claim the key, or get the stored answer. Commit at once, so that others see the claim.

    Raises InvalidRequest (code idempotency_key_reused) for another body, InFlight while the first request is running.
    """
    now = now or clock.now(session)
    claim = Claim(project, route, key, now)
    for _ in range(TRIES):
        if (found := _begin(session, claim, body_sha256)) is not None:
            return found
    raise _in_flight(claim, timedelta())


def _begin(session: Session, claim: Claim, body_sha256: str) -> Claim | StoredAnswer | None:
    """One try. None if the key was taken but has just been freed, because its request failed."""
    fresh = _count(insert(session, IdempotencyKey).on_conflict_do_nothing())
    row = {"project": claim.project, "route": claim.route, "key": claim.key, "body_sha256": body_sha256}
    if session.execute(fresh, {**row, "status": None, "answer": None, "created_at": claim.taken_at}).all():
        return claim
    entry = session.scalars(_FIND, _place(claim), execution_options={"populate_existing": True}).one_or_none()
    if entry is None:
        return None
    if entry.body_sha256 != body_sha256:
        raise InvalidRequest(
            f"Idempotency-Key {claim.key!r} was used with another body; send a new key with a new request",
            code="idempotency_key_reused",
        )
    if entry.status is not None:
        return StoredAnswer(entry.status, entry.answer or {})
    age = claim.taken_at - entry.created_at
    stale = {**_place(claim), "of_moment": entry.created_at, "created_at": claim.taken_at}
    if age > ABANDONED_AFTER and session.execute(_TAKE_OVER, stale).all():
        return claim
    raise _in_flight(claim, age)


def _in_flight(claim: Claim, age: timedelta) -> InFlight:
    """The error while the first request is running. The longer it has run, the likelier it died, so Retry-After is the time
    that it has run so far: at least 1 s, at most until it counts as dead."""
    left_s = max(0, ceil((ABANDONED_AFTER - age).total_seconds()))
    retry_after_s = max(1, min(left_s, ceil(age.total_seconds())))
    return InFlight(
        f"the first request with Idempotency-Key {claim.key!r} has not been answered yet; try again in {retry_after_s} s. "
        f"Should it have died, another takes its place in {left_s} s",
        retry_after_s=retry_after_s,
    )


def complete(session: Session, claim: Claim, status: int, answer: dict[str, Any]) -> None:
    """Store the answer. Call it in the transaction of the work, so that both happen or neither.

    Raises InFlight if another request has taken over the claim; that request then gives the answer.
    """
    if not session.execute(_COMPLETE, {**_mine(claim), "status": status, "answer": answer}).all():
        raise InFlight(f"another request with Idempotency-Key {claim.key!r} took over; try again in a moment")


def abandon(session: Session, claim: Claim) -> None:
    """Free the key: the request failed and changed nothing."""
    session.execute(_ABANDON, _mine(claim))


def expire(session: Session, now: datetime) -> int:
    """Delete entries older than a day. Returns how many."""
    return len(session.execute(_count(delete(IdempotencyKey).where(IdempotencyKey.created_at < now - KEPT_FOR))).all())


def _place(claim: Claim) -> dict[str, Any]:
    return {"of_project": claim.project, "of_route": claim.route, "of_key": claim.key}


def _mine(claim: Claim) -> dict[str, Any]:
    return {**_place(claim), "of_moment": claim.taken_at}


def _count(statement: Any) -> Any:
    """With a result row for each changed row, because drivers do not report the count for every kind of INSERT."""
    return statement.returning(IdempotencyKey.key).execution_options(synchronize_session=False)


# Built once: to build such a statement takes longer than to run it.
_IS = and_(
    IdempotencyKey.project == bindparam("of_project"),
    IdempotencyKey.route == bindparam("of_route"),
    IdempotencyKey.key == bindparam("of_key"),
)
_IS_MINE = and_(_IS, IdempotencyKey.status.is_(None), IdempotencyKey.created_at == bindparam("of_moment"))
_FIND = select(IdempotencyKey).where(_IS)
_TAKE_OVER = _count(update(IdempotencyKey).where(_IS_MINE).values(created_at=bindparam("created_at")))
_COMPLETE = _count(update(IdempotencyKey).where(_IS_MINE).values(status=bindparam("status"), answer=bindparam("answer")))
_ABANDON = delete(IdempotencyKey).where(_IS_MINE).execution_options(synchronize_session=False)
