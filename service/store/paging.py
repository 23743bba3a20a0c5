"""Pages of a list of objects, newest first, with a cursor."""

from collections.abc import Mapping
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Select, select, tuple_
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
    return descending(session, query, id_.class_.project == project, (created_at, id_), {"after": after}, limit=limit)


def descending(
    session: Session,
    query: Select[Row],
    scope: ColumnElement[bool],
    place: tuple[InstrumentedAttribute[Any], ...],
    cursor: Mapping[str, str | None],
    *,
    limit: int,
) -> tuple[list[Row], bool]:
    """The same by any columns `place`, the last of which is the id, for a list of all rows in `scope`. `cursor`: the
    parameter's name, and the id."""
    ((name, before),) = cursor.items()
    if before is not None:
        last = session.execute(select(*place).where(place[-1] == before, scope)).one_or_none()
        if last is None:
            error = FieldError(f"/{name}", f"no object {before}", "unknown_cursor", got=before)
            raise InvalidRequest(f"`{name}` must be the id of an object of this list, got {before!r}", [error])
        query = query.where(tuple_(*place) < tuple(last))  # a row comparison is one range of the index; an OR is not
    rows = list(session.scalars(query.order_by(*(column.desc() for column in place)).limit(limit + 1)))
    return rows[:limit], len(rows) > limit
