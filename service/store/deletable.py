"""Rows that describe files. A row is marked as deleted, its file is removed after the commit; the row stays."""

from typing import Generic, TypeVar

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from service.errors import NotFound
from service.ids import lacking
from service.store.paging import newest_first
from service.store.tables import Checkpoint, Dataset

Row = TypeVar("Row", Checkpoint, Dataset)


class Deletable(Generic[Row]):
    """Queries over the rows of a table that are not deleted."""

    def __init__(self, table: type[Row]) -> None:
        self.table = table
        self.there: ColumnElement[bool] = table.deleted_at.is_(None)

    def get(self, session: Session, project: str, row_id: str) -> Row:
        """The row. Raises NotFound if it is deleted or not in this project."""
        row = session.get(self.table, row_id)
        if row is None or row.project != project or row.deleted_at is not None:
            raise NotFound(lacking(self.table.__name__.lower(), row_id))
        return row

    def lock(self, session: Session, project: str, row_id: str) -> Row:
        """Like `get`, but reads the row afresh and locks it against changes until this transaction ends."""
        return self._locked(session, project, row_id, read=False)

    def hold(self, session: Session, project: str, row_id: str) -> Row:
        """Like `get`, but also prevents its deletion until this transaction ends."""
        return self._locked(session, project, row_id, read=True)

    def page(
        self, session: Session, project: str, *where: ColumnElement[bool], after: str | None = None, limit: int = 20
    ) -> tuple[list[Row], bool]:
        """Newest first. Returns the rows and whether there are more."""
        query = select(self.table).where(self.table.project == project, self.there, *where)
        return newest_first(session, query, project, self.table.created_at, self.table.id, after=after, limit=limit)

    def live_paths(self, session: Session) -> set[str]:
        """The paths of all files that are not deleted, of all projects."""
        return set(session.scalars(select(self.table.path).where(self.there)))

    def _locked(self, session: Session, project: str, row_id: str, *, read: bool) -> Row:
        query = select(self.table).where(self.table.id == row_id).with_for_update(read=read)
        session.scalar(query.execution_options(populate_existing=True))
        return self.get(session, project, row_id)
