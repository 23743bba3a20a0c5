"""The Celery app of the workers: `celery -A workers.app worker`.

The parent process holds no torch: it says hello to the store, reconciles, and puts back the job of a child that died.
The child (spawned, because CUDA cannot survive a fork) runs one job at a time.
"""

import ctypes
import logging
import os
import signal
import socket
import sys
from threading import Event, Thread
from time import sleep
from typing import Any

from billiard.process import active_children
from celery import signals
from kombu.entity import Queue

from service.doorbell import RING_TASK, Doorbell, celery_app, queue_name
from service.ids import new_id, utcnow
from service.jobs import lease
from service.jobs.reconciler import Reconciler
from service.settings import Settings, get_settings
from service.store import jobs
from service.store.session import open_store
from service.store.tables import Worker
from service.telemetry import configure_logging
from workers.identity import WORKER_ID, has_gpu, resource_classes
from workers.tasks import train

log = logging.getLogger(__name__)

SEEN_EVERY_S = 10.0


app = celery_app(get_settings())
app.conf.task_queues = [Queue(queue_name(name)) for name in resource_classes(get_settings())]
app.conf.imports = ["workers.app"]  # the spawned child makes an app of its own from this one's settings
app.task(name=RING_TASK)(train)


class Parent:
    """What the worker's parent process does beside Celery's own work."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.store, self.doorbell = settings, open_store(settings), Doorbell(settings)
        self.id = new_id("wrk")
        os.environ[WORKER_ID] = self.id
        self._stop = Event()
        self._reconciler = Reconciler(self.store, settings, self.doorbell)
        self._thread = Thread(target=self._say_seen, name="seen", daemon=True)

    def start(self) -> None:
        now = utcnow()
        lease.hello(
            self.store,
            Worker(
                id=self.id,
                host=socket.gethostname(),
                pid=os.getpid(),
                device="cuda" if has_gpu(self.settings) else "cpu",
                resource_classes=resource_classes(self.settings),
                draining=False,
                started_at=now,
                last_seen_at=now,
            ),
        )
        self._reconciler.start()
        self._thread.start()

    def drain(self) -> None:
        """SIGTERM: the child hears of it, saves and releases its job, and Celery's warm shutdown ends when it is done.

        The bound is ours: Celery's soft shutdown has one, but always sleeps for the whole of it.
        """
        Thread(target=self._give_up_later, name="drain", daemon=True).start()
        lease.draining(self.store, self.id)
        with self.store.begin(readonly=True) as session:
            held = jobs.held(session, owner=self.id)
        for job_id in held:
            self.doorbell.signal(job_id, "wish")

    def child_died(self) -> None:
        lease.worker_lost(self.store, self.doorbell, self.id)

    def stop(self) -> None:
        self._stop.set()
        self._reconciler.stop()
        lease.goodbye(self.store, self.id)

    def _give_up_later(self) -> None:
        sleep(self.settings.drain_grace_s)
        log.error("the job was not released within %.0f s; ending the worker", self.settings.drain_grace_s)
        for child in active_children():
            child.kill()
        try:
            self.child_died()
        finally:  # the store may be away: then the lease ends by itself
            os._exit(1)

    def _say_seen(self) -> None:
        while not self._stop.wait(SEEN_EVERY_S):
            try:
                lease.seen(self.store, self.id)
            except Exception:  # the store is away: said again in ten seconds
                log.warning("could not say that this worker lives", exc_info=True)


parent: Parent | None = None


@signals.setup_logging.connect
def _logging(**_: Any) -> None:
    configure_logging(get_settings())


@signals.worker_ready.connect
def _ready(**_: Any) -> None:
    assert parent is not None
    parent.start()


@signals.worker_init.connect
def _init(**_: Any) -> None:
    global parent  # one per process, made when Celery says that this process is the parent
    parent = Parent(get_settings())


@signals.worker_shutting_down.connect
def _shutting_down(**_: Any) -> None:
    if parent is not None:
        parent.drain()


@signals.worker_shutdown.connect
def _shutdown(**_: Any) -> None:
    if parent is not None:
        parent.stop()


@signals.task_failure.connect
def _task_failure(exception: BaseException | None = None, **_: Any) -> None:
    if parent is not None:  # in the parent only a lost child is reported here
        log.error("the training process died: %s", exception)
        parent.child_died()


@signals.worker_process_init.connect
def _child(**_: Any) -> None:
    if sys.platform == "linux":  # the kernel ends this child when its parent dies, however it dies
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    import workers.runner  # noqa: F401  torch is loaded while the worker waits, not when a job comes
