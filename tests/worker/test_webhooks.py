"""What the process in which jobs run tells webhooks of is sent at once."""

import asyncio
from ipaddress import ip_network
from threading import Event
from typing import Any

import pytest

from job_specs import rl_spec
from service.doorbell import Signals
from service.store import webhooks
from service.webhooks import courier as couriers
from service.webhooks.courier import Courier
from webhook_receiver import receiving


def test_the_end_of_a_job_in_a_workers_child_rings_the_courier(stack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The courier looks by itself once an hour, so what comes sooner was rung for. Only the child tells of this event."""
    monkeypatch.setattr(couriers, "EVERY_S", 3600.0)
    settings = stack.settings.model_copy(update={"webhook_networks": (ip_network("127.0.0.0/8"),)})
    looked, claim = Event(), Courier._claim
    monkeypatch.setattr(Courier, "_claim", lambda *given: (claim(*given), looked.set())[0])

    async def run() -> None:
        await signals.start()
        while not signals.connected:
            await asyncio.sleep(0.01)
        listening = asyncio.create_task(courier.listen(signals))
        await asyncio.sleep(0)  # it watches
        courier.start()
        await asyncio.to_thread(looked.wait)  # into an empty outbox
        await asyncio.to_thread(end_a_job)
        listening.cancel()
        await signals.stop()

    def end_a_job() -> None:
        stack.start_worker()
        job = stack.submit(rl_spec(limits={"max_steps": 1}))
        stack.succeeded(job.id)
        receiver.wait_for(1, within_s=60)
        (told,) = receiver.verified(hook.secret)
        assert (told["type"], told["data"]["job_id"]) == ("job.succeeded", job.id)

    courier, signals = Courier(stack.store, settings), Signals(settings)
    with receiving() as receiver:
        with stack.store.begin() as session:
            hook = webhooks.create(
                session, project="default", url=receiver.url, description="", events=["job.succeeded"], now=stack.store.now()
            )
        try:
            asyncio.run(run())
        finally:
            courier.stop()
