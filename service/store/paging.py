"""Pages of a list of objects, newest first, with a cursor."""

from typing import Any, TypeVar

from sqlalchemy import Select, select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from service.errors import FieldError, InvalidRequest

Row = TypeVar("Row")


def newest_first(
    session: Session,
    query: Select[Row],
    project: str,
    created_at: InstrumentedAttribute[Any],
    id_: InstrumentedAttribute[str],
    *,
    after: str | None,
    limit: int,
) -> tuple[list[Row], bool]:
    """One page of `query`, and whether there are more. `after` is the id of the caller's last row, in this project.

    Raises InvalidRequest if the project has no such row.
    """
    if after is not None:
        last = session.scalar(select(created_at).where(id_ == after, id_.class_.project == project))
        if last is None:
            error = FieldError("/after", f"no object {after}", "unknown_cursor", got=after)
            raise InvalidRequest(f"`after` must be the id of an object of this list, got {after!r}", [error])
        query = query.where(tuple_(created_at, id_) < (last, after))  # a row comparison is one range of the index; an OR is not
    rows = list(session.scalars(query.order_by(created_at.desc(), id_.desc()).limit(limit + 1)))
    return rows[:limit], len(rows) > limit
