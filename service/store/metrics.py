"""Curves: (job, name, step) -> value. The later attempt wins, so a resumed run has one clean line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from math import isfinite

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from service.store.dialect import upsert
from service.store.tables import Metric


@dataclass
class Series:
    """One curve, in order of step. `min` and `max` are given only where points were put together."""

    step: list[int] = field(default_factory=list)
    value: list[float | None] = field(default_factory=list)
    min: list[float | None] | None = None
    max: list[float | None] | None = None


def write(session: Session, job_id: str, step: int, values: Mapping[str, float | None], *, attempt: int, now: datetime) -> None:
    """The metrics of one step; a value that is not finite is stored as null."""
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
    upsert(session, Metric, rows, newest="attempt")


def written(session: Session, job_id: str, step: int, *, attempt: int) -> bool:
    """Whether this attempt has written this step."""
    query = select(Metric.step).where(Metric.job_id == job_id, Metric.step == step, Metric.attempt == attempt).limit(1)
    return session.scalar(query) is not None


def names(session: Session, job_id: str) -> list[str]:
    return list(session.scalars(select(Metric.name).where(Metric.job_id == job_id).distinct().order_by(Metric.name)))


def series(
    session: Session,
    job_id: str,
    wanted: Sequence[str] = (),
    *,
    from_step: int = 0,
    to_step: int | None = None,
    points: int | None = None,
) -> dict[str, Series]:
    """Curves by name; without `wanted` all of them. A name that was never measured gives an empty curve.

    Steps are inclusive. A curve of more than `points` points is cut into that many stretches of equal width: each gives its
    last step, its mean, and its min and max, so that no spike is lost.
    """
    chosen = list(wanted) or names(session, job_id)
    where = [Metric.job_id == job_id, Metric.name.in_(chosen), Metric.step >= from_step]
    if to_step is not None:
        where.append(Metric.step <= to_step)
    curves = {name: Series() for name in chosen}
    extent = select(Metric.name, func.count(), func.min(Metric.step), func.max(Metric.step)).where(*where).group_by(Metric.name)
    long: dict[str, tuple[int, int]] = {}
    for name, count, first, last in session.execute(extent):
        if points is not None and count > points:
            long[name] = (first, last)
    short = [name for name in chosen if name not in long]
    rows = select(Metric.name, Metric.step, Metric.value).where(*where, Metric.name.in_(short))
    rows = rows.order_by(Metric.name, Metric.step)
    for name, step, value in session.execute(rows):
        curves[name].step.append(step)
        curves[name].value.append(value)
    for name, (first, last) in long.items():
        assert points is not None
        stretch = (Metric.step - first) * points // (last - first + 1)
        rows = select(func.max(Metric.step), func.avg(Metric.value), func.min(Metric.value), func.max(Metric.value))
        rows = rows.where(*where, Metric.name == name).group_by(stretch).order_by(stretch)
        columns = list(zip(*session.execute(rows), strict=True))
        curves[name] = Series(*(list(column) for column in columns))
    return curves


def forget_after(session: Session, job_id: str, step: int) -> None:
    session.execute(delete(Metric).where(Metric.job_id == job_id, Metric.step > step))
