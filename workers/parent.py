"""The worker's parent process, apart from what Celery itself does. It does not load torch.

It registers the worker in the store, runs the reconciler, and puts the job of a child that died back into the queue.
"""

import logging
import os
import socket
from contextlib import suppress
from threading import Event, Thread
from time import sleep

import redis
from sqlalchemy.exc import SQLAlchemyError

from service.doorbell import Doorbell
from service.ids import new_id, utcnow
from service.jobs import lease
from service.jobs.reconciler import Reconciler
from service.relay import line
from service.relay.queue import WorkerQueue
from service.settings import Settings
from service.store import jobs
from service.store.session import open_store
from service.store.tables import Worker
from workers import memory
from workers.identity import WORKER_ID, has_gpu, resource_classes
from workers.minder import Minder, kill_children

log = logging.getLogger(__name__)

SEEN_EVERY_S = 10.0


class Parent:
    """The threads of the parent process. `start`, `drain` and `stop` follow Celery's signals."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.store, self.doorbell = settings, open_store(settings), Doorbell(settings)
        self.store.on_deliveries = self.doorbell.ring_couriers
        self._losses = WorkerQueue(settings, line.losses(settings))
        self.id = new_id("wrk")
        os.environ[WORKER_ID] = self.id
        self._started_at, self._draining = utcnow(), False
        self._stop = Event()
        self._reconciler = Reconciler(self.store, settings, self.doorbell)
        self._minder = Minder(self.store, self.doorbell, self.id)
        self._thread = Thread(target=self._say_seen, name="seen", daemon=True)

    def start(self) -> None:
        self._reconciler.start()
        self._minder.start()
        self._thread.start()
        if self.settings.serves != "training":
            self.doorbell.ring_losses()  # for requests left by a worker that is gone; starts a loss-only worker

    def drain(self) -> None:
        """On SIGTERM: the child is told to save and release its job. Celery's warm shutdown ends when the child is done.

        `drain_grace_s` bounds the wait. Celery's soft shutdown has a bound too, but always sleeps for all of it.
        """
        self._draining = True
        # In threads: this is a signal handler, and the interrupted code may hold a lock that this work needs.
        for work in (self._give_up_later, self._stop_losses, self._ask_for_job):
            Thread(target=work, name=work.__name__, daemon=True).start()

    def child_died(self) -> None:
        """Put its job back into the queue, and answer the callers of the loss requests that it was computing."""
        try:
            lease.worker_lost(self.store, self.doorbell, self.id)
        finally:
            if self.settings.serves != "training":
                self._losses_lost()

    def _losses_lost(self) -> None:
        try:
            self._losses.give_up(self.id)
            self._losses.leave()
        except redis.RedisError as error:  # they get their answer when their time limit is over
            log.warning("could not answer the loss requests of a child that died: %s", error)
        self.doorbell.ring_losses()  # for the next child

    def stop(self) -> None:
        self._stop.set()
        self._minder.stop()
        self._reconciler.stop()
        self._thread.join(timeout=10)
        if self.settings.serves != "training":
            with suppress(redis.RedisError):
                self._losses.goodbye(self.id)
        lease.goodbye(self.store, self.id)

    def _ask_for_job(self) -> None:
        """Tell the child to save and release its job. Retried while the store is down."""
        while True:
            try:
                lease.draining(self.store, self.id)
                with self.store.begin(readonly=True) as session:
                    held = jobs.held(session, owner=self.id)
                break
            except SQLAlchemyError as error:
                log.warning("could not ask the child for its job: %s", type(error).__name__)
                if self._stop.wait(1.0):
                    return
        for job_id in held:
            self.doorbell.signal(job_id, "wish")

    def _stop_losses(self) -> None:
        with suppress(redis.RedisError):  # without Redis the child leaves its loop anyway
            self._losses.ask_to_stop(self.id)

    def _give_up_later(self) -> None:
        sleep(self.settings.drain_grace_s)
        log.error("the child was not done within %.0f s; ending the worker", self.settings.drain_grace_s)
        kill_children()
        try:
            self.child_died()
        finally:  # the store may be down: then the lease expires by itself
            os._exit(1)

    def _say_seen(self) -> None:
        """Register this worker, and renew its last_seen_at every SEEN_EVERY_S."""
        while not self._stop.is_set():
            try:
                lease.seen(self.store, self._row())
            except Exception:  # the store is down: tried again in SEEN_EVERY_S
                log.warning("could not say that this worker lives", exc_info=True)
            if self.settings.serves != "training":
                self._say_alive()
            self._stop.wait(SEEN_EVERY_S)

    def _say_alive(self) -> None:
        """Tell the other loss workers that this one lives, and put requests of dead workers back in line."""
        try:
            back = self._losses.alive(self.id)
        except redis.RedisError:
            return  # without Redis there are no loss requests
        if back:
            log.warning("%d loss requests were in the hands of a worker that died; they are in line again", back)
            self.doorbell.ring_losses()

    def _row(self) -> Worker:
        return Worker(
            id=self.id,
            host=socket.gethostname(),
            pid=os.getpid(),
            device="cuda" if has_gpu(self.settings) else "cpu",
            resource_classes=resource_classes(self.settings),
            draining=self._draining,
            started_at=self._started_at,
            last_seen_at=self._started_at,  # put right by `lease.seen`
            memory=memory.taken(gpus=has_gpu(self.settings)),
        )
