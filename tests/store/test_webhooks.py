"""The outbox of webhooks and the courier, on both databases, with a receiver on a real socket."""

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from ipaddress import ip_network
from threading import Barrier, Thread
from time import monotonic, sleep
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy import select
from sqlalchemy.orm import Session
from standardwebhooks.webhooks import Webhook as Verifier
from standardwebhooks.webhooks import WebhookVerificationError

from service.doorbell import Doorbell, Signals
from service.errors import Conflict
from service.ids import utcnow
from service.jobs import lease as leases
from service.jobs import lifecycle
from service.jobs.lease import Lease
from service.settings import Settings
from service.store import events, webhooks
from service.store.session import Store
from service.store.tables import Event, Job, Webhook, WebhookDelivery
from service.store.webhooks import CLAIM, DISABLED, EVENTS, KEPT_FOR, MAX_ATTEMPTS, MOST, Claimed
from service.webhooks import courier as couriers
from service.webhooks.courier import Courier, pause_s
from webhook_receiver import Receiver, receiving

NewJob = Callable[..., Job]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"webhook_networks": (ip_network("127.0.0.0/8"),)})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[timedelta]:
    """What is added to the store's clock; tests move it on."""
    ahead = [timedelta()]
    real = Store.now
    monkeypatch.setattr(Store, "now", lambda store: real(store) + ahead[0])
    return ahead


def hook_of(store: Store, url: str, *, project: str = "default", events: tuple[str, ...] = EVENTS) -> Webhook:
    with store.begin() as session:
        return webhooks.create(session, project=project, url=url, description="", events=events, now=store.now())


def outbox(store: Store, hook: Webhook) -> list[WebhookDelivery]:
    with store.begin(readonly=True) as session:
        rows = session.scalars(select(WebhookDelivery).where(WebhookDelivery.webhook_id == hook.id))
        return sorted(rows, key=lambda row: row.id)


def read(store: Store, hook: Webhook) -> Webhook:
    with store.begin(readonly=True) as session:
        return webhooks.get(session, hook.project, hook.id)


def claim(store: Store, now: datetime | None = None, limit: int = 100) -> list[Claimed]:
    with store.begin() as session:
        return webhooks.claim(session, now or store.now(), limit=limit, per_webhook=limit)


def finish(store: Store, settings: Settings, job: Job) -> Lease:
    claimed = leases.claim(store, settings, "w", {"any"})
    assert claimed is not None and claimed[1].id == job.id
    leases.commit_step(store, claimed[0], 1, {"loss": 1.0}, [])
    leases.succeed(store, claimed[0], {}, "max_steps")
    return claimed[0]


# ---------------------------------------------------------------- what is written, and when


def test_a_delivery_is_written_with_its_event_and_with_no_other(
    store: Store, settings: Settings, new_job: NewJob, receiver: Receiver
) -> None:
    all_, some, foreign = (
        hook_of(store, receiver.url),
        hook_of(store, receiver.url, events=("job.succeeded",)),
        hook_of(store, receiver.url, project="another"),
    )
    job = new_job(metadata={"run": 7})
    finish(store, settings, job)
    assert [row.type for row in outbox(store, all_)] == ["job.created", "job.queued", "job.running", "job.succeeded"]
    (done,) = outbox(store, some)
    assert (done.type, done.job_id, done.status, done.attempts) == ("job.succeeded", job.id, "waiting", 0)
    with store.begin(readonly=True) as session:
        event = session.scalars(select(Event).where(Event.job_id == job.id).order_by(Event.seq.desc())).first()
    assert event is not None
    told = json.loads(done.body)
    assert told["type"] == "job.succeeded" and datetime.fromisoformat(told["timestamp"]) - event.created_at < timedelta(
        seconds=1
    )
    about = {"job_id": job.id, "name": "a job", "kind": "supervised", "tags": ["small"], "metadata": {"run": 7}}
    assert told["data"] == about | {"seq": event.seq, "event": "status_changed", "details": event.data}
    assert outbox(store, foreign) == []


def test_an_event_that_is_rolled_back_tells_nobody(store: Store, new_job: NewJob, receiver: Receiver) -> None:
    job, hook = new_job(), hook_of(store, receiver.url)
    with store.begin() as session:
        events.append(session, job.id, "warning", {"detail": "odd"})
        session.rollback()
    assert outbox(store, hook) == []
    with store.begin() as session:
        events.append(session, job.id, "warning", {"detail": "odd"})
    assert [row.type for row in outbox(store, hook)] == ["job.warning"]


def test_steps_ask_for_no_webhooks(store: Store, settings: Settings, new_job: NewJob, monkeypatch: pytest.MonkeyPatch) -> None:
    new_job()
    claimed = leases.claim(store, settings, "w", {"any"})
    assert claimed is not None
    monkeypatch.setattr(webhooks, "_listening", lambda *asked: pytest.fail("a step must not look for webhooks"))
    leases.commit_step(store, claimed[0], 1, {"loss": 1.0}, [])


def test_what_a_step_tells_is_written_with_the_step_or_not_at_all(
    store: Store, settings: Settings, new_job: NewJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook, _ = hook_of(store, "http://127.0.0.1/", events=("job.evaluation",)), new_job()
    claimed = leases.claim(store, settings, "w", {"any"})
    assert claimed is not None
    told = [("evaluation", {"step": 1, "metrics": {"eval/loss": 2.0}})]

    def broken(*_: Any) -> bool:
        raise RuntimeError("after all was written")

    with monkeypatch.context() as patched:
        patched.setattr(leases.usage, "is_spent", broken)
        with pytest.raises(RuntimeError):
            leases.commit_step(store, claimed[0], 1, {"loss": 1.0}, [], told)
    assert outbox(store, hook) == []
    leases.commit_step(store, claimed[0], 1, {"loss": 1.0}, [], told)
    (row,) = outbox(store, hook)
    assert json.loads(row.body)["data"]["details"] == told[0][1]


# ---------------------------------------------------------------- what arrives


def test_what_arrives_is_verified_by_the_package(store: Store, settings: Settings, new_job: NewJob, receiver: Receiver) -> None:
    hook = hook_of(store, receiver.url)
    finish(store, settings, new_job(name="größer\u2028 \U0001f600"))
    assert Courier(store, settings).once() == 4
    told = receiver.verified(hook.secret)
    assert sorted(one["type"] for one in told) == ["job.created", "job.queued", "job.running", "job.succeeded"]
    assert {one["data"]["name"] for one in told} == {"größer\u2028 \U0001f600"}
    assert {headers["content-type"] for headers, _ in receiver.got} == {"application/json"}
    assert sorted(receiver.ids()) == [row.id for row in outbox(store, hook)]
    assert {(row.status, row.attempts, row.response_status, row.error) for row in outbox(store, hook)} == {
        ("delivered", 1, 204, None)
    }
    assert Courier(store, settings).once() == 0
    with pytest.raises(WebhookVerificationError):  # a negative control
        receiver.verified(webhooks.new_secret())
    headers, body = receiver.got[0]
    with pytest.raises(WebhookVerificationError):
        Verifier(hook.secret).verify(body.replace(b"default", b"forged!").replace(b"small", b"large"), headers)


def test_a_rotated_secret_signs_beside_the_one_before_until_the_grace_ends(
    store: Store, settings: Settings, new_job: NewJob, receiver: Receiver, clock: list[timedelta]
) -> None:
    hook = hook_of(store, receiver.url, events=("job.created",))
    with store.begin() as session:
        row = webhooks.get(session, "default", hook.id, lock=True)
        webhooks.rotate(session, row, store.now() + timedelta(hours=1))
    new_job()
    Courier(store, settings).once()
    assert len(receiver.verified(hook.secret)) == len(receiver.verified(row.secret)) == 1
    receiver.got.clear()
    clock[0] = timedelta(hours=2)
    new_job()
    Courier(store, settings).once()
    assert len(receiver.verified(row.secret)) == 1
    with pytest.raises(WebhookVerificationError):
        receiver.verified(hook.secret)


# ---------------------------------------------------------------- failures


def test_a_failure_is_tried_again_later_with_the_same_id(
    store: Store, settings: Settings, new_job: NewJob, receiver: Receiver, clock: list[timedelta]
) -> None:
    hook = hook_of(store, receiver.url, events=("job.created",))
    receiver.answer = lambda number: 500 if number < 3 else 200
    new_job()
    courier = Courier(store, settings)
    for failures in (1, 2):
        assert courier.once() == 1
        (row,) = outbox(store, hook)
        assert (row.status, row.attempts, row.response_status) == ("waiting", failures, 500)
        pause = (row.next_try_at - store.now()).total_seconds()
        assert 0.8 * 5 * 3 ** (failures - 1) - 2 < pause <= 1.2 * 5 * 3 ** (failures - 1)
        assert courier.once() == 0  # not before its time
        assert read(store, hook).failing_since is not None
        clock[0] += timedelta(seconds=pause + 1)
    assert courier.once() == 1
    assert len(receiver.verified(hook.secret)) == 3 and len(set(receiver.ids())) == 1
    (row,) = outbox(store, hook)
    assert (row.status, row.attempts, row.response_status, row.error) == ("delivered", 3, 200, None)
    assert read(store, hook).failing_since is None


def test_pauses_grow_to_a_bound_and_are_spread() -> None:
    for failures in range(1, MAX_ATTEMPTS):
        longest = min(5 * 3 ** (failures - 1), 6 * 3600)
        pauses = [pause_s(failures) for _ in range(50)]
        assert 0.8 * longest <= min(pauses) < max(pauses) <= 1.2 * longest
    total = sum(min(5 * 3 ** (failures - 1), 6 * 3600) for failures in range(1, MAX_ATTEMPTS))
    assert 40 * 3600 < total < 50 * 3600  # "about two days" in docs/webhooks.md


def test_retry_after_of_429_and_503_counts_and_is_bounded(
    store: Store, settings: Settings, new_job: NewJob, receiver: Receiver
) -> None:
    for status, later, low, high in (
        (429, "100", 90, 101),
        (503, "999999999", 21_000, 21_601),
        (500, "100", 0, 7),
        (429, "x", 0, 7),
    ):
        hook = hook_of(store, receiver.url, events=("job.created",))
        receiver.answer = lambda number, status=status, later=later: (status, {"Retry-After": later})
        new_job()
        Courier(store, settings).once()
        (row,) = outbox(store, hook)
        assert low < (row.next_try_at - store.now()).total_seconds() < high, (status, later)
        with store.begin() as session:
            webhooks.remove(session, "default", hook.id)


def test_it_is_given_up_after_the_last_attempt_and_redelivered_when_asked(
    store: Store, settings: Settings, new_job: NewJob, receiver: Receiver, clock: list[timedelta]
) -> None:
    hook = hook_of(store, receiver.url, events=("job.created",))
    receiver.answer = lambda number: 400
    new_job()
    settings = settings.model_copy(update={"webhook_disable_after_s": 1e9})
    for _ in range(MAX_ATTEMPTS):
        assert Courier(store, settings).once() == 1
        clock[0] += timedelta(hours=8)
    assert Courier(store, settings).once() == 0
    (row,) = outbox(store, hook)
    assert (row.status, row.attempts) == ("failed", MAX_ATTEMPTS)
    receiver.answer = lambda number: 200
    with store.begin() as session:
        again = webhooks.redeliver(session, webhooks.get(session, "default", hook.id, lock=True), row.id, store.now())
    assert (again.status, again.last_attempt) == ("waiting", 2 * MAX_ATTEMPTS)
    assert Courier(store, settings).once() == 1
    assert outbox(store, hook)[0].status == "delivered" and set(receiver.ids()) == {row.id}


@pytest.mark.parametrize("how", ["days of failures", "410"])
def test_a_hopeless_webhook_is_disabled_and_the_others_are_told(
    store: Store, settings: Settings, new_job: NewJob, receiver: Receiver, clock: list[timedelta], how: str
) -> None:
    hook = hook_of(store, receiver.url, events=("job.created", "job.queued", DISABLED))
    other = hook_of(store, receiver.url, events=(DISABLED,))
    receiver.answer = lambda number: 410 if how == "410" else 500
    new_job()
    courier = Courier(store, settings)
    courier.once()
    if how != "410":
        assert read(store, hook).disabled_at is None
        clock[0] += timedelta(days=5, minutes=1)
        courier.once()
    found = read(store, hook)
    assert found.disabled_at is not None and ("410" in (found.disabled_reason or "")) == (how == "410")
    assert {row.status for row in outbox(store, hook)} == {"failed"}
    (told,) = outbox(store, other)
    assert json.loads(told.body)["data"] == {"webhook_id": hook.id, "reason": found.disabled_reason}
    new_job()
    assert len(outbox(store, hook)) == 2, "nothing is kept for it"
    with pytest.raises(Conflict, match="enable it"), store.begin() as session:
        webhooks.redeliver(session, found, outbox(store, hook)[0].id, store.now())


def test_redirects_are_not_followed(store: Store, settings: Settings, new_job: NewJob, receiver: Receiver) -> None:
    hook = hook_of(store, receiver.url, events=("job.created",))
    receiver.answer = lambda number: (302, {"Location": receiver.url})
    new_job()
    Courier(store, settings).once()
    assert len(receiver.got) == 1
    (row,) = outbox(store, hook)
    assert row.response_status == 302 and "redirects are not followed" in (row.error or "")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "2130706433", "169.254.169.254", "10.0.0.1"])
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_private_addresses_are_not_reached(
    store: Store, settings: Settings, new_job: NewJob, receiver: Receiver, host: str
) -> None:
    settings = settings.model_copy(update={"webhook_networks": ()})
    hook = hook_of(store, receiver.url.replace("127.0.0.1", host), events=("job.created",))
    new_job()
    Courier(store, settings).once()
    assert receiver.got == []
    (row,) = outbox(store, hook)
    assert row.response_status is None and "RATCHET_WEBHOOK_NETWORKS" in (row.error or "")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_receiver_that_does_not_answer_is_left(
    store: Store, settings: Settings, new_job: NewJob, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(couriers, "TIMEOUT_S", 0.2)
    hook = hook_of(store, receiver.url, events=("job.created",))
    closed = hook_of(store, "http://127.0.0.1:1/", events=("job.created",))
    receiver.answer = lambda number: sleep(1) or 200
    new_job()
    Courier(store, settings).once()
    assert outbox(store, hook)[0].error == "no answer within 0.2 s"
    assert "ConnectError" in (outbox(store, closed)[0].error or "")


def test_no_secret_is_logged(
    store: Store, settings: Settings, new_job: NewJob, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    hook = hook_of(store, receiver.url, events=("job.created",))
    receiver.answer = lambda number: 410
    new_job()
    Courier(store, settings).once()
    assert f"webhook {hook.id} was disabled" in caplog.text
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("service"))
    assert hook.secret not in caplog.text and "of-the-receiver" not in ours


# ---------------------------------------------------------------- several couriers, and their deaths


def test_couriers_that_look_at_once_claim_different_deliveries(store: Store, new_job: NewJob, receiver: Receiver) -> None:
    hook = hook_of(store, receiver.url)
    for _ in range(6):
        new_job()
    barrier, got = Barrier(4), []

    def look() -> None:
        barrier.wait()
        until = monotonic() + 20
        while len(got) < 12 and monotonic() < until:  # who looks while another claims may get none
            got.extend(claim(store, limit=2))

    threads = [Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    claimed = [one.id for one in got]
    assert len(claimed) == len(set(claimed)) and set(claimed) <= {row.id for row in outbox(store, hook)}
    assert len(claimed) == 12


def test_one_webhook_does_not_take_all_places(store: Store, new_job: NewJob, receiver: Receiver) -> None:
    full, small = hook_of(store, receiver.url), hook_of(store, receiver.url, events=("job.created",))
    for _ in range(5):
        new_job()
    with store.begin() as session:
        first = webhooks.claim(session, store.now(), limit=8, per_webhook=3)
    assert sorted(one.webhook_id for one in first) == sorted([full.id] * 3 + [small.id] * 3)
    with store.begin() as session:
        second = webhooks.claim(session, store.now(), limit=8, per_webhook=3, busy={full.id})
    assert [one.webhook_id for one in second] == [small.id] * 2


@pytest.mark.parametrize("dies", ["before it sends", "before it notes that it arrived"])
def test_a_courier_that_dies_leaves_its_delivery_to_the_next(
    store: Store, settings: Settings, new_job: NewJob, receiver: Receiver, clock: list[timedelta], dies: str
) -> None:
    hook = hook_of(store, receiver.url, events=("job.created",))
    new_job()
    dead = Courier(store, settings)

    class Died(BaseException):
        pass

    def die(*_: Any) -> Any:
        raise Died

    setattr(dead, "_send" if dies == "before it sends" else "_record", die)
    with pytest.raises(Died):
        dead.once()
    assert len(receiver.got) == (0 if dies == "before it sends" else 1)
    assert Courier(store, settings).once() == 0, "the claim holds"
    clock[0] += CLAIM + timedelta(seconds=1)
    assert Courier(store, settings).once() == 1
    (row,) = outbox(store, hook)
    assert (row.status, row.attempts) == ("delivered", 2)
    assert set(receiver.ids()) == {row.id}


def test_a_result_that_comes_late_changes_nothing(store: Store, new_job: NewJob, receiver: Receiver) -> None:
    hook = hook_of(store, receiver.url, events=("job.created",))
    new_job()
    (old,) = claim(store)
    (new,) = claim(store, store.now() + CLAIM + timedelta(seconds=1))
    assert (old.id, old.attempt, new.attempt) == (new.id, 1, 2)
    now = utcnow()
    with store.begin() as session:
        assert not webhooks.failed(session, old, 500, "too late", None, now)
        assert not webhooks.delivered(session, old, 200, now)
    (row,) = outbox(store, hook)
    assert (row.status, row.error, read(store, hook).failing_since) == ("waiting", None, None)
    with store.begin() as session:
        assert webhooks.delivered(session, new, 200, now)
        assert not webhooks.failed(session, new, 500, "twice", None, now)


def test_a_webhook_that_is_deleted_while_an_event_is_written_does_no_harm(
    store: Store, settings: Settings, new_job: NewJob, receiver: Receiver, doorbell: Doorbell
) -> None:
    job = new_job()
    for _ in range(5):
        hook = hook_of(store, receiver.url)
        gone = Thread(target=lambda hook=hook: _remove(store, hook))
        gone.start()
        with store.begin() as session:
            events.append(session, job.id, "warning", {})
        gone.join()
    lifecycle.cancel(store, doorbell, "default", job.id)
    with store.begin(readonly=True) as session:
        assert session.scalars(select(WebhookDelivery)).all() == []


def _remove(store: Store, hook: Webhook) -> None:
    with store.begin() as session:
        webhooks.remove(session, hook.project, hook.id)


def test_a_project_has_a_bounded_number_of_webhooks(store: Store) -> None:
    for _ in range(MOST):
        hook_of(store, "https://example.com")
    with pytest.raises(Conflict, match=str(MOST)):
        hook_of(store, "https://example.com")
    hook_of(store, "https://example.com", project="another")


def test_old_deliveries_are_forgotten_unless_they_wait(store: Store, settings: Settings, new_job: NewJob) -> None:
    hook = hook_of(store, "https://example.com", events=("job.created", "job.queued"))
    new_job()
    first, second = claim(store)
    with store.begin() as session:
        webhooks.delivered(session, first, 200, store.now())
        webhooks.expire(session, store.now() + KEPT_FOR - timedelta(minutes=1))
    assert len(outbox(store, hook)) == 2
    with store.begin() as session:
        webhooks.expire(session, store.now() + KEPT_FOR + timedelta(minutes=1))
    assert [row.id for row in outbox(store, hook)] == [second.id]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_thread_delivers_and_stops(store: Store, settings: Settings, new_job: NewJob, receiver: Receiver) -> None:
    hook = hook_of(store, receiver.url)
    for _ in range(5):
        new_job()
    courier = Courier(store, settings)
    courier.start()
    receiver.wait_for(10)
    courier.stop()
    assert not courier._thread.is_alive()
    assert {row.status for row in outbox(store, hook)} == {"delivered"} and len(set(receiver.ids())) == 10


def test_who_delivers_is_rung_once_a_delivery_is_committed_and_for_nothing_else(store: Store, new_job: NewJob) -> None:
    job, rung = new_job(), list[int]()
    hook = hook_of(store, "http://127.0.0.1/", events=("job.created", "job.warning"))
    store.on_deliveries = lambda: rung.append(len(outbox(store, hook)))
    new_job()
    assert rung == [1]  # it is there for whoever looks now
    warning = (job.id, "warning", {"detail": "odd"})
    with store.begin() as session:
        events.append(session, *warning)
        session.rollback()
    assert rung == [1]
    with store.begin() as session:
        events.append(session, job.id, "checkpoint_saved", {})  # nobody wants it
    with store.begin() as session:
        events.append(session, *warning)
    with store.write() as connection, Session(connection) as session:
        events.append(session, *warning)
        session.commit()  # into the connection's transaction
    assert rung == [1, 2, 3]
    with store.begin() as session:
        webhooks.redeliver(session, hook, outbox(store, hook)[0].id, store.now())
    with store.begin() as session:
        webhooks.next_due(session)
    assert rung == [1, 2, 3, 3]


@pytest.fixture
def bell(settings: Settings, own_redis: Any) -> Iterator[tuple[Doorbell, Signals]]:
    settings = settings.model_copy(update={"redis_url": SecretStr(own_redis.url)})
    doorbell = Doorbell(settings)
    yield doorbell, Signals(settings)
    doorbell.close()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_courier_is_rung_and_without_redis_it_polls(
    store: Store, settings: Settings, new_job: NewJob, receiver: Receiver, bell: tuple[Doorbell, Signals], own_redis: Any
) -> None:
    doorbell, signals = bell
    store.on_deliveries = doorbell.ring_couriers
    looks, real = list[float](), webhooks.next_due
    hook = hook_of(store, receiver.url, events=("job.created",))

    def delivered(count: int, within_s: float) -> None:
        new_job()
        receiver.wait_for(count, within_s)
        deadline = monotonic() + within_s
        while outbox(store, hook)[count - 1].status != "delivered":
            assert monotonic() < deadline
            sleep(0.01)

    async def run() -> None:
        await signals.start()
        while not signals.connected:
            await asyncio.sleep(0.01)
        listening = asyncio.create_task(courier.listen(signals))
        courier.start()
        await asyncio.to_thread(delivered, 1, couriers.EVERY_S / 10)
        await asyncio.to_thread(delivered, 2, couriers.EVERY_S / 10)
        await asyncio.sleep(0.5)  # it looks once more when it has noted the delivery
        looks.clear()
        await asyncio.sleep(2.5)
        assert not looks  # an idle one costs nothing
        own_redis.kill()
        await asyncio.to_thread(delivered, 3, couriers.EVERY_S / 4)  # signals are away: it looks again and again
        listening.cancel()
        await signals.stop()

    courier = Courier(store, settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(webhooks, "next_due", lambda session: looks.append(monotonic()) or real(session))
        asyncio.run(run())
        courier.stop()
    assert not courier._thread.is_alive()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_courier_that_nobody_rings_wakes_for_what_is_due_and_a_lost_ring_costs_one_pause(
    store: Store, settings: Settings, new_job: NewJob, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook_of(store, receiver.url, events=("job.created",))
    monkeypatch.setattr(couriers, "pause_s", lambda failures: 0.2)
    receiver.answer = lambda number: 500 if number == 1 else 204
    new_job()
    courier = Courier(store, settings)
    courier.start()
    receiver.wait_for(2, within_s=couriers.EVERY_S / 4)
    courier.stop()
    monkeypatch.setattr(couriers, "EVERY_S", 0.2)
    courier = Courier(store, settings)
    courier.start()
    sleep(0.1)
    new_job()
    receiver.wait_for(3, within_s=5)
    courier.stop()


def test_connections_are_not_shared_between_webhooks() -> None:
    async def look() -> httpx.AsyncClient:
        async with Courier._client() as client:
            return client

    transport: Any = asyncio.run(look())._transport
    assert transport._pool._max_keepalive_connections == 0
