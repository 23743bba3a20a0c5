"""The Celery workers of an embedded stack: one that trains, and one that answers loss requests."""

import logging
import os
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

from service.devices import missing_gpu
from service.doorbell import Doorbell
from service.jobs import lease
from service.local.children import Child, Say
from service.local.place import CannotStart
from service.settings import Settings
from service.store import jobs
from service.store.session import open_store

log = logging.getLogger(__name__)

# Like `celery -A workers.app worker`. But Celery puts the current directory first on the path, where a user may have another
# `workers`, unless it is already on the path. So it is appended here, after our own packages.
START = """
import os, sys, workers
sys.path += [os.path.dirname(workers.__path__[0]), os.getcwd()]
from workers.app import app
app.worker_main(["worker", "--without-gossip", "--without-mingle", *sys.argv[1:]])
"""


def check_worker_can_run(settings: Settings) -> None:
    if wrong := missing_gpu(settings.device):
        raise CannotStart(wrong)
    missing = [name for name in ("torch", "transformers", "peft") if find_spec(name) is None]
    if missing:
        raise CannotStart(f"a worker needs {', '.join(missing)}: pip install 'ratchet-rl[worker,embedded]'")


def make_worker(settings: Settings, say: Say) -> Child | None:
    """The training worker; None if RATCHET_SERVES is losses."""
    if settings.serves == "losses":
        return None
    return Child(
        "the worker",
        _argv("training"),
        log=settings.data_dir / "logs" / "worker.log",
        say=say,
        env={"RATCHET_SERVES": "training"},
        before_start=lambda: settle_the_dead(settings),
    )


def make_loss_worker(settings: Settings, say: Say) -> Child | None:
    """The loss worker; None if RATCHET_SERVES is training. It is separate, because a training worker is busy for the whole of
    its job."""
    if settings.serves == "training":
        return None
    log = settings.data_dir / "logs" / "losses.log"
    environment = {"RATCHET_SERVES": "losses", "RATCHET_DEVICE": "cpu"}
    return Child("the loss worker", _argv("losses"), log=log, say=say, env=environment)


def _argv(name: str) -> list[str]:
    return [sys.executable, "-c", START, "--hostname", f"{name}@%h"]  # nodes with equal names would be confused


def settle_the_dead(settings: Settings) -> None:
    """Put the jobs of killed workers of this machine back into the queue now, before their leases expire."""
    store, doorbell = open_store(settings), Doorbell(settings)
    store.on_deliveries = doorbell.ring_couriers
    try:
        with store.begin(readonly=True) as session:
            owners = jobs.owners(session)
        for owner, row in owners.items():
            if row is not None and row.host == socket.gethostname() and not is_alive(row.pid):
                lease.worker_lost(store, doorbell, owner)
    except Exception:  # the leases then expire by themselves, later
        log.warning("could not settle the jobs of workers that are gone; their leases will end", exc_info=True)
    finally:
        doorbell.close()
        store.close()


def is_alive(pid: int) -> bool:
    """Whether the process runs. A killed process that its parent has not waited for yet (a zombie) does not run."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # no /proc here; or it has just ended, and its lease will expire
        return True
    return stat.rpartition(")")[2].split()[0] != "Z"
