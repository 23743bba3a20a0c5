"""Who this worker is and what it runs on, found out without loading torch."""

import os
import socket
from typing import Any

from service.devices import count_gpus, shows_gpu
from service.doorbell import class_of
from service.settings import Settings

WORKER_ID = "RATCHET_WORKER_ID"  # the parent's name, inherited by its child: the owner of leases


def this_process() -> dict[str, Any]:
    """Where a job's work is done, for whoever operates the machine."""
    return {"host": socket.gethostname(), "pid": os.getpid()}


def has_gpu(settings: Settings) -> bool:
    """Whether this worker trains on a GPU."""
    if settings.device == "auto":
        return shows_gpu()
    return settings.device == "cuda"


def resource_classes(settings: Settings) -> list[str]:
    """The jobs that it may claim; none where it is there for losses."""
    if settings.serves == "losses":
        return []
    names = "any", "gpu" if has_gpu(settings) else "cpu"
    return [class_of(name, gpus) for gpus in range(1, gpus_per_job(settings) + 1) for name in names]


def gpus_per_job(settings: Settings) -> int:
    """How many GPUs a job may ask of this worker; without GPUs: processes."""
    return settings.gpus_per_job or (count_gpus() if has_gpu(settings) else 1)
