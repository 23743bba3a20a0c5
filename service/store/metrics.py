"""Curves: (job, name, step) -> value. The later attempt wins, so a resumed run has one clean line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from math import isfinite
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, func, select
from sqlalchemy.orm import Session

from service.store.dialect import connection_of, name_of, replacing
from service.store.tables import Metric

FEW = 5000  # points


@dataclass
class Series:
    """One curve, in order of step. `min` and `max` are given only if points were aggregated."""

    step: list[int] = field(default_factory=list)
    value: list[float | None] = field(default_factory=list)
    min: list[float | None] | None = None
    max: list[float | None] | None = None


def write(
    session: Session | Connection,
    job_id: str,
    step: int,
    values: Mapping[str, float | None],
    *,
    attempt: int,
    now: datetime,
) -> None:
    """Write the metrics of one step. A value that is not finite is stored as null."""
    rows = [
        {
            "job_id": job_id,
            "name": name,
            "step": step,
            "value": None if value is None or not isfinite(value) else float(value),
            "attempt": attempt,
            "created_at": now,
        }
        for name, value in values.items()
    ]
    if rows:
        connection_of(session).execute(_WRITE[name_of(session)], rows)


_WRITE = replacing(Metric, newest="attempt")


def written(session: Session | Connection, job_id: str, step: int, *, attempt: int) -> bool:
    """Whether this attempt has written this step."""
    query = select(Metric.step).where(Metric.job_id == job_id, Metric.step == step, Metric.attempt == attempt).limit(1)
    return session.scalar(query) is not None


def names(session: Session, job_id: str) -> list[str]:
    """The names in order, with one index seek for each name: SELECT DISTINCT would read every point."""
    first = select(func.min(Metric.name).label("name")).where(Metric.job_id == job_id)
    distinct = first.cte(recursive=True)
    following = select(func.min(Metric.name)).where(Metric.job_id == job_id, Metric.name > distinct.c.name).scalar_subquery()
    distinct = distinct.union_all(select(following).where(distinct.c.name.is_not(None)))
    return list(session.scalars(select(distinct.c.name).where(distinct.c.name.is_not(None))))


def series(
    session: Session,
    job_id: str,
    wanted: Sequence[str] = (),
    *,
    from_step: int = 0,
    to_step: int | None = None,
    points: int | None = None,
    newest: int | None = None,
) -> dict[str, Series]:
    """Curves by name; without `wanted` all of them. A name that was never measured gives an empty curve.

    Both step bounds are inclusive. A curve of more than `points` points is cut into that many stretches of equal width. Each
    stretch gives its last step, mean, min and max, so that no spike is lost. `newest`: only the last so many points.
    """
    wanted = list(wanted) or names(session, job_id)
    if newest is None and (curves := _few(session, job_id, wanted, from_step, to_step, points)) is not None:
        return curves
    curves = {}
    for name in wanted:
        where = [Metric.job_id == job_id, Metric.name == name, Metric.step >= from_step]
        if to_step is not None:
            where.append(Metric.step <= to_step)
        if newest is not None:
            last = select(Metric.step).where(*where).order_by(Metric.step.desc()).limit(newest)
            where.append(Metric.step >= select(func.min(last.subquery().c.step)).scalar_subquery())
        together = None if points is None else _put_together(session, where, points)
        curves[name] = together or _as_it_is(session, where)
    return curves


def sampled(session: Session, job_id: str, name: str, *, last: int, points: int) -> Series:
    """The values at `points` steps at most, evenly spaced from 1 to `last`: as many seeks, however long the curve is."""
    count = min(points, last)
    steps = {1 + i * (last - 1) // max(1, count - 1) for i in range(count)}
    where = (Metric.job_id == job_id, Metric.name == name, Metric.step.in_(sorted(steps)))
    return Series(*_columns(session.execute(select(Metric.step, Metric.value).where(*where).order_by(Metric.step)).all(), 2))


def seconds_per_step(session: Session, job_id: str, name: str, attempt: int, after: int) -> float | None:
    """By the clock, with all that goes on between two steps: of this attempt's steps that follow `after`. None: too few."""
    ends = select(func.min(Metric.created_at), func.max(Metric.created_at), func.count())
    where = (Metric.job_id == job_id, Metric.name == name, Metric.step > after, Metric.attempt == attempt)
    first, last, count = session.execute(ends.where(*where)).one()
    return None if count < 2 else (last - first).total_seconds() / (count - 1)


def _few(
    session: Session, job_id: str, wanted: Sequence[str], from_step: int, to_step: int | None, points: int | None
) -> dict[str, Series] | None:
    """The curves by one query, if they have FEW points together and none needs to be put together; else None.

    Whoever follows a job asks again and again for the newest points of many curves.
    """
    where = [Metric.job_id == job_id, Metric.name.in_(wanted), Metric.step >= from_step]
    if to_step is not None:
        where.append(Metric.step <= to_step)
    query = select(Metric.name, Metric.step, Metric.value).where(*where).order_by(Metric.name, Metric.step)
    rows = session.execute(query.limit(FEW + 1)).all()
    if len(rows) > FEW:
        return None
    curves = {name: Series() for name in wanted}
    for name, step, value in rows:
        curves[name].step.append(step)
        curves[name].value.append(value)
    return None if any(points is not None and len(curve.step) > points for curve in curves.values()) else curves


def _as_it_is(session: Session, where: list[ColumnElement[bool]]) -> Series:
    rows = session.execute(select(Metric.step, Metric.value).where(*where).order_by(Metric.step)).all()
    return Series(*_columns(rows, 2))


def _put_together(session: Session, where: list[ColumnElement[bool]], points: int) -> Series | None:
    """The curve aggregated to at most `points` points; None if it has no more than that."""
    first, last = (session.scalar(select(end(Metric.step)).where(*where)) for end in (func.min, func.max))
    if first is None or last is None or last - first < points:
        return None
    stretch = (Metric.step - first) * points // (last - first + 1)
    rows = select(
        func.max(Metric.step), func.avg(Metric.value), func.min(Metric.value), func.max(Metric.value), func.count()
    ).where(*where)
    *columns, counts = _columns(session.execute(rows.group_by(stretch).order_by(stretch)).all(), 5)
    return Series(*columns) if sum(counts) > points else None


def _columns(rows: Sequence[Any], count: int) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)] or [[] for _ in range(count)]


def forget_after(session: Session, job_id: str, step: int) -> None:
    session.execute(delete(Metric).where(Metric.job_id == job_id, Metric.step > step))
