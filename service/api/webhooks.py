"""Webhooks of a project: where it is told of what happens to its jobs (docs/webhooks.md)."""

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from fastapi import Query, Response
from pydantic import BaseModel, Field, field_validator

from service.edge.auth import CallerDep
from service.edge.bodies import DocumentDep, OptionalDocumentDep, documented
from service.edge.context import Context, ContextDep
from service.edge.idempotency import IdempotencyKeyDep, once
from service.edge.pages import Page, PageQuery
from service.edge.problems import BODY, responses
from service.edge.router import Router
from service.errors import Conflict, FieldError
from service.spec.addresses import host_of, names_user, refusal
from service.spec.section import Section
from service.store import webhooks
from service.store.tables import Webhook, WebhookDelivery
from service.validation import invalid, parse
from service.webhooks.courier import NETWORKS

router = Router(prefix="/v1/webhooks", tags=["webhooks"])

if TYPE_CHECKING:
    EventName = str
else:
    EventName = Literal[webhooks.EVENTS]
Url = Annotated[
    str,
    Field(pattern=r"^https?://[^\s]+$", max_length=2048, description="where deliveries are posted"),
]
Events = Annotated[
    list[EventName], Field(min_length=1, max_length=len(webhooks.EVENTS), description="the types that it gets; default: all")
]
Description = Annotated[str, Field(max_length=500, description="for people")]
MAX_GRACE_S = 7 * 86_400


class _WithUrl(Section):
    @field_validator("url", check_fields=False)
    @classmethod
    def names_a_host(cls, value: str | None) -> str | None:
        if value is not None:
            host_of(value)
            if names_user(value):
                raise ValueError("a URL with a user name or password would be shown; deliveries are signed instead")
        return value


class WebhookRequest(_WithUrl):
    """A webhook to create."""

    url: Url
    events: Events = list(webhooks.EVENTS)  # noqa: RUF012 (pydantic copies it)
    description: Description = ""


class WebhookChange(_WithUrl):
    """What of a webhook to change; the rest stays."""

    url: Url | None = None
    events: Events | None = None
    description: Description | None = None
    enabled: Annotated[bool | None, Field(description="false: nothing is sent or kept for it; true: from now on again")] = None


class RotateRequest(Section):
    """How to change the secret."""

    grace_s: Annotated[
        float, Field(ge=0, le=MAX_GRACE_S, description="for so long deliveries are signed with the secret before, too")
    ] = 86_400.0


class WebhookView(BaseModel):
    """A webhook, without its secret."""

    id: str
    object: Literal["webhook"] = "webhook"
    url: str
    description: str
    events: list[str]
    enabled: bool
    disabled_at: datetime | None
    disabled_reason: Annotated[str | None, Field(description="why nothing is sent to it")]
    failing_since: Annotated[datetime | None, Field(description="when the first of the attempts failed that have failed since")]
    previous_secret_until: Annotated[datetime | None, Field(description="until then the secret before signs, too")]
    created_at: datetime

    @classmethod
    def of(cls, hook: Webhook) -> Self:
        names = ("id", "url", "description", "events", "disabled_at", "disabled_reason", "failing_since", "created_at")
        columns = {name: getattr(hook, name) for name in names}
        return cls(**columns, enabled=hook.disabled_at is None, previous_secret_until=hook.previous_until)


class NewWebhookView(WebhookView):
    """A webhook with the secret that it was just given."""

    secret: Annotated[str | None, Field(description="verifies the signatures (whsec_...); shown this once")] = None


class WebhookPage(Page[WebhookView]):
    pass


DeliveryStatus = Literal["waiting", "delivered", "failed"]


class DeliverySummary(BaseModel):
    """One event for one webhook, and how far it came."""

    id: Annotated[str, Field(description="the header webhook-id, the same in every attempt")]
    object: Literal["webhook.delivery"] = "webhook.delivery"
    webhook_id: str
    type: str
    job_id: str | None
    status: DeliveryStatus
    attempts: int
    response_status: Annotated[int | None, Field(description="of the last attempt; null: there was no answer")]
    error: Annotated[str | None, Field(description="of the last attempt")]
    next_try_at: Annotated[datetime | None, Field(description="null: it is not tried again by itself")]
    last_tried_at: datetime | None
    created_at: datetime
    delivered_at: datetime | None

    @classmethod
    def of(cls, row: WebhookDelivery, **more: Any) -> Self:
        names = [name for name in DeliverySummary.model_fields if name not in ("object", "next_try_at")]
        next_try_at = row.next_try_at if row.status == "waiting" else None
        return cls(**{name: getattr(row, name) for name in names}, next_try_at=next_try_at, **more)


class DeliveryView(DeliverySummary):
    """A delivery with what is sent."""

    body: Annotated[str, Field(description="what is sent, to the byte")]


class DeliveryPage(Page[DeliverySummary]):
    pass


class DeliveriesQuery(PageQuery):
    status: Annotated[DeliveryStatus | None, Field(description="only these")] = None


@router.post("", status_code=201, responses=responses(409, *BODY), openapi_extra=documented("WebhookRequest"))
def create_webhook(
    context: ContextDep, caller: CallerDep, document: DocumentDep, idempotency_key: IdempotencyKeyDep
) -> NewWebhookView:
    """Create a webhook. Only this answer has its secret: repeated with the same Idempotency-Key, the request gets a 409."""
    request = parse(WebhookRequest, document.data)
    _check_address(context, request.url)
    with once(context.store, caller, idempotency_key, route="POST /v1/webhooks", body_sha256=document.sha256) as turn:
        if turn.replay is not None:
            raise Conflict(
                "a webhook was made by the first request with this Idempotency-Key, and its secret was shown then",
                code="secret_shown_once",
                hint="POST /v1/webhooks/{webhook_id}/rotate gives it another secret",
            )
        with context.store.begin() as session:
            hook = webhooks.create(
                session,
                project=caller.project,
                url=request.url,
                description=request.description,
                events=request.events,
                now=context.store.now(),
            )
            turn.complete(session, WebhookView.of(hook))
    return _with_secret(hook)


@router.get("")
def list_webhooks(context: ContextDep, caller: CallerDep) -> WebhookPage:
    """All webhooks of the project, newest first."""
    with context.store.begin(readonly=True) as session:
        rows = webhooks.page(session, caller.project)
    return WebhookPage.of([WebhookView.of(row) for row in rows], [row.id for row in rows])


@router.get("/{webhook_id}", responses=responses(404))
def read_webhook(context: ContextDep, caller: CallerDep, webhook_id: str) -> WebhookView:
    with context.store.begin(readonly=True) as session:
        return WebhookView.of(webhooks.get(session, caller.project, webhook_id))


@router.patch("/{webhook_id}", responses=responses(404, 409, *BODY), openapi_extra=documented("WebhookChange"))
def change_webhook(context: ContextDep, caller: CallerDep, webhook_id: str, document: DocumentDep) -> WebhookView:
    """Change a webhook. What is already waiting goes to the new URL."""
    request = parse(WebhookChange, document.data)
    if request.url is not None:
        _check_address(context, request.url)
    now = context.store.now()
    with context.store.begin() as session:
        hook = webhooks.get(session, caller.project, webhook_id, lock=True)
        for name in ("url", "events", "description"):
            if (value := getattr(request, name)) is not None:
                setattr(hook, name, value)
        if request.enabled:
            hook.disabled_at = hook.disabled_reason = hook.failing_since = None
        session.flush()
        if request.enabled is False:
            webhooks.disable(session, webhook_id, "its owner disabled it", now)
            session.refresh(hook)
    return WebhookView.of(hook)


@router.delete("/{webhook_id}", status_code=204, response_class=Response, responses=responses(404))
def delete_webhook(context: ContextDep, caller: CallerDep, webhook_id: str) -> None:
    """Delete a webhook and its deliveries."""
    with context.store.begin() as session:
        webhooks.remove(session, caller.project, webhook_id)


@router.post("/{webhook_id}/rotate", responses=responses(404, *BODY), openapi_extra=documented("RotateRequest", required=False))
def rotate_secret(context: ContextDep, caller: CallerDep, webhook_id: str, document: OptionalDocumentDep) -> NewWebhookView:
    """Give a webhook a new secret. For `grace_s` each delivery is signed with both, so that no receiver misses one."""
    request = parse(RotateRequest, document.data)
    until = context.store.now() + timedelta(seconds=request.grace_s)
    with context.store.begin() as session:
        hook = webhooks.get(session, caller.project, webhook_id, lock=True)
        webhooks.rotate(session, hook, until)
    return _with_secret(hook)


@router.post("/{webhook_id}/test", status_code=202, responses=responses(404, 409))
def test_webhook(context: ContextDep, caller: CallerDep, webhook_id: str) -> DeliveryView:
    """Send a `webhook.test`, whatever the webhook subscribed to."""
    now = context.store.now()
    with context.store.begin() as session:
        hook = webhooks.get(session, caller.project, webhook_id, lock=True)
        if hook.disabled_at is not None:
            raise Conflict(f"webhook {hook.id} is disabled; enable it first (PATCH enabled: true)", code="webhook_disabled")
        row = webhooks.test(session, hook, now)
    return DeliveryView.of(row, body=row.body)


@router.get("/{webhook_id}/deliveries", responses=responses(404))
def list_deliveries(
    context: ContextDep, caller: CallerDep, webhook_id: str, query: Annotated[DeliveriesQuery, Query()]
) -> DeliveryPage:
    """What was sent to a webhook or waits to be, newest first. Deliveries are kept for 14 days."""
    with context.store.begin(readonly=True) as session:
        rows, more = webhooks.deliveries(
            session, caller.project, webhook_id, status=query.status, after=query.after, limit=query.limit
        )
    return DeliveryPage.of([DeliverySummary.of(row) for row in rows], [row.id for row in rows], more)


@router.get("/{webhook_id}/deliveries/{delivery_id}", responses=responses(404))
def read_delivery(context: ContextDep, caller: CallerDep, webhook_id: str, delivery_id: str) -> DeliveryView:
    with context.store.begin(readonly=True) as session:
        row = webhooks.delivery(session, caller.project, webhook_id, delivery_id)
    return DeliveryView.of(row, body=row.body)


@router.post("/{webhook_id}/deliveries/{delivery_id}/redeliver", status_code=202, responses=responses(404, 409))
def redeliver(context: ContextDep, caller: CallerDep, webhook_id: str, delivery_id: str) -> DeliveryView:
    """Send a delivery again, with the same id, whatever became of it."""
    now = context.store.now()
    with context.store.begin() as session:
        hook = webhooks.get(session, caller.project, webhook_id, lock=True)
        row = webhooks.redeliver(session, hook, delivery_id, now)
    return DeliveryView.of(row, body=row.body)


def _check_address(context: Context, url: str) -> None:
    """Refuse a forbidden address at once."""
    if why := refusal(url, context.settings.webhook_networks, NETWORKS):
        raise invalid([FieldError("/url", why, "address_refused")])


def _with_secret(hook: Webhook) -> NewWebhookView:
    return NewWebhookView(**WebhookView.of(hook).model_dump(), secret=hook.secret)
