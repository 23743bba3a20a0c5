"""The ledger: what each attempt at each job spent, by day and API key. It outlives the jobs.

It has one row for each (job, attempt, day). The transactions that commit steps and checkpoints and that end attempts add to
it. What an attempt spent since its last checkpoint is `unsaved`. A checkpoint makes it useful; if the attempt ends without
one, it is wasted, because the next attempt starts from the last checkpoint and does the work again. A sampler has no
checkpoints: what it spent on an answer is kept with the answer.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Row, bindparam, cast, func, literal, literal_column, select, true, update
from sqlalchemy.orm import Session

from service.errors import NotFound
from service.ids import lacking
from service.metric_names import EVAL_TOKENS_SAMPLED, STEP_S, TOKENS_SAMPLED, TOKENS_TRAINED
from service.states import HELD, Phase
from service.store.dialect import connection_of, for_both, insert, name_of, table_of
from service.store.jobs import SHOWN, SmallJob
from service.store.tables import Budget, Checkpoint, Job, Metric, Usage

TOKENS = ("sampled_tokens", "trained_tokens")
SECONDS = tuple(f"{phase}_s" for phase in Phase)
AMOUNTS = (*TOKENS, "s")  # each also has columns unsaved_... and wasted_...
# Metrics that hold the cost of a step or an evaluation -> the column that counts this cost when it is wasted.
SPENT: Mapping[str, str] = {
    TOKENS_SAMPLED: "wasted_sampled_tokens",
    EVAL_TOKENS_SAMPLED: "wasted_sampled_tokens",
    TOKENS_TRAINED: "wasted_trained_tokens",
    STEP_S: "wasted_s",
}


@dataclass(frozen=True)
class Spent:
    """What a piece of work cost: tokens, and the worker's seconds by phase."""

    sampled_tokens: int = 0
    trained_tokens: int = 0
    phase_s: Mapping[str, float] = field(default_factory=dict)
    ran_s: float | None = None  # seconds that the attempt has run so far, by its worker's monotonic clock

    def __add__(self, other: "Spent") -> "Spent":
        both = {
            phase: self.phase_s.get(phase, 0.0) + other.phase_s.get(phase, 0.0) for phase in {**self.phase_s, **other.phase_s}
        }
        tokens = self.sampled_tokens + other.sampled_tokens, self.trained_tokens + other.trained_tokens
        return Spent(*tokens, both, other.ran_s)


NOTHING = Spent()


def add(
    session: Session | Connection, job: Job | SmallJob, spent: Spent, now: datetime, *, steps: int = 0, kept: bool = False
) -> None:
    """Add to what the current attempt spent: as unsaved, unless what was made of it is `kept` already."""
    if not (spent.sampled_tokens or spent.trained_tokens or spent.phase_s or steps):
        return
    seconds = {f"{phase}_s": spent.phase_s.get(phase, 0.0) for phase in Phase}
    tokens = {"sampled_tokens": spent.sampled_tokens, "trained_tokens": spent.trained_tokens}
    unsaved = {} if kept else _unsaved(spent)
    _put(session, job, job.attempt, now, {**tokens, **seconds, **unsaved, "steps": steps})


def _unsaved(spent: Spent) -> dict[str, float]:
    return {
        "unsaved_sampled_tokens": spent.sampled_tokens,
        "unsaved_trained_tokens": spent.trained_tokens,
        "unsaved_s": sum(spent.phase_s.values()),
    }


def waited(session: Session, job: Job, attempt: int, now: datetime) -> None:
    """A worker takes the job for this attempt: add the time that the job was ready and waited."""
    since = max(moment for moment in (job.queued_at or now, job.not_before) if moment is not None)
    _put(session, job, attempt, now, {"queued_s": max(0.0, (now - since).total_seconds())})


def failed(session: Session, job: Job, code: str, now: datetime) -> None:
    """The current attempt ends with this failure. A job that fails without a lease, queued or at rest, counts as attempt 0."""
    _put(session, job, job.attempt if job.status in HELD else 0, now, {}, failure=code)


def _put(
    session: Session | Connection,
    job: Job | SmallJob,
    attempt: int,
    now: datetime,
    amounts: Mapping[str, float],
    **values: str,
) -> None:
    """Add `amounts` to the attempt's row of this day, and set `values` in it."""
    place = {"job_id": job.id, "attempt": attempt, "day": f"{now:%Y-%m-%d}", "project": job.project, "key_id": job.key_id}
    row = {**place, **dict.fromkeys(_ADDED, 0), "failure": None, **amounts, **values}
    connection_of(session).execute(_PUT[name_of(session)], row)


def save(session: Session, job: Job, now: datetime, after: Spent = NOTHING) -> None:
    """A checkpoint covers what the current attempt has spent so far, except what it spent `after` the checkpoint's copy."""
    session.execute(_of_attempt(job).values({f"unsaved_{name}": 0 for name in AMOUNTS}))
    if after != NOTHING:
        _put(session, job, job.attempt, now, _unsaved(after))


def close(session: Session, job: Job, ran_s: float, now: datetime, *, wasted: bool) -> None:
    """The current attempt ends after `ran_s` seconds. Time not accounted for yet goes to the phase in which it ended."""
    accounted = sum((getattr(Usage, name) for name in SECONDS), start=literal(0.0))
    query = select(func.coalesce(func.sum(accounted), 0.0)).where(Usage.job_id == job.id, Usage.attempt == job.attempt)
    rest_s = ran_s - float(session.scalar(query) or 0.0)
    if rest_s > 0:
        add(session, job, Spent(phase_s={job.phase or Phase.LOADING: rest_s}), now)
    if wasted:
        moved = {f"wasted_{name}": getattr(Usage, f"wasted_{name}") + getattr(Usage, f"unsaved_{name}") for name in AMOUNTS}
        session.execute(_of_attempt(job).values(moved))
    save(session, job, now)


def _of_attempt(job: Job) -> Any:
    where = (Usage.job_id == job.id, Usage.attempt == job.attempt)
    return update(Usage).where(*where).execution_options(synchronize_session=False)


def revoke(session: Session, job: Job, step: int) -> None:
    """The job's checkpoint is broken, so the job continues from the earlier `step`: count what came after `step` as wasted.

    `step` -1: the job starts again, with the evaluation before the first step. The costs of each step and evaluation are read
    from the metrics, so call this before they are deleted.
    """
    broken = None if job.checkpoint_id is None else session.get(Checkpoint, job.checkpoint_id)
    if broken is None or broken.step <= step:
        return
    query = select(Metric.attempt, Metric.name, func.sum(Metric.value)).group_by(Metric.attempt, Metric.name)
    covered = (Metric.step > step, Metric.step <= broken.step, Metric.attempt <= broken.attempt)
    for attempt, name, value in session.execute(query.where(Metric.job_id == job.id, Metric.name.in_(SPENT), *covered)):
        last = select(func.max(Usage.day)).where(Usage.job_id == job.id, Usage.attempt == attempt).scalar_subquery()
        row = update(Usage).where(Usage.job_id == job.id, Usage.attempt == attempt, Usage.day == last)
        column = getattr(Usage, SPENT[name])
        amount = float(value or 0) if name == STEP_S else int(value or 0)
        session.execute(row.values({SPENT[name]: column + amount}).execution_options(synchronize_session=False))


# ---------------------------------------------------------------- reading

GroupBy = Literal["day", "job", "key", "project"]
GROUPS: Mapping[str, Any] = {"day": Usage.day, "job": Usage.job_id, "key": Usage.key_id, "project": Usage.project}
# The number of attempts: one may have rows for several days, and number 0 is not an attempt.
ATTEMPTS = func.count(func.distinct(Usage.job_id + ":" + cast(func.nullif(Usage.attempt, 0), Usage.job_id.type)))
SUMS = (*TOKENS, *SECONDS, *(f"wasted_{name}" for name in AMOUNTS))
_PHASES = tuple(phase.value for phase in Phase)
_ADDED = (*SUMS, *(f"unsaved_{name}" for name in AMOUNTS), "steps", "queued_s")


def _putting(insert_: Callable[..., Any]) -> Any:
    table = table_of(Usage)
    statement = insert_(table)
    more = {name: table.c[name] + statement.excluded[name] for name in _ADDED}
    failure = func.coalesce(statement.excluded.failure, table.c.failure)
    return statement.on_conflict_do_update(index_elements=["job_id", "attempt", "day"], set_={**more, "failure": failure})


_PUT = for_both(_putting)
# Built once: to build such a statement takes longer than to run it. So does binding each 0.
_SUMS = tuple(func.coalesce(func.sum(getattr(Usage, name)), literal_column("0")) for name in SUMS)
_TOTAL = select(literal(None), ATTEMPTS, *_SUMS)
_OF_JOB = _TOTAL.where(Usage.job_id == bindparam("job_id"))
_WIDTH = len(_OF_JOB.selected_columns)
_SPENT = _OF_JOB.subquery("spent")
_SHOWN = SHOWN.add_columns(*_SPENT.c).join(_SPENT, true())  # one statement: a sum without groups is always one row
_BY_GROUP = {name: select(group, ATTEMPTS, *_SUMS).group_by(group).order_by(group) for name, group in GROUPS.items()}


@dataclass(frozen=True)
class Totals:
    """Sums over some rows of the ledger. The `wasted_` amounts are also contained in the others."""

    group: str | None
    attempts: int
    sampled_tokens: int
    trained_tokens: int
    phase_s: dict[str, float]
    wasted_sampled_tokens: int
    wasted_trained_tokens: int
    wasted_s: float

    @property
    def tokens(self) -> int:
        return self.sampled_tokens + self.trained_tokens

    @property
    def worker_s(self) -> float:
        return sum(self.phase_s.values())


NO_TOTALS = Totals(None, 0, 0, 0, dict.fromkeys(Phase, 0.0), 0, 0, 0.0)  # of a job that no worker has taken yet


def of_job(session: Session | Connection, job_id: str) -> Totals:
    return _totals(session.execute(_OF_JOB, {"job_id": job_id}))[0]


def shown(connection: Connection, project: str, job_id: str) -> tuple[Row[Any], Totals]:
    """A job of this project, as `jobs.SHOWN` has it, and what it has spent. Raises NotFound."""
    row = connection.execute(_SHOWN, {"job_id": job_id, "project": project}).first()
    if row is None:
        raise NotFound(lacking("job", job_id))
    return row, _totals([row[-_WIDTH:]])[0]


def of_jobs(session: Session, job_ids: Collection[str]) -> dict[str, tuple[int, float]]:
    """Tokens and seconds of a worker that each of these jobs has spent."""
    tokens = sum((func.sum(getattr(Usage, name)) for name in TOKENS[1:]), func.sum(getattr(Usage, TOKENS[0])))
    seconds = sum((func.sum(getattr(Usage, name)) for name in SECONDS[1:]), func.sum(getattr(Usage, SECONDS[0])))
    rows = session.execute(select(Usage.job_id, tokens, seconds).where(Usage.job_id.in_(list(job_ids))).group_by(Usage.job_id))
    return {job_id: (int(tokens), float(seconds)) for job_id, tokens, seconds in rows}


@dataclass(frozen=True)
class AttemptSums:
    """What one attempt spent, over all its days."""

    attempt: int
    steps: int
    sampled_tokens: int
    trained_tokens: int
    phase_s: dict[str, float]
    queued_s: float
    wasted_s: float
    failure: str | None


def attempts(session: Session, job_id: str) -> list[AttemptSums]:
    names = ("steps", *TOKENS, "queued_s", "wasted_s", *SECONDS)
    sums = (func.sum(getattr(Usage, name)) for name in names)
    query = select(Usage.attempt, func.max(Usage.failure), *sums).where(Usage.job_id == job_id).group_by(Usage.attempt)
    rows = []
    found: Any = session.execute(query.order_by(Usage.attempt))
    for attempt, failure, *values in found:
        of = dict(zip(names, values, strict=True))
        phase_s = {phase.value: round(float(of.pop(f"{phase}_s")), 3) for phase in Phase}
        rows.append(AttemptSums(attempt, phase_s=phase_s, failure=failure, **of))
    return rows


def report(
    session: Session | Connection,
    project: str | None,
    *,
    group_by: GroupBy | None = None,
    first_day: str | None = None,
    last_day: str | None = None,
    job_id: str | None = None,
    key_id: str | None = None,
) -> list[Totals]:
    """Sums of a project (None: of all): one for each group with rows; without `group_by` one in all. Days (YYYY-MM-DD, UTC)
    are inclusive."""
    where: list[ColumnElement[bool]] = [] if project is None else [Usage.project == project]
    if first_day is not None:
        where.append(Usage.day >= first_day)
    if last_day is not None:
        where.append(Usage.day <= last_day)
    if job_id is not None:
        where.append(Usage.job_id == job_id)
    if key_id is not None:
        where.append(Usage.key_id == key_id)
    return _totals(session.execute((_TOTAL if group_by is None else _BY_GROUP[group_by]).where(*where)))


def _totals(rows: Any) -> list[Totals]:
    totals = []
    for name, count, sampled, trained, *seconds, wasted_sampled, wasted_trained, wasted_s in rows:  # in the order of SUMS
        phase_s = dict(zip(_PHASES, map(float, seconds), strict=True))
        tokens = int(sampled), int(trained)
        totals.append(Totals(name, count, *tokens, phase_s, int(wasted_sampled), int(wasted_trained), float(wasted_s)))
    return totals


@dataclass(frozen=True)
class Whole:
    """Sums over the ledger of all projects. None of them ever decreases."""

    amounts: dict[str, float]  # by the names in SUMS, and steps, queued_s
    attempts: int
    failures: dict[str, int]  # by code: attempts that ended with it, and jobs that failed with it outside an attempt


def whole(session: Session) -> Whole:
    names = (*SUMS, "steps", "queued_s")
    sums = (func.sum(getattr(Usage, name)) for name in names)
    rows: Any = session.execute(select(Usage.failure, func.count(), *sums).group_by(Usage.failure)).all()
    amounts = {name: float(sum(row[2 + i] or 0 for row in rows)) for i, name in enumerate(names)}
    failures = {row[0]: row[1] for row in rows if row[0] is not None}
    return Whole(amounts, session.scalar(select(ATTEMPTS)) or 0, failures)


# ---------------------------------------------------------------- budgets


def is_spent(session: Session | Connection, job: Job | SmallJob) -> bool:
    """Whether the job's own budget, or its project's, is used up."""
    bounded = job.budget_tokens is not None or job.budget_worker_s is not None
    if bounded and _exceeds(of_job(session, job.id), job.budget_tokens, job.budget_worker_s):
        return True
    if isinstance(job, SmallJob):
        tokens, worker_s, since = job.project_tokens, job.project_worker_s, job.project_since
    else:
        found: Any = connection_of(session).execute(_BUDGET, {"of": job.project}).first()
        tokens, worker_s, since = found or (None, None, None)
    if tokens is None and worker_s is None:
        return False
    return _exceeds(report(session, job.project, first_day=since)[0], tokens, worker_s)


_BUDGET = select(*(table_of(Budget).c[name] for name in ("tokens", "worker_s", "since"))).where(
    table_of(Budget).c.project == bindparam("of")
)


def _exceeds(totals: Totals, tokens: int | None, worker_s: float | None) -> bool:
    return (tokens is not None and totals.tokens >= tokens) or (worker_s is not None and totals.worker_s >= worker_s)


def set_budget(
    session: Session, project: str, *, tokens: int | None, worker_s: float | None, since: str, now: datetime
) -> None:
    """Replace the project's budget. With neither tokens nor seconds there is no limit."""
    bounds = {"tokens": tokens, "worker_s": worker_s, "since": since, "updated_at": now}
    statement = insert(session, Budget).values(project=project, **bounds)
    session.execute(statement.on_conflict_do_update(index_elements=["project"], set_=bounds))
