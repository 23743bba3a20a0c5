"""The doorbell: the only sender of Celery messages ("rings") and Redis signals.

All state is in the store. A ring or a signal that is lost, doubled or late does no harm, so nothing here raises or waits for
long. If Redis is down, a call takes about a second and writes a line to the log.
"""

import asyncio
import json
import logging
import time
from base64 import b64encode
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from secrets import token_hex
from threading import local
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import redis
import redis.asyncio
from celery import Celery
from redis.backoff import NoBackoff
from redis.client import PubSub
from redis.retry import Retry

from service import telemetry
from service.settings import Settings

log = logging.getLogger(__name__)

RING_TASK = "ratchet.train"
LOSSES_TASK = "ratchet.losses"
LOSSES_QUEUE = "losses"
PARTS = "ratchet:parts:"  # channels of answers that are told while they grow, one a lane
COURIERS = "webhooks"  # stands for a job's id in the signal that deliveries of webhooks wait
KEYS_EDITION = "ratchet:keys:edition"  # changes with each revocation of an API key
CLASSES = ("any", "cpu", "gpu")
TO_WORKERS = frozenset({"operation", "wish", "guest"})  # signals that say nothing to followers, nor to who waits for another
TIMEOUT_S = 1.0  # for a connection, and for an answer
HUSH_S = 10.0  # no signals for this long after one timed out: a frozen Redis must not cost a second per signal
POLL_S = 1.0  # how long a listener sleeps while Redis is down
VISIBILITY_TIMEOUT_S = 300


def class_of(name: str, gpus: int) -> str:
    """The class of workers that may take such a job: one of CLASSES, with the number of GPUs if it needs several (gpu:4)."""
    return name if gpus == 1 else f"{name}:{gpus}"


def queue_name(resource_class: str) -> str:
    return f"train.{resource_class}"


def channel_name(job_id: str, what: str = "events") -> str:
    """Where this kind of signal about the job is sent: one channel for all followers, one for each kind to workers."""
    return f"ratchet:{what}:{job_id}" if what in TO_WORKERS else f"ratchet:job:{job_id}"


def redis_py_url(url: str) -> str:
    """The URL in redis-py's form: unix:///path?db=0 for a socket."""
    if not url.startswith(("redis+socket://", "unix://")):
        return url
    path, number = _socket_of(url)
    return f"unix://{path}?db={number}"


def kombu_url(url: str) -> str:
    """The URL in kombu's form: redis+socket:///path?virtual_host=0 for a socket."""
    if url.startswith("rediss://") and "ssl_cert_reqs=" not in url:
        return f"{url}{'&' if '?' in url else '?'}ssl_cert_reqs=required"  # kombu's default checks no certificate
    if not url.startswith(("redis+socket://", "unix://")):
        return url
    path, number = _socket_of(url)
    return f"redis+socket://{path}?virtual_host={number}"


def _socket_of(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    query = parse_qs(parts.query)
    return parts.path, (query.get("virtual_host") or query.get("db") or ["0"])[0]


def celery_app(settings: Settings) -> Celery:
    """The configured Celery application, for API and workers. It has no tasks."""
    app = Celery("ratchet", broker=kombu_url(settings.redis_url.get_secret_value()), set_as_current=False)
    app.conf.update(
        # CUDA cannot survive a fork. The parent of the one child stays alive and answers control messages.
        worker_pool="prefork",
        worker_concurrency=1,
        worker_pool_start_method="spawn",
        worker_proc_alive_timeout=120,  # a new child imports torch first; after the default of 4 s it would be killed
        # With late acknowledgement, a job longer than the visibility timeout would run on two workers. Leases handle lost jobs.
        task_acks_late=False,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        task_ignore_result=True,
        result_backend=None,
        broker_transport_options={"visibility_timeout": VISIBILITY_TIMEOUT_S},
        broker_connection_retry_on_startup=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_hijack_root_logger=False,
        worker_send_task_events=False,
        task_serializer="json",
        accept_content=["json"],
        task_default_queue=queue_name("any"),
        enable_utc=True,
    )
    return app


class Doorbell:
    """Rings workers and signals followers. Safe to share between threads; each process makes its own after a fork."""

    def __init__(self, settings: Settings) -> None:
        self._url = settings.redis_url.get_secret_value()
        self._celery = celery_app(settings)
        self._redis = redis.Redis.from_url(
            redis_py_url(self._url), socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, retry=Retry(NoBackoff(), 0)
        )
        self._hushed_until = 0.0
        self._mine = local()  # each listening thread keeps its own subscription

    def ring(self, job_id: str, resource_class: str) -> bool:
        """Tell the workers of this class that there is work. False if Redis did not accept the message."""
        return self._send(RING_TASK, [job_id], queue_name(resource_class))

    def ring_losses(self) -> bool:
        """Tell the loss workers that requests wait. False if Redis did not accept the message."""
        return self._send(LOSSES_TASK, [], LOSSES_QUEUE)

    def _send(self, task: str, arguments: list[str], queue: str) -> bool:
        try:
            self._redis.lpush(queue, self._message(task, arguments, queue))
        except (redis.RedisError, OSError) as error:
            log.warning("could not ring for %s: %s", ", ".join(arguments) or queue, error)
            telemetry.RINGS.labels("no").inc()
            return False
        telemetry.RINGS.labels("yes").inc()
        return True

    def _message(self, task: str, arguments: list[str], queue: str) -> str:
        """What `Celery.send_task` would push: a task message of Celery in kombu's envelope for Redis. A test compares them.

        To send it by kombu takes five times as long, most of it for a new client of Redis, which then tries a slow push again.
        """
        task_id = str(uuid4())
        made = self._celery.amqp.as_task_v2(task_id, task, args=arguments, kwargs={}, ignore_result=True)
        message = {
            "body": b64encode(json.dumps(made.body).encode()).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": made.headers,
            "properties": {
                **made.properties,
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": queue},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": str(uuid4()),
            },
        }
        return json.dumps(message)

    def waiting(self, resource_class: str) -> int | None:
        """How many rings no worker has taken yet; None if Redis does not answer."""
        try:
            return int(self._redis.llen(queue_name(resource_class)))  # pyright: ignore[reportArgumentType]
        except (redis.RedisError, OSError):
            return None

    def signal(self, job_id: str, what: str) -> bool:
        """Wake listeners of the job. `what`: `events` (there are new ones), `wish` (its worker should look at once), or of a
        session `operation`. With a base's key in place of the id, `guest`: a session that shares this base is queued."""
        return self._publish(channel_name(job_id, what), what)

    def ring_couriers(self) -> bool:
        """Tell those who deliver webhooks that something is due."""
        return self._publish(channel_name(COURIERS), "delivery")

    def tell(self, lane: str, parts: Sequence[tuple[int, int, str]]) -> None:
        """Publish parts of an operation's answers to whoever listens: (answer, characters that came before, text)."""
        self._publish(f"{PARTS}{lane}", json.dumps(parts))

    def _publish(self, channel: str, text: str) -> bool:
        if time.monotonic() < self._hushed_until:
            return False
        try:
            self._redis.publish(channel, text)
        except (redis.RedisError, OSError) as error:
            if isinstance(error, redis.TimeoutError):
                self._hushed_until = time.monotonic() + HUSH_S
            log.warning("could not signal %s: %s", channel, error)
            return False
        return True

    def keys_changed(self) -> bool:
        """Start a new edition of the API keys, so that cached keys are no longer used. False if Redis did not accept it."""
        try:
            self._redis.set(KEYS_EDITION, token_hex(8))
        except (redis.RedisError, OSError) as error:
            log.warning("could not say that a key was revoked: %s", error)
            return False
        return True

    def listen(self, job_ids: Set[str], timeout_s: float) -> bool:
        """Wait for a wish about one of these jobs. False on timeout. If Redis is down, only sleep.

        A thread's subscription is kept between its calls, so no signal in between is missed for a job of the previous call.
        """
        return self.hear(job_ids, timeout_s, what={"wish"}) is not None

    def hear(self, job_ids: Set[str], timeout_s: float, *, what: Set[str]) -> str | None:
        """Like `listen` for these kinds of TO_WORKERS. Returns the kind that came first, None on timeout."""
        deadline = time.monotonic() + timeout_s
        try:
            subscription = self._subscription({channel_name(job_id, each) for job_id in job_ids for each in what})
            while (left := deadline - time.monotonic()) > 0:
                message = subscription.get_message(ignore_subscribe_messages=True, timeout=left)
                if message is not None:
                    return message["data"].decode()
        except (redis.RedisError, OSError):
            self.hang_up()
            time.sleep(max(0.0, deadline - time.monotonic()))
        return None

    def _subscription(self, channels: Set[str]) -> PubSub:
        if getattr(self._mine, "subscription", None) is None:
            self._mine.subscription, self._mine.channels = self._redis.pubsub(), frozenset[str]()
        subscription, before = self._mine.subscription, self._mine.channels
        for change, names in ((subscription.subscribe, channels - before), (subscription.unsubscribe, before - channels)):
            if names:
                change(*names)
        self._mine.channels = frozenset(channels)
        return subscription

    def hang_up(self) -> None:
        """Close this thread's subscription. The next `listen` opens a new one."""
        subscription = getattr(self._mine, "subscription", None)
        self._mine.subscription = None
        if subscription is not None:
            with suppress(redis.RedisError, OSError):
                subscription.close()

    def ping(self) -> bool:
        try:
            return bool(self._redis.ping())
        except (redis.RedisError, OSError):
            return False

    def close(self) -> None:
        self.hang_up()
        self._redis.close()
        self._celery.close()


class Watch:
    """One follower of one job. Create it before reading the store: any later commit then wakes the next `wait`."""

    def __init__(self, signals: "Signals") -> None:
        self._signals = signals
        self.rung = asyncio.Event()

    async def wait(self, timeout_s: float) -> bool:
        """True if the job was signalled since the last wait. While Redis is down it returns early, so that callers poll."""
        if not self._signals.connected:
            timeout_s = min(timeout_s, POLL_S)
        try:
            async with asyncio.timeout(timeout_s):
                await self.rung.wait()
        except TimeoutError:
            return False
        self.rung.clear()
        return True


class Parts:
    """What has been told of one operation's answers. A part that was missed leaves a gap, and what follows is left out."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}  # by answer
        self.rung = asyncio.Event()

    def take(self, told: list[tuple[int, int, str]]) -> None:
        for answer, start, text in told:
            there = self.texts.get(answer, "")
            if start <= len(there) < start + len(text):  # less than there is: another worker begins anew
                self.texts[answer] = there[:start] + text
                self.rung.set()


class Signals:
    """One pattern subscription for all followers in a process: `await start()`, then `watch` or `wait`, then `await stop()`."""

    def __init__(self, settings: Settings) -> None:
        self._url = redis_py_url(settings.redis_url.get_secret_value())
        self._watches: dict[str, set[Watch]] = {}
        self._parts: dict[str, Parts] = {}
        self._task: asyncio.Task[None] | None = None
        self.connected = False

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="signals")

    async def stop(self) -> None:
        while self._task is not None and not self._task.done():
            self._task.cancel()  # repeated, because Python 3.11's wait_for may swallow a cancellation
            await asyncio.wait([self._task], timeout=1.0)
        self._task = None

    @contextmanager
    def watch(self, job_id: str) -> Iterator[Watch]:
        watch = Watch(self)
        self._watches.setdefault(job_id, set()).add(watch)
        try:
            yield watch
        finally:
            self._watches[job_id].discard(watch)
            if not self._watches[job_id]:
                del self._watches[job_id]

    @contextmanager
    def parts(self, lane: str) -> Iterator[Parts]:
        """Listen to what is told of the answers of a lane's one operation, from now on."""
        parts = self._parts[lane] = Parts()
        try:
            yield parts
        finally:
            del self._parts[lane]

    async def wait(self, job_id: str, timeout_s: float) -> bool:
        """Wait for the next signal of a job. False on timeout, or earlier while Redis is down."""
        with self.watch(job_id) as watch:
            return await watch.wait(timeout_s)

    async def _run(self) -> None:
        while True:
            try:
                await self._follow()
            except (redis.RedisError, OSError) as error:
                if self.connected:
                    log.warning("signals are away, followers poll: %s", error)
            self.connected = False
            self.wake_all()
            await asyncio.sleep(POLL_S)

    async def _follow(self) -> None:
        client = redis.asyncio.Redis.from_url(self._url, socket_connect_timeout=TIMEOUT_S, health_check_interval=15)
        async with client, client.pubsub() as subscription:
            await subscription.psubscribe(channel_name("*"), f"{PARTS}*")
            self.connected = True
            self.wake_all()  # signals may have been missed meanwhile
            while True:
                message = await subscription.get_message(ignore_subscribe_messages=True, timeout=5.0)
                if message is None:
                    continue
                channel = message["channel"].decode()
                if channel.startswith(PARTS):
                    if (parts := self._parts.get(channel.removeprefix(PARTS))) is not None:
                        parts.take(json.loads(message["data"]))
                else:
                    self._wake(channel.removeprefix(channel_name("")))

    def _wake(self, job_id: str) -> None:
        for watch in self._watches.get(job_id, ()):
            watch.rung.set()

    def wake_all(self) -> None:
        """Wake every follower, even if there is nothing new."""
        for job_id in self._watches:
            self._wake(job_id)
