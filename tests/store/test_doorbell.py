import asyncio
import json
import logging
import time
from base64 import b64decode
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

import pytest
import redis
from kombu.connection import Connection
from pydantic import SecretStr

from service import doorbell
from service.doorbell import RING_TASK, Doorbell, Signals, celery_app, channel_name, kombu_url, queue_name, redis_py_url
from service.ids import new_id
from service.settings import Settings


class OwnRedis(Protocol):
    url: str

    def start(self) -> None: ...
    def kill(self) -> None: ...
    def freeze(self) -> None: ...
    def thaw(self) -> None: ...
    def flush(self) -> None: ...
    def client(self) -> redis.Redis: ...


def settings_for(url: str) -> Settings:
    return Settings(environment="development", redis_url=SecretStr(url))


@pytest.fixture(params=["tcp", "socket"])
def url(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue("redis_url") if request.param == "tcp" else request.getfixturevalue("own_redis").url


@pytest.fixture
def bell(url: str) -> Iterator[Doorbell]:
    bell = Doorbell(settings_for(url))
    yield bell
    bell.close()


@pytest.mark.parametrize(
    ("url", "for_redis_py", "for_kombu"),
    [
        ("redis://h:6379/3", "redis://h:6379/3", "redis://h:6379/3"),
        ("rediss://h/3", "rediss://h/3", "rediss://h/3?ssl_cert_reqs=required"),
        ("rediss://h?ssl_cert_reqs=none", "rediss://h?ssl_cert_reqs=none", "rediss://h?ssl_cert_reqs=none"),
        ("redis+socket:///run/r.sock", "unix:///run/r.sock?db=0", "redis+socket:///run/r.sock?virtual_host=0"),
        ("redis+socket:///run/r.sock?virtual_host=2", "unix:///run/r.sock?db=2", "redis+socket:///run/r.sock?virtual_host=2"),
        ("unix:///run/r.sock?db=2", "unix:///run/r.sock?db=2", "redis+socket:///run/r.sock?virtual_host=2"),
    ],
)
def test_both_libraries_get_the_url_in_their_own_form(url: str, for_redis_py: str, for_kombu: str) -> None:
    assert (redis_py_url(url), kombu_url(url)) == (for_redis_py, for_kombu)


def test_a_ring_is_a_celery_message_with_the_id_and_nothing_else(bell: Doorbell, url: str) -> None:
    assert bell.ring("job_1", "cpu")
    assert [bell.waiting(class_) for class_ in ("any", "cpu", "gpu")] == [0, 1, 0]
    with Connection(kombu_url(url)) as connection, connection.SimpleQueue(queue_name("cpu")) as queue:
        message: Any = queue.get(timeout=2)
        message.ack()
    assert message.headers["task"] == RING_TASK
    assert message.payload[:2] == [["job_1"], {}]
    assert bell.waiting("cpu") == 0


def test_a_ring_is_what_celery_would_send(bell: Doorbell, url: str) -> None:
    app = celery_app(settings_for(url))
    app.send_task(RING_TASK, args=["job_1"], queue=queue_name("cpu"), ignore_result=True)
    bell.ring("job_1", "cpu")
    app.close()
    with redis.Redis.from_url(redis_py_url(url)) as client:
        ours, theirs = (json.loads(raw) for raw in client.lrange(queue_name("cpu"), 0, -1))  # pyright: ignore[reportGeneralTypeIssues]
    for message in (ours, theirs):  # what differs from message to message
        assert message["headers"]["id"] == message["headers"]["root_id"] == message["properties"]["correlation_id"]
        message["body"] = json.loads(b64decode(message["body"]))
        for name in ("id", "root_id"):
            del message["headers"][name]
        for name in ("correlation_id", "delivery_tag", "reply_to"):
            assert isinstance(message["properties"].pop(name), str)
    assert ours == theirs


def test_a_worker_that_runs_the_app_gets_the_ring(bell: Doorbell, url: str) -> None:
    """The consumer's side of the same settings, in this process and with a thread for a pool."""
    app, heard = celery_app(settings_for(url)), list[str]()

    @app.task(name=RING_TASK, shared=False)
    def train(job_id: str) -> None:
        heard.append(job_id)

    bell.ring("job_1", "any")
    bell.ring("job_1", "any")  # a doubled ring arrives twice: it is the claim that makes it harmless
    app.finalize()
    with app.connection_for_read() as connection, app.amqp.TaskConsumer(connection) as consumer:
        for queue in consumer.queues:
            while (message := queue.get()) is not None:
                app.tasks[message.headers["task"]](*message.payload[0])
                message.ack()
    assert heard == ["job_1", "job_1"]


# ---------------------------------------------------------------- Redis away


def quickly(call: Callable[[], object]) -> object:
    started = time.monotonic()
    answer = call()
    assert time.monotonic() - started < 3
    return answer


def test_nothing_raises_and_nothing_waits_when_nobody_listens(caplog: pytest.LogCaptureFixture) -> None:
    bell = Doorbell(settings_for("redis://:s3cret@127.0.0.1:1/0"))
    with caplog.at_level(logging.WARNING):
        assert quickly(lambda: bell.ring("job_1", "any")) is False
    assert quickly(lambda: bell.signal("job_1", "wish")) is False
    assert quickly(lambda: bell.waiting("any")) is None
    assert quickly(bell.ping) is False
    assert "could not ring for job_1" in caplog.text
    assert "s3cret" not in caplog.text


def test_the_same_with_a_redis_that_dies_and_comes_back(own_redis: OwnRedis) -> None:
    bell = Doorbell(settings_for(own_redis.url))
    assert bell.ring("job_1", "any")
    own_redis.kill()
    for _ in range(3):
        assert quickly(lambda: bell.ring("job_1", "any")) is False
        assert quickly(lambda: bell.signal("job_1", "wish")) is False
    own_redis.start()
    assert bell.ring("job_1", "any")
    assert bell.waiting("any") == 1
    assert bell.signal("job_1", "wish")


def test_the_same_with_a_redis_that_hangs(own_redis: OwnRedis) -> None:
    bell = Doorbell(settings_for(own_redis.url))
    assert bell.ring("job_1", "any")
    own_redis.freeze()
    try:
        assert quickly(lambda: bell.ring("job_1", "any")) is False
        assert quickly(lambda: bell.signal("job_1", "wish")) is False
        fresh = Doorbell(settings_for(own_redis.url))
        assert quickly(lambda: fresh.ring("job_1", "any")) is False
    finally:
        own_redis.thaw()
    assert bell.ring("job_1", "any")


def test_a_redis_that_hangs_holds_a_training_loop_up_once_and_not_at_every_step(
    own_redis: OwnRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doorbell, "HUSH_S", 2.0)
    bell = Doorbell(settings_for(own_redis.url))
    assert bell.signal("job_1", "events")
    own_redis.freeze()
    try:
        assert bell.signal("job_1", "events") is False
        started = time.monotonic()
        assert [bell.signal("job_1", "events") for _ in range(100)] == [False] * 100
        assert time.monotonic() - started < 1
    finally:
        own_redis.thaw()
    time.sleep(2)
    assert bell.signal("job_1", "events"), "it is tried again"


def test_a_flush_loses_rings_and_nothing_else(own_redis: OwnRedis) -> None:
    bell = Doorbell(settings_for(own_redis.url))
    bell.ring("job_1", "any")
    own_redis.flush()
    assert bell.waiting("any") == 0
    assert bell.ring("job_1", "any")
    assert bell.waiting("any") == 1


# ---------------------------------------------------------------- signals, for a worker


def signal_soon(bell: Doorbell, *signals: tuple[str, str]) -> Thread:
    def act() -> None:
        time.sleep(0.1)
        for job_id, what in signals:
            bell.signal(job_id, what)

    thread = Thread(target=act)
    thread.start()
    return thread


def test_a_listener_wakes_for_its_job_and_its_kind_of_signal(bell: Doorbell) -> None:
    started = time.monotonic()
    thread = signal_soon(bell, ("job_2", "wish"), ("job_1", "events"), ("job_1", "wish"))
    assert bell.listen({"job_1"}, 5) is True
    assert time.monotonic() - started < 2
    thread.join()
    assert bell.listen({"job_1"}, 0.1) is False


def test_a_signal_wakes_only_who_waits_for_its_kind(bell: Doorbell, url: str) -> None:
    """Each that it wakes takes the time of a core that also computes."""
    client, job_id = redis.Redis.from_url(redis_py_url(url)), new_id("job")

    async def act() -> list[int]:
        async with running(url):
            assert bell.listen({job_id}, 0.05) is False
            return [client.publish(channel_name(job_id, what), what) for what in ("wish", "operation", "events", "answer")]  # pyright: ignore[reportReturnType]

    wish, operation, *followed = asyncio.run(act())
    assert (wish, operation) == (1, 0)
    assert min(followed) >= 1  # other tests beside this one have followers of all jobs, too


def test_signals_of_several_kinds_are_heard(bell: Doorbell) -> None:
    thread = signal_soon(bell, ("job_1", "wish"), ("job_1", "events"), ("job_2", "guest"))
    assert bell.hear({"job_1", "job_2"}, 5, what={"operation", "guest"}) == "guest"
    thread.join()


def test_a_listener_hears_each_of_its_jobs_and_no_longer_those_that_it_had_before(bell: Doorbell) -> None:
    for jobs, heard in (({"job_1", "job_2"}, {"job_1", "job_2"}), ({"job_2", "job_3"}, {"job_2", "job_3"})):
        bell.listen(jobs, 0.2)
        for job_id in ("job_1", "job_2", "job_3"):
            bell.signal(job_id, "wish")
            assert bell.listen(jobs, 0.2) is (job_id in heard)


def test_nothing_is_missed_between_two_calls(bell: Doorbell) -> None:
    assert bell.listen({"job_1"}, 0.2) is False
    bell.signal("job_1", "wish")
    assert bell.listen({"job_1"}, 1) is True


def test_a_listener_sleeps_while_redis_is_away_and_hears_again_after(own_redis: OwnRedis) -> None:
    bell = Doorbell(settings_for(own_redis.url))
    bell.listen({"job_1"}, 0.05)
    own_redis.kill()
    for _ in range(2):
        started = time.monotonic()
        assert bell.listen({"job_1"}, 0.3) is False
        assert 0.25 < time.monotonic() - started < 2
    own_redis.start()
    bell.listen({"job_1"}, 0.2)
    bell.signal("job_1", "wish")
    assert bell.listen({"job_1"}, 2) is True


# ---------------------------------------------------------------- signals, for the API


@asynccontextmanager
async def running(url: str) -> AsyncIterator[Signals]:
    signals = Signals(settings_for(url))
    await signals.start()
    await until(lambda: signals.connected)
    try:
        yield signals
    finally:
        await signals.stop()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.01)


def test_one_subscription_wakes_the_followers_of_a_job_and_no_others(bell: Doorbell, url: str) -> None:
    async def act() -> tuple[list[bool], bool]:
        async with running(url) as signals:
            followers = [asyncio.create_task(signals.wait("job_1", 5)) for _ in range(3)]
            other = asyncio.create_task(signals.wait("job_2", 0.5))
            await asyncio.sleep(0.05)
            bell.signal("job_1", "events")
            return [await follower for follower in followers], await other

    assert asyncio.run(act()) == ([True, True, True], False)


def test_what_comes_between_reading_and_waiting_is_not_missed(bell: Doorbell, url: str) -> None:
    async def act() -> list[bool]:
        async with running(url) as signals:
            with signals.watch("job_1") as watch:
                bell.signal("job_1", "events")
                await until(watch.rung.is_set)
                return [await watch.wait(0.1), await watch.wait(0.1)]

    assert asyncio.run(act()) == [True, False]


def test_followers_poll_while_redis_is_away_and_wake_when_it_is_back(own_redis: OwnRedis) -> None:
    async def act() -> None:
        async with running(own_redis.url) as signals:
            own_redis.kill()
            await until(lambda: not signals.connected)
            with signals.watch("job_1") as watch:
                started = time.monotonic()
                while await watch.wait(30):  # the loss itself wakes followers, once
                    pass
                assert time.monotonic() - started < 5
                await asyncio.to_thread(own_redis.start)
                await until(lambda: signals.connected)
                assert await watch.wait(1)  # what was missed meanwhile may be there to read
                bell = Doorbell(settings_for(own_redis.url))
                bell.signal("job_1", "events")
                assert await watch.wait(5)

    asyncio.run(act())


def test_a_stopped_broadcaster_leaves_no_task_behind(own_redis: OwnRedis) -> None:
    async def act() -> int:
        async with running(own_redis.url):
            pass
        return len(asyncio.all_tasks())

    assert asyncio.run(act()) == 1


def test_no_watch_is_kept_after_its_follower_left() -> None:
    signals = Signals(settings_for("redis://127.0.0.1:1/0"))
    with signals.watch("job_1"), signals.watch("job_1"):
        pass
    assert signals._watches == {}


def test_celery_runs_one_spawned_child_and_acknowledges_early(tmp_path: Path) -> None:
    conf = celery_app(settings_for("redis://127.0.0.1:1/0")).conf
    assert (conf.worker_pool_start_method, conf.worker_concurrency, conf.worker_prefetch_multiplier) == ("spawn", 1, 1)
    assert conf.worker_disable_prefetch
    assert not conf.task_acks_late
    assert conf.broker_transport_options == {"visibility_timeout": 300}
