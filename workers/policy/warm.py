"""The base of the last job, kept for the next job of the same base, which then loads no model.

Only weights that no job has changed are kept: those below adapters, once the adapters are gone. At most one base is kept. It is
dropped before another one is loaded, when it has waited for too long, and when memory gets short meanwhile.
"""

import gc
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event, Lock, Thread
from time import monotonic
from weakref import WeakKeyDictionary

import torch

from service.spec.model import Full, ModelSpec, TinyConfig
from workers.policy.base import Base
from workers.policy.chat import Chat
from workers.policy.load import adapter_of, commit_of, dtype_of, model_folder, pick_device, saved_adapter

log = logging.getLogger(__name__)

LOOK_S = 5.0  # between two looks at the memory that is left


@dataclass(frozen=True)
class Origin:
    """All that decides what a base computes."""

    source: str | None
    tiny: TinyConfig | None
    files: tuple[tuple[str, ...], ...]  # of a folder: names, sizes, times and inodes
    commit: str | None  # of a hub model
    dtype: torch.dtype
    device: torch.device
    threads: int


@dataclass(eq=False)
class _Kept:
    base: Base
    origin: Origin
    taken: Event = field(default_factory=Event)
    watch: Thread | None = None


class WarmBase:
    """For the main thread. `keep_s`: how long a base waits for a job; 0: none is kept. `roomy`: whether there is memory left
    beside a base."""

    def __init__(self, keep_s: float, roomy: Callable[[Base], bool] | None = None) -> None:
        self._keep_s, self._roomy = keep_s, roomy or _roomy
        self._lock = Lock()  # the thread that watches the memory may drop the base
        self._kept: _Kept | None = None
        self._origins = WeakKeyDictionary[Base, Origin]()  # of those that are at work

    def load(
        self, model: ModelSpec, *, device: str, threads: int, checkpoint: Path | None = None, revision: str | None = None
    ) -> Base:
        """As `Base.load`, to the bit; without loading if the base that waits is this one."""
        if isinstance(adapter_of(model), Full):  # its learner will change it
            self.drop()
            return Base.load(model, device=device, threads=threads, checkpoint=checkpoint, revision=revision)
        if checkpoint is not None:
            revision = saved_adapter(model_folder(checkpoint, adapter_of(model))).revision
        # Looked at before the files are read: if they change meanwhile, the next look differs from this one.
        origin = _origin(model, pick_device(device), threads)
        if (kept := self._take()) is not None and _is_of(kept.origin, origin, revision or model.revision):
            log.info("the base %s is still in memory", model.source)
            base, origin = kept.base, kept.origin
        else:
            if kept is not None:
                del kept
                _free()
            base = Base.load(model, device=device, threads=threads, checkpoint=checkpoint, revision=revision)
        self._origins[base] = replace(origin, commit=base.revision)
        return base

    def keep(self, base: Base) -> None:
        """The job that asked for this base has come to a good end: without the job's adapters it waits for the next."""
        origin = self._origins.pop(base, None)
        if origin is None or self._keep_s == 0:
            return
        base.adapters.clear()
        base.text.chat = Chat(base.text.tokenizer)  # it remembers what the template showed of this job's messages
        if base.engine.pending or not self._roomy(base):
            return
        kept = self._kept = _Kept(base, origin)
        kept.watch = Thread(target=self._watch, args=[kept], name="warm-base", daemon=True)
        kept.watch.start()

    def drop(self) -> None:
        """No base is kept from now on, and its memory is free."""
        if self._take() is not None:
            _free()

    def _take(self) -> _Kept | None:
        with self._lock:
            kept, self._kept = self._kept, None
        if kept is not None and kept.watch is not None:
            kept.taken.set()
            kept.watch.join()  # else it would still hold the base
        return kept

    def _watch(self, kept: _Kept) -> None:
        until = monotonic() + self._keep_s
        while (left_s := until - monotonic()) > 0 and self._roomy(kept.base):
            if kept.taken.wait(min(LOOK_S, left_s)):
                return
        with self._lock:
            if self._kept is not kept:
                return
            self._kept = None
        log.info("the base %s is dropped: %s", kept.origin.source, "memory gets short" if left_s > 0 else "no job wants it")
        del kept
        _free()


def _free() -> None:
    gc.collect()  # the parts of a model know each other
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _is_of(kept: Origin, wanted: Origin, revision: str | None) -> bool:
    """Whether that base is the one that would be loaded now, from this revision of a hub model: a branch may have moved."""
    if kept != replace(wanted, commit=kept.commit):
        return False
    return kept.commit in (None, revision) or kept.commit == commit_of(str(wanted.source), revision)


def _origin(model: ModelSpec, device: torch.device, threads: int) -> Origin:
    tiny = (model.tiny or TinyConfig()) if model.source == "tiny" else None
    folder = Path(model.source or "")
    there = sorted(folder.rglob("*")) if model.source and tiny is None and folder.is_dir() else []
    return Origin(model.source, tiny, tuple(map(_identity, there)), None, dtype_of(model, device), device, threads)


def _identity(path: Path) -> tuple[str, ...]:
    with suppress(OSError):
        at = path.stat()
        return (str(path), *map(str, (at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns)))
    return (str(path),)


def _roomy(base: Base) -> bool:
    """Whether this machine, or this GPU, has as much memory left as the base takes."""
    if base.device.type == "cuda":
        left = torch.cuda.mem_get_info(base.device)[0]
    else:
        left = _available()
    return left is None or left >= sum(weight.nbytes for weight in base.model.parameters())


def _available() -> int | None:
    """Bytes; None where the system does not say."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return None
