"""Sampled groups, stored for reading, by (job, split, step, group_index). The later attempt wins."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, delete, select, tuple_
from sqlalchemy.orm import Session

from service.errors import FieldError, InvalidRequest
from service.store.dialect import connection_of, name_of, replacing
from service.store.tables import Rollout


@dataclass(frozen=True)
class RolloutRow:
    """One sampled group as a worker reports it."""

    split: str  # train | eval
    step: int
    group_index: int
    prompt: str
    reference: str | None
    samples: list[dict[str, Any]]


def write(session: Session | Connection, job_id: str, rows: Sequence[RolloutRow], *, attempt: int, now: datetime) -> None:
    common = {"job_id": job_id, "attempt": attempt, "created_at": now}
    if rows:
        connection_of(session).execute(_WRITE[name_of(session)], [{**common, **vars(row)} for row in rows])


_WRITE = replacing(Rollout, newest="attempt")


def cursor(row: Rollout) -> str:
    """The value of `after` that continues after this row."""
    return f"{row.step}.{row.split}.{row.group_index}"


def page(
    session: Session,
    job_id: str,
    *,
    split: str | None = None,
    step: int | None = None,
    after: str | None = None,
    limit: int = 20,
) -> tuple[list[Rollout], bool]:
    """Newest step first, then by split (eval before train) and group. Returns the rows and whether there are more."""
    query = select(Rollout).where(Rollout.job_id == job_id)
    if split is not None:
        query = query.where(Rollout.split == split)
    if step is not None:
        query = query.where(Rollout.step == step)
    if after is not None:
        # The step is negated, so that the cursor is one row comparison.
        query = query.where(tuple_(-Rollout.step, Rollout.split, Rollout.group_index) > tuple_(*_parse(after)))
    query = query.order_by(-Rollout.step, Rollout.split, Rollout.group_index).limit(limit + 1)
    rows = list(session.scalars(query))
    return rows[:limit], len(rows) > limit


def _parse(after: str) -> tuple[int, str, int]:
    step, _, rest = after.partition(".")
    split, _, group = rest.partition(".")
    if not (step.isdecimal() and group.isdecimal() and split):
        error = FieldError("/after", "not a cursor", "unknown_cursor", got=after)
        raise InvalidRequest(f"`after` must be the last_id of a page of rollouts (STEP.SPLIT.GROUP), got {after!r}", [error])
    return -int(step), split, int(group)


def forget_after(session: Session, job_id: str, step: int) -> None:
    session.execute(delete(Rollout).where(Rollout.job_id == job_id, Rollout.step > step))
