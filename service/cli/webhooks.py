"""Commands about webhooks and what was delivered to them."""

from enum import StrEnum
from typing import Annotated

import typer

from service.cli.completion import complete_webhook
from service.cli.connection import connect
from service.cli.helps import group
from service.cli.jobs import Json
from service.cli.output import ago, clean, complain, print_facts, print_json, print_table, say
from service.cli.resources import After, Limit

WebhookId = Annotated[str, typer.Argument(metavar="WEBHOOK", help="whk_...", autocompletion=complete_webhook)]
DeliveryId = Annotated[str, typer.Argument(metavar="DELIVERY", help="msg_...")]
Events = Annotated[
    list[str] | None, typer.Option("--event", metavar="TYPE", help="a type of event, such as job.succeeded; may be repeated")
]


class DeliveryStatus(StrEnum):
    waiting = "waiting"
    delivered = "delivered"
    failed = "failed"


def register(app: typer.Typer) -> None:
    group(
        app,
        "webhooks",
        list_webhooks,
        create=create,
        show=show,
        update=update,
        delete=delete,
        rotate=rotate,
        test=test,
        deliveries=deliveries,
        redeliver=redeliver,
    )


def list_webhooks(context: typer.Context, as_json: Json = False) -> None:
    """List, make and change webhooks, and look at their deliveries.

    $ ratchet webhooks create https://example.com/hook --event job.succeeded --event job.failed
    $ ratchet webhooks deliveries whk_01k... --status failed
    $ ratchet webhooks redeliver whk_01k... msg_01k...
    """
    if context.invoked_subcommand is not None:
        return
    with connect(context) as ratchet:
        page = ratchet.list_webhooks()
    if as_json:
        print_json(page)
        return
    rows = [(hook["id"], hook["url"], _state(hook), len(hook["events"]), ago(hook["created_at"])) for hook in page["data"]]
    print_table(("webhook", "url", "state", "events", "created"), rows, nothing="no webhooks")


def _state(hook: object) -> str:
    assert isinstance(hook, dict)
    if not hook["enabled"]:
        return f"disabled: {hook['disabled_reason']}"
    return f"failing since {hook['failing_since'][:16]}" if hook["failing_since"] else "enabled"


def create(
    context: typer.Context,
    url: Annotated[str, typer.Argument(help="where deliveries are posted")],
    event: Events = None,
    description: Annotated[str | None, typer.Option(help="what it is for")] = None,
    as_json: Json = False,
) -> None:
    """Make a webhook and print its secret, which is shown only once. Without --event it gets every type."""
    with connect(context) as ratchet:
        hook = ratchet.create_webhook(url, events=event, description=description)
    if as_json:
        print_json(hook)
        return
    print(hook["secret"])
    complain(f"this is the only time that the secret of {hook['id']} can be read; it verifies the signatures")


def show(context: typer.Context, webhook_id: WebhookId, as_json: Json = False) -> None:
    """Show one webhook."""
    with connect(context) as ratchet:
        hook = ratchet.get_webhook(webhook_id)
    if as_json:
        print_json(hook)
    else:
        print_facts({name: value for name, value in hook.items() if name != "object"})


def update(
    context: typer.Context,
    webhook_id: WebhookId,
    url: Annotated[str | None, typer.Option(help="the new URL")] = None,
    event: Events = None,
    description: Annotated[str | None, typer.Option(help="what it is for")] = None,
    enabled: Annotated[
        bool | None, typer.Option("--enable/--disable", help="whether anything is sent; --enable also after failures")
    ] = None,
) -> None:
    """Change a webhook; what is not given stays."""
    with connect(context) as ratchet:
        hook = ratchet.update_webhook(webhook_id, url=url, events=event, description=description, enabled=enabled)
    say(f"{webhook_id}: {clean(_state(hook))}")


def delete(context: typer.Context, webhook_id: WebhookId) -> None:
    """Delete a webhook and its deliveries."""
    with connect(context) as ratchet:
        ratchet.delete_webhook(webhook_id)
    say(f"{webhook_id} deleted")


def rotate(
    context: typer.Context,
    webhook_id: WebhookId,
    grace_s: Annotated[float, typer.Option(min=0, help="seconds for which the secret before signs, too")] = 86_400.0,
) -> None:
    """Give a webhook a new secret and print it."""
    with connect(context) as ratchet:
        hook = ratchet.rotate_webhook_secret(webhook_id, grace_s=grace_s)
    print(hook["secret"])
    complain(f"the secret before signs, too, until {hook['previous_secret_until']}")


def test(context: typer.Context, webhook_id: WebhookId) -> None:
    """Send a `webhook.test`."""
    with connect(context) as ratchet:
        delivery = ratchet.test_webhook(webhook_id)
    say(f"{delivery['id']} waits; ratchet webhooks deliveries {clean(webhook_id)} shows what became of it")


def deliveries(
    context: typer.Context,
    webhook_id: WebhookId,
    status: Annotated[DeliveryStatus | None, typer.Option(help="only these")] = None,
    limit: Limit = 20,
    after: After = None,
    as_json: Json = False,
) -> None:
    """List what was sent to a webhook, or waits to be."""
    with connect(context) as ratchet:
        page = ratchet.list_deliveries(webhook_id, status=status and status.value, after=after, limit=limit)
    if as_json:
        print_json(page)
        return
    rows = [
        (
            one["id"],
            one["type"],
            one["job_id"] or "",
            one["status"],
            one["attempts"],
            one["response_status"] or "",
            one["error"] or "",
            (one["next_try_at"] or "")[:19],
            ago(one["created_at"]),
        )
        for one in page["data"]
    ]
    columns = ("delivery", "type", "job", "status", "attempts", "answer", "error", "next try", "created")
    print_table(columns, rows, nothing="no deliveries")
    if page["has_more"]:
        complain(f"more: ratchet webhooks deliveries {clean(webhook_id)} --after {page['last_id']}")


def redeliver(context: typer.Context, webhook_id: WebhookId, delivery_id: DeliveryId) -> None:
    """Send a delivery again, with the same id."""
    with connect(context) as ratchet:
        delivery = ratchet.redeliver(webhook_id, delivery_id)
    say(f"{delivery['id']} waits to be sent again")
