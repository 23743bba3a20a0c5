"""The Celery app of the workers: `celery -A workers.app worker`.

The parent process (workers.parent) holds no torch. The child (spawned, because CUDA cannot survive a fork) runs one job at a
time, or answers loss requests.
"""

import ctypes
import gc
import logging
import signal
import sys
from typing import Any

from celery import signals
from kombu.entity import Queue

from service import tracing
from service.devices import missing_gpu
from service.doorbell import LOSSES_QUEUE, LOSSES_TASK, RING_TASK, celery_app, queue_name
from service.settings import Settings, get_settings
from service.telemetry import configure_logging, warn_of_unknown_variables
from service.validation.environment import settings_or_exit
from workers.identity import resource_classes
from workers.minder import lead_a_group
from workers.parent import Parent
from workers.tasks import losses, train

log = logging.getLogger(__name__)


def queues(settings: Settings) -> list[str]:
    """The queues that this worker listens to: jobs, loss requests, or both."""
    return [queue_name(name) for name in resource_classes(settings)] + [LOSSES_QUEUE] * (settings.serves != "training")


app = celery_app(settings_or_exit())
app.conf.task_queues = [Queue(name) for name in queues(get_settings())]
app.conf.imports = ["workers.app"]  # the spawned child builds its own app from these settings
app.task(name=RING_TASK, shared=False)(train)
app.task(name=LOSSES_TASK, shared=False)(losses)

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
    settings = get_settings()
    warn_of_unknown_variables()
    if wrong := missing_gpu(settings.device):
        raise SystemExit(wrong)
    parent = Parent(settings)


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
    if parent is not None:  # the parent gets this signal only for a child that died
        log.error("the child died: %s", exception)
        parent.child_died()


@signals.worker_process_init.connect
def _child(**_: Any) -> None:
    lead_a_group()
    tracing.start("worker")
    if sys.platform == "linux":  # the kernel ends this child when its parent dies, however it dies
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    gc.disable()  # nothing of what is imported is garbage; to look for it there takes a fifth of the time
    if get_settings().serves != "losses":
        import workers.runner
    if get_settings().serves != "training":
        import workers.losses.serve  # noqa: F401  torch is loaded while the worker waits, not when a job comes
    gc.freeze()
    gc.enable()


@signals.worker_process_shutdown.connect
def _child_ends(**_: Any) -> None:
    tracing.stop()
