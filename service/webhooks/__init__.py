"""Webhooks by Standard Webhooks: signatures, and the thread that delivers. The outbox is `service.store.webhooks`."""
