"""Webhooks: where a project is told of what happens to its jobs."""

from collections.abc import Iterable

from ratchet_client.resources.base import Resource, given, part
from ratchet_client.types import Delivery, NewWebhook, Page, Webhook


class Webhooks(Resource):
    def create_webhook(self, url: str, *, events: Iterable[str] | None = None, description: str | None = None) -> NewWebhook:
        """A new webhook; its secret stands in this answer and nowhere else. By default it gets every type of event."""
        body = given(url=url, events=None if events is None else list(events), description=description)
        return self._transport.json("POST", "/v1/webhooks", json=body)

    def list_webhooks(self) -> Page[Webhook]:
        return self._get("/v1/webhooks")

    def get_webhook(self, webhook_id: str) -> Webhook:
        return self._get(f"/v1/webhooks/{part(webhook_id)}")

    def update_webhook(
        self,
        webhook_id: str,
        *,
        url: str | None = None,
        events: Iterable[str] | None = None,
        description: str | None = None,
        enabled: bool | None = None,
    ) -> Webhook:
        """Change what is given; the rest stays. `enabled=True` also ends a disablement after failures."""
        events = None if events is None else list(events)
        body = given(url=url, events=events, description=description, enabled=enabled)
        return self._transport.json("PATCH", f"/v1/webhooks/{part(webhook_id)}", json=body)

    def delete_webhook(self, webhook_id: str) -> None:
        self._transport.request("DELETE", f"/v1/webhooks/{part(webhook_id)}")

    def rotate_webhook_secret(self, webhook_id: str, *, grace_s: float | None = None) -> NewWebhook:
        """A new secret. For `grace_s` seconds (default: a day) the one before signs, too."""
        return self._transport.json("POST", f"/v1/webhooks/{part(webhook_id)}/rotate", json=given(grace_s=grace_s))

    def test_webhook(self, webhook_id: str) -> Delivery:
        """Send a `webhook.test`."""
        return self._transport.json("POST", f"/v1/webhooks/{part(webhook_id)}/test")

    def list_deliveries(
        self, webhook_id: str, *, status: str | None = None, after: str | None = None, limit: int = 20
    ) -> Page[Delivery]:
        """What was sent or waits to be, newest first. `status`: waiting, delivered or failed."""
        params = given(status=status, after=after, limit=limit)
        return self._get(f"/v1/webhooks/{part(webhook_id)}/deliveries", params)

    def get_delivery(self, webhook_id: str, delivery_id: str) -> Delivery:
        return self._get(f"/v1/webhooks/{part(webhook_id)}/deliveries/{part(delivery_id)}")

    def redeliver(self, webhook_id: str, delivery_id: str) -> Delivery:
        """Send a delivery again, with the same id."""
        path = f"/v1/webhooks/{part(webhook_id)}/deliveries/{part(delivery_id)}/redeliver"
        return self._transport.json("POST", path)
