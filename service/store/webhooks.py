"""Webhooks and their outbox. A delivery is written in the transaction of its event, so none is lost and none is invented."""

from base64 import b64encode
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from secrets import token_bytes
from types import MappingProxyType
from typing import Any

from sqlalchemy import ColumnElement, Connection, bindparam, delete, func, or_, select, update
from sqlalchemy.orm import Session

from service.errors import Conflict, NotFound
from service.ids import lacking, new_id
from service.states import Status
from service.store.dialect import connection_of, table_of
from service.store.paging import newest_first
from service.store.session import DELIVERIES
from service.store.tables import AliasChange, Job, Webhook, WebhookDelivery
from service.store.values import dumps

# By the type of a job's event: what a webhook calls it. `status_changed` is called as the new status.
_OF_EVENTS = MappingProxyType(
    {
        "created": "job.created",
        "checkpoint_saved": "job.checkpoint_saved",
        "evaluation": "job.evaluation",
        "failure": "job.failure",
        "warning": "job.warning",
        "step_skipped": "job.step_skipped",
        "reward_errors": "job.reward_errors",
    }
)
_OF_STATUSES = tuple(f"job.{status.value}" for status in Status if status is not Status.VALIDATING)
_OF_ALIASES = MappingProxyType({"promote": "alias.promoted", "rollback": "alias.rolled_back", "delete": "alias.deleted"})
DISABLED, TEST = "webhook.disabled", "webhook.test"  # a test goes to the webhook that asked for it, whatever it subscribed to
EVENTS = (*_OF_EVENTS.values(), *_OF_STATUSES, *_OF_ALIASES.values(), DISABLED)

MOST = 20  # webhooks of one project
MAX_ATTEMPTS = 16
CLAIM = timedelta(seconds=60)  # far longer than an attempt takes: then its sender is dead, and another one tries
FIRST_PAUSE_S, GROWTH, LONGEST_PAUSE_S = 5.0, 3.0, 6 * 3600.0
KEPT_FOR = timedelta(days=14)  # deliveries that are done, and those that were given up
EXPIRED_AT_ONCE = 1000


def new_secret() -> str:
    return "whsec_" + b64encode(token_bytes(32)).decode()


def type_of(event: str, data: dict[str, Any]) -> str | None:
    """What webhooks call this event of a job; None if they are not told of it."""
    if event == "queued":
        return f"job.{Status.QUEUED.value}"
    return f"job.{data['to']}" if event == "status_changed" else _OF_EVENTS.get(event)


# ---------------------------------------------------------------- the outbox


def tell(
    session: Session | Connection,
    project: str,
    job_id: str,
    first: int,
    events: Sequence[tuple[str, dict[str, Any]]],
    now: datetime,
) -> None:
    """Write a delivery for each webhook of the project that wants one of these events, numbered from `first`."""
    told = [(type_, first + i, event, data) for i, (event, data) in enumerate(events) if (type_ := type_of(event, data))]
    if not told or not (hooks := _listening(connection_of(session), project)):
        return
    if isinstance(session, Session):
        _tell(session, hooks, project, job_id, told, now)
        return
    with Session(session) as joined:  # the connection's transaction, which it does not end
        _tell(joined, hooks, project, job_id, told, now)


def _tell(
    session: Session,
    hooks: Sequence[Any],
    project: str,
    job_id: str,
    told: Sequence[tuple[str, int, str, dict[str, Any]]],
    now: datetime,
) -> None:
    job = session.execute(select(Job.name, Job.kind, Job.user_metadata, Job.tags).where(Job.id == job_id)).one()
    about = {"job_id": job_id, "name": job.name, "kind": job.kind, "tags": job.tags, "metadata": job.user_metadata}
    for type_, seq, event, data in told:
        content = about | {"seq": seq, "event": event, "details": data}
        _send(session, [hook for hook in hooks if type_ in hook.events], project, type_, content, now)


def tell_of_alias(session: Session, change: AliasChange, job_id: str | None) -> None:
    """Write a delivery for each webhook of the project that wants it. `job_id`: whose checkpoint the alias points at now."""
    type_ = _OF_ALIASES[change.action]
    hooks = [hook for hook in _listening(connection_of(session), change.project) if type_ in hook.events]
    names = ("alias", "seq", "checkpoint_id", "from_checkpoint_id", "note", "key_id")
    content = {name: getattr(change, name) for name in names} | {"job_id": job_id}
    _send(session, hooks, change.project, type_, content, change.created_at)


def test(session: Session, hook: Webhook, now: datetime) -> WebhookDelivery:
    """A delivery that says nothing but that deliveries arrive."""
    return _send(session, [hook], hook.project, TEST, {"webhook_id": hook.id}, now)[0]


def _listening(connection: Connection, project: str) -> Sequence[Any]:
    """Rows with id and events of the project's webhooks that are not disabled. None can be deleted until this transaction ends:
    deliveries name them."""
    return connection.execute(_LISTENING, {"project": project}).all()


_WEBHOOKS = table_of(Webhook)
_LISTENING = (
    select(_WEBHOOKS.c.id, _WEBHOOKS.c.events)  # built once: every event asks
    .where(_WEBHOOKS.c.project == bindparam("project"), _WEBHOOKS.c.disabled_at.is_(None))
    .order_by(_WEBHOOKS.c.id)
    .with_for_update(read=True, key_share=True)
)


def _send(
    session: Session, hooks: Sequence[Any], project: str, type_: str, content: dict[str, Any], now: datetime
) -> list[WebhookDelivery]:
    body = dumps({"type": type_, "timestamp": now.isoformat(timespec="milliseconds").replace("+00:00", "Z"), "data": content})
    rows = [
        WebhookDelivery(
            id=new_id("msg"),
            webhook_id=hook.id,
            project=project,
            type=type_,
            job_id=content.get("job_id"),
            body=body,
            status="waiting",
            attempts=0,
            last_attempt=MAX_ATTEMPTS,
            next_try_at=now,
            created_at=now,
        )
        for hook in hooks
    ]
    session.add_all(rows)
    session.flush()
    if rows:
        session.connection().info[DELIVERIES] = True
    return rows


# ---------------------------------------------------------------- sending


@dataclass(frozen=True)
class Claimed:
    """One attempt to send a delivery: the right of who claimed it, until the claim ends."""

    id: str
    webhook_id: str
    attempt: int
    left: int  # attempts after this one
    body: str
    url: str
    secrets: tuple[str, ...]  # the newest first


def next_due(session: Session) -> datetime | None:
    """When the first of those that wait is due, or was; None if none waits."""
    return session.scalar(select(func.min(WebhookDelivery.next_try_at)).where(WebhookDelivery.status == "waiting"))


def claim(
    session: Session, now: datetime, *, limit: int, per_webhook: int, busy: Collection[str] = frozenset()
) -> list[Claimed]:
    """Claim deliveries whose time has come, at most `per_webhook` of each webhook, and none of the webhooks in `busy`.

    Of several callers at once each gets others.
    """
    place = func.row_number().over(
        partition_by=WebhookDelivery.webhook_id, order_by=(WebhookDelivery.next_try_at, WebhookDelivery.id)
    )
    ranked = select(WebhookDelivery.id, place.label("place"))
    ranked = ranked.where(*_due(now), WebhookDelivery.webhook_id.not_in(list(busy))).subquery()
    first = select(ranked.c.id).where(ranked.c.place <= per_webhook)
    due = select(WebhookDelivery.id).where(WebhookDelivery.id.in_(first), *_due(now))
    due = due.order_by(WebhookDelivery.next_try_at, WebhookDelivery.id).limit(limit)
    ids = list(session.scalars(due.with_for_update(skip_locked=True)))
    if not ids:
        return []
    columns = (WebhookDelivery.id, WebhookDelivery.webhook_id, WebhookDelivery.attempts, WebhookDelivery.last_attempt)
    taken = update(WebhookDelivery).where(WebhookDelivery.id.in_(ids))
    taken = taken.values(attempts=WebhookDelivery.attempts + 1, next_try_at=now + CLAIM, last_tried_at=now)
    rows = session.execute(
        taken.returning(*columns, WebhookDelivery.body), execution_options={"synchronize_session": False}
    ).all()
    hooks = {hook.id: hook for hook in session.scalars(select(Webhook).where(Webhook.id.in_({row.webhook_id for row in rows})))}
    return [
        Claimed(row.id, row.webhook_id, row.attempts, row.last_attempt - row.attempts, row.body, hook.url, _secrets(hook, now))
        for row in rows
        if (hook := hooks.get(row.webhook_id)) is not None
    ]


def delivered(session: Session, claimed: Claimed, response_status: int, now: datetime) -> bool:
    """Note that it arrived. False if another attempt has taken over: then nothing is written."""
    said = {"status": "delivered", "delivered_at": now, "response_status": response_status, "error": None}
    if not _conclude(session, claimed, said):
        return False
    healthy = update(Webhook).where(Webhook.id == claimed.webhook_id, Webhook.failing_since.is_not(None))
    session.execute(healthy.values(failing_since=None), execution_options={"synchronize_session": False})
    return True


def failed(
    session: Session, claimed: Claimed, response_status: int | None, error: str, next_try_at: datetime | None, now: datetime
) -> bool:
    """Note that the attempt failed; `next_try_at` None: it is given up. False if another attempt has taken over."""
    said: dict[str, Any] = {"response_status": response_status, "error": error}
    said |= {"status": "failed"} if next_try_at is None else {"next_try_at": next_try_at}
    if not _conclude(session, claimed, said):
        return False
    first = update(Webhook).where(Webhook.id == claimed.webhook_id, Webhook.failing_since.is_(None))
    session.execute(first.values(failing_since=now), execution_options={"synchronize_session": False})
    return True


def disable(session: Session, webhook_id: str, reason: str, now: datetime, *, failing_since: datetime | None = None) -> bool:
    """Disable a webhook, give up what waits for it, and tell the project's other webhooks. False if there was nothing to do.

    With `failing_since` only a webhook that has failed since then or longer.
    """
    which: list[ColumnElement[bool]] = [Webhook.id == webhook_id, Webhook.disabled_at.is_(None)]
    if failing_since is not None:
        which.append(Webhook.failing_since <= failing_since)
    off = update(Webhook).where(*which).values(disabled_at=now, disabled_reason=reason)
    project = session.scalar(off.returning(Webhook.project), execution_options={"synchronize_session": False})
    if project is None:
        return False
    given_up = update(WebhookDelivery).where(WebhookDelivery.webhook_id == webhook_id, WebhookDelivery.status == "waiting")
    session.execute(
        given_up.values(status="failed", error="the webhook was disabled"), execution_options={"synchronize_session": False}
    )
    others = [hook for hook in _listening(connection_of(session), project) if DISABLED in hook.events]
    _send(session, others, project, DISABLED, {"webhook_id": webhook_id, "reason": reason}, now)
    return True


def _conclude(session: Session, claimed: Claimed, values: dict[str, Any]) -> bool:
    """Write what came of an attempt. It locks the webhook first, as all do that lock both."""
    session.execute(select(Webhook.id).where(Webhook.id == claimed.webhook_id).with_for_update(key_share=True))
    mine = (
        WebhookDelivery.id == claimed.id,
        WebhookDelivery.attempts == claimed.attempt,
        WebhookDelivery.status == "waiting",
    )
    written = update(WebhookDelivery).where(*mine).values(**values).returning(WebhookDelivery.id)
    return session.scalar(written, execution_options={"synchronize_session": False}) is not None


def _due(now: datetime) -> tuple[ColumnElement[bool], ...]:
    return WebhookDelivery.status == "waiting", WebhookDelivery.next_try_at <= now


def _secrets(hook: Webhook, now: datetime) -> tuple[str, ...]:
    still = hook.previous_secret is not None and hook.previous_until is not None and hook.previous_until > now
    return (hook.secret, hook.previous_secret) if still and hook.previous_secret else (hook.secret,)


# ---------------------------------------------------------------- what its owner asks


def create(session: Session, *, project: str, url: str, description: str, events: Collection[str], now: datetime) -> Webhook:
    """A new webhook. Raises Conflict if the project has MOST of them."""
    if len(page(session, project)) >= MOST:
        raise Conflict(f"a project has at most {MOST} webhooks; delete one first", code="too_many_webhooks")
    hook = Webhook(
        id=new_id("whk"),
        project=project,
        url=url,
        description=description,
        events=list(events),
        secret=new_secret(),
        created_at=now,
    )
    session.add(hook)
    session.flush()
    return hook


def page(session: Session, project: str) -> list[Webhook]:
    """All webhooks of the project, newest first."""
    query = select(Webhook).where(Webhook.project == project)
    return list(session.scalars(query.order_by(Webhook.created_at.desc(), Webhook.id.desc())))


def get(session: Session, project: str, webhook_id: str, *, lock: bool = False) -> Webhook:
    """A webhook of this project. Raises NotFound. `lock`: nobody else changes it until this transaction ends."""
    query = select(Webhook).where(Webhook.id == webhook_id, Webhook.project == project)
    if lock:
        query = query.with_for_update(key_share=True)
    hook = session.scalar(query.execution_options(populate_existing=True))
    if hook is None:
        raise NotFound(lacking("webhook", webhook_id))
    return hook


def rotate(session: Session, hook: Webhook, until: datetime) -> None:
    """Give it a new secret. Until `until` the one before signs, too."""
    hook.previous_secret, hook.previous_until, hook.secret = hook.secret, until, new_secret()
    session.flush()


def remove(session: Session, project: str, webhook_id: str) -> None:
    """Delete it with its deliveries. Raises NotFound."""
    gone = delete(Webhook).where(Webhook.id == webhook_id, Webhook.project == project).returning(Webhook.id)
    if session.scalar(gone, execution_options={"synchronize_session": False}) is None:
        raise NotFound(lacking("webhook", webhook_id))


def deliveries(
    session: Session, project: str, webhook_id: str, *, status: str | None, after: str | None, limit: int
) -> tuple[list[WebhookDelivery], bool]:
    """Newest first. Returns the rows and whether there are more. Raises NotFound, InvalidRequest (cursor)."""
    get(session, project, webhook_id)
    query = select(WebhookDelivery).where(WebhookDelivery.webhook_id == webhook_id)
    if status is not None:
        query = query.where(WebhookDelivery.status == status)
    made, id_ = WebhookDelivery.created_at, WebhookDelivery.id
    return newest_first(session, query, project, made, id_, after=after, limit=limit)


def delivery(session: Session, project: str, webhook_id: str, delivery_id: str) -> WebhookDelivery:
    """One delivery. Raises NotFound."""
    get(session, project, webhook_id)
    query = select(WebhookDelivery).where(WebhookDelivery.id == delivery_id, WebhookDelivery.webhook_id == webhook_id)
    row = session.scalar(query.execution_options(populate_existing=True))
    if row is None:
        raise NotFound(f"no delivery {delivery_id} of webhook {webhook_id}")
    return row


def redeliver(session: Session, hook: Webhook, delivery_id: str, now: datetime) -> WebhookDelivery:
    """Send it again, with the same id, whatever became of it. Raises NotFound; Conflict if the webhook is disabled."""
    if hook.disabled_at is not None:
        raise Conflict(f"webhook {hook.id} is disabled; enable it first (PATCH enabled: true)", code="webhook_disabled")
    delivery(session, hook.project, hook.id, delivery_id)
    again = update(WebhookDelivery).where(WebhookDelivery.id == delivery_id)
    again = again.values(status="waiting", next_try_at=now, last_attempt=WebhookDelivery.attempts + MAX_ATTEMPTS)
    session.execute(again, execution_options={"synchronize_session": False})
    session.connection().info[DELIVERIES] = True
    return delivery(session, hook.project, hook.id, delivery_id)


def expire(session: Session, now: datetime) -> None:
    """Delete old deliveries that wait no longer, so many at a time."""
    done = or_(WebhookDelivery.status == "delivered", WebhookDelivery.status == "failed")
    old = select(WebhookDelivery.id).where(WebhookDelivery.created_at < now - KEPT_FOR, done).limit(EXPIRED_AT_ONCE)
    session.execute(
        delete(WebhookDelivery).where(WebhookDelivery.id.in_(old)), execution_options={"synchronize_session": False}
    )


def count_waiting(session: Session) -> int:
    return session.scalar(select(func.count()).where(WebhookDelivery.status == "waiting")) or 0
