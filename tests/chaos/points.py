"""Named points in the processes under test at which something can be made to happen, without a hook in the product.

The rig *arms* a folder with files, one an order: which point, at which pass, and what then. A process that comes by a point
looks; the one that takes the file (an unlink succeeds once) obeys. What the rig does not arm costs one look at the folder.
"""

import errno
import functools
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from threading import RLock, get_ident
from typing import Any

FOLDER = "RATCHET_CHAOS_POINTS"
RINGS = "rings"  # a file in the folder: how many messages each ring sends; 0 drops it
FENCING = "RATCHET_CHAOS_FENCING"  # `off`: a worker does not ask whether it still holds its job
REPLAY = "RATCHET_CHAOS_REPLAY"  # `off`: a session believes that its snapshot holds everything
DIGESTS = "RATCHET_CHAOS_DIGESTS"  # `off`: checkpoints are not compared with their manifests

# In the order in which a job comes by.
WORKER_POINTS = (
    "after claim",
    "loading",
    "while sampling",
    "mid update",
    "inside a transaction",
    "after step row",
    "while writing",
    "before fsync",
    "after fsync",
    "between rename and row",
    "between row and ring",
    "between row and delete",
    "before the end",
    "after the end",
)
# In the order in which a session comes by.
SESSION_POINTS = (
    "while sampling",
    "mid update",
    "before an answer",
    "inside a transaction",
    "after an answer",
    "while writing",
    "before fsync",
    "between rename and row",
    "between row and delete",
    "before the end",
)
DRAIN_POINT = "between release and ring"
APPEND_POINT = "between append and answer"
API_POINTS = ("between commit and ring", "between file and row", APPEND_POINT)

_passes: Counter[str] = Counter()
_writing = RLock()  # of the thread that has a writing transaction, on SQLite


def arm(folder: Path, point: str, *, at_pass: int = 1, do: str = "kill") -> Path:
    """The next process that comes by `point` for the `at_pass`-th time does it. The file that is answered vanishes then.

    do: kill (kill -9 itself), stop (SIGSTOP itself), full (the disk is full there), slow (five seconds pass there)
    """
    folder.mkdir(exist_ok=True)
    order = folder / f"{time.time_ns()}.json"
    temporary = order.with_suffix(".new")
    temporary.write_text(json.dumps({"point": point, "pass": at_pass, "do": do}))
    temporary.rename(order)
    return order


def done_by(order: Path) -> int:
    """The process that took an order."""
    return json.loads(order.with_suffix(".done").read_text())["pid"]


def reach(point: str) -> None:
    """Called by the code under test, through the wrappers below."""
    folder = os.environ.get(FOLDER)
    if folder is None:
        return
    for path in sorted(Path(folder).glob("*.json")):
        try:
            order = json.loads(path.read_text())
        except FileNotFoundError:
            continue  # another process took it
        if order["point"] != point:
            continue
        _passes[path.name] += 1
        if _passes[path.name] < order["pass"]:
            continue
        try:
            path.unlink()
        except FileNotFoundError:
            continue
        _obey(order["do"], path)


def _obey(do: str, order: Path) -> None:
    order.with_suffix(".done").write_text(json.dumps({"pid": os.getpid(), "at": time.time()}))
    if do == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif do == "stop":
        with _writing:  # a writer of checkpoints is stopped, and the thread beside it must not keep SQLite locked meanwhile
            signal.pthread_kill(get_ident(), signal.SIGSTOP)  # here, and not when the main thread gets to it
    elif do == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif do == "slow":
        time.sleep(5)


# ---------------------------------------------------------------- the wrappers


def _around(owner: Any, name: str, *, before: str | None = None, after: str | None = None, false_is_done: bool = False) -> None:
    """Put points before and behind every call of owner.name; behind one whose False says that it did nothing, none."""
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            reach(before)
        result = inner(*args, **kwargs)
        if after is not None and (result is not False or false_is_done):
            reach(after)
        return result

    setattr(owner, name, outer)


def install_in_worker() -> None:
    """In a worker's child, once it has loaded everything."""
    import torch

    import workers.runner
    import workers.tenure.resume
    from service.jobs import lease
    from service.store import blobs
    from workers.policy.learner import Learner
    from workers.rollout.local import LocalEngine
    from workers.tenure import keeper, tenure

    _around(lease, "rewind", before="loading")
    _around(LocalEngine, "_forward", before="while sampling")
    _around(torch.optim.AdamW, "step", after="mid update")
    _around(lease.metrics, "write", before="inside a transaction")  # the job's row is locked
    _around(lease, "commit_step", after="after step row", false_is_done=True)
    _around(Learner, "save", after="while writing")  # the weights lie there, progress and manifest do not
    _around(blobs, "_fsync", before="before fsync")
    _around(blobs.Blobs, "_rename", before="after fsync", after="between rename and row")
    _around(lease, "commit_checkpoint", after="between row and ring")
    _around(lease, "retain", after="between row and delete")
    _around(lease, "answer_operations", before="before an answer", after="after an answer", false_is_done=True)
    _around(lease, "commit_snapshot", after="between row and delete")
    _around(lease, "succeed", before="before the end", after="after the end")
    _around(lease, "finish", before="before the end")
    _around(lease, "release", after=DRAIN_POINT)
    inner = lease.claim

    def claim(*args: Any, **kwargs: Any) -> Any:
        claimed = inner(*args, **kwargs)
        if claimed is not None:
            reach("after claim")
        return claimed

    lease.claim = claim
    _note_who_writes()
    if os.environ.get(FENCING) == "off":
        _switch_fencing_off()
    if os.environ.get(REPLAY) == "off":
        _switch_replay_off()
    if os.environ.get(DIGESTS) == "off":
        workers.tenure.resume.verify = lambda folder, manifest_sha256=None: None
    callers = (workers.runner, keeper, tenure)
    assert all(caller.leases is lease for caller in callers), "the wrappers must be what the product calls"


def _note_who_writes() -> None:
    from contextlib import contextmanager, nullcontext

    from service.store.session import Store

    begin = Store.begin

    @contextmanager
    def noted(self: Store, *, readonly: bool = False) -> Any:
        held = nullcontext() if readonly or self.engine.dialect.name != "sqlite" else _writing
        with held, begin(self, readonly=readonly) as session:
            yield session

    write = Store.write

    @contextmanager
    def noted_write(self: Store, *, synced: bool = True) -> Any:
        held = _writing if self.engine.dialect.name == "sqlite" else nullcontext()
        with held, write(self, synced=synced) as connection:
            yield connection

    Store.begin, Store.write = noted, noted_write


def _switch_fencing_off() -> None:
    """What the product would be without its guard: every write of a worker is taken, whoever holds the job now."""
    from contextlib import contextmanager

    from service.jobs import lease
    from service.store import jobs

    @contextmanager
    def holding(store: Any, held: Any, *, small: bool = False) -> Any:
        with store.begin() as session:
            yield session, jobs.find(session, held.job_id, lock=True, light=True)

    @contextmanager
    def stepping(store: Any, held: Any) -> Any:
        with store.write() as connection:
            yield connection, jobs.lock_small(connection, held.job_id)

    lease._holding, lease._stepping = holding, stepping
    lease.renew_all = lambda store, settings, held: dict.fromkeys(held)  # nor does it learn from its renewals


def _switch_replay_off() -> None:
    """What a session would be without its log: it goes on from its snapshot as if nothing had been done since."""
    from workers.sessions.session import Session

    def replays_nothing(self: Session) -> None:
        rows = self._since(self.place.replay_from)
        self.place.seq = max([self.place.seq, *(row.seq for row in rows if row.status != "waiting")])

    Session._replay = replays_nothing


def install_rings() -> None:
    """In every process that rings."""
    from service.doorbell import Doorbell

    once = Doorbell.ring

    def ring(self: Doorbell, job_id: str, resource_class: str) -> bool:
        return all(once(self, job_id, resource_class) for _ in range(_messages_a_ring()))

    Doorbell.ring = ring


def _messages_a_ring() -> int:
    try:
        return int((Path(os.environ[FOLDER]) / RINGS).read_text())
    except (KeyError, FileNotFoundError, ValueError):
        return 1


def install_in_api() -> None:
    from service.jobs import datasets, lifecycle

    _around(lifecycle, "_ring", before="between commit and ring")
    _around(lifecycle, "append_operations", after=APPEND_POINT)
    _around(datasets, "_insert", before="between file and row")
