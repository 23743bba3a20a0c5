"""Rank 0's side of the other ranks: it starts them, gives them work, notices when one dies, and ends them.

Work goes out to all ranks at once, and rank 0 does its own share meanwhile. Whatever goes wrong in between leaves the ranks at
different places, so they are ended then; what rank 0 holds is whole and can still be saved.
"""

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from time import monotonic, sleep
from types import TracebackType
from typing import Any, Self, TypeVar

from service.errors import JobFailed
from workers.policy.learner import Learner
from workers.ranks.gradients import add_up, device_of, hand_out, join, leave, lost_touch
from workers.ranks.line import hear, say
from workers.ranks.opening import Opening

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5
NOTICE_S = 20.0  # how long the main thread may meet the ranks when one of them has ended
END_S = 5.0  # how long a rank may take to end, and the process group to be left
EXIT_RANK_LOST = 77
Result = TypeVar("Result")
Call = tuple[Any, ...]  # a verb and its arguments


class Ranks:
    """Use `with Ranks(count, device) as ranks:` and then `ranks.open(...)`, again for other policies. Only for the main thread,
    and one at a time in a process."""

    def __init__(self, count: int, device: str) -> None:
        self.count, self._device = count, device
        self._folder = TemporaryDirectory(prefix="ratchet-ranks-")
        self._children: list[subprocess.Popen[bytes]] = []
        self._lines: list[Connection[Any, Any]] = []
        self._errors: dict[int, Exception] = {}  # which a rank has said, and ended with
        self._joined = False
        self._meets = False  # the main thread may be waiting for all ranks at once, and hears none of them
        self._over = Event()  # they are ended, or about to be
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        self._watch = Thread(target=self._run, name="ranks", daemon=True)

    def __enter__(self) -> Self:
        try:
            for rank in range(1, self.count):
                self._start(rank)
        except BaseException:
            self.end()
            raise
        self._watch.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()

    @property
    def pids(self) -> list[int]:
        return [child.pid for child in self._children]

    @property
    def ended(self) -> bool:
        return self._over.is_set()

    def open(self, opening: Opening, own: Learner) -> None:
        """Let the ranks load what rank 0 has loaded as `own`. Raises JobFailed, of theirs too; ranks_disagree."""
        self.join()
        opening = replace(opening, revision=own.revision)
        self.agree(self.together([("open", opening, self._device)] * (self.count - 1), own.digest))
        own.add_up_gradients(add_up)
        own.hand_out_weights(hand_out)

    def join(self) -> None:
        """Let the ranks form a process group, if they have not. Raises JobFailed rank_lost."""
        if self._joined:
            return
        self.together([("ready",)] * (self.count - 1), lambda: None)
        folder = Path(self._folder.name)
        self.meet(("join", folder, self._device), lambda: join(folder, 0, self.count, device_of(self._device, 0)))
        self._joined = True

    def agree(self, digests: Sequence[bytes]) -> None:
        """Raise JobFailed ranks_disagree unless all ranks hold the same weights."""
        if off := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
            raise JobFailed("ranks_disagree", f"the weights of rank {off[0]} are not those of rank 0")

    def together(self, calls: Sequence[Call | None], own: Callable[[], Result]) -> list[Any]:
        """Each other rank does its call (None: nothing), rank 0 `own`. Returns what they answer, in the order of the ranks."""
        with self.sound():
            self.start(calls)
            return [own(), *(self.hear(rank)[1] if call else None for rank, call in enumerate(calls, 1))]

    def meet(self, call: Call, own: Callable[[], Result]) -> list[Any]:
        """`together`, where the ranks wait for each other inside the call: the process ends if one ends and `own` does not."""
        with self.meeting():
            return self.together([call] * (self.count - 1), own)

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Inside, the ranks wait for each other."""
        self._meets = True
        try:
            yield
        finally:
            self._meets = False

    def start(self, calls: Sequence[Call | None]) -> None:
        """Let each other rank begin with its call."""
        for rank, call in enumerate(calls, 1):
            if call is not None:
                self.tell(rank, call)

    def tell(self, rank: int, message: Any) -> None:
        try:
            say(self._line(rank), message)
        except OSError as error:
            raise self._cause() from error

    def hear(self, rank: int) -> tuple[str, Any]:
        """This rank's next answer: part or done, and the value. Raises the error of a rank, or JobFailed rank_lost."""
        line = self._line(rank)
        try:
            while not line.poll(LOOK_EVERY_S):
                if self._any_ended():  # another one, for which this one may be waiting
                    raise self._cause()
            kind, value = hear(line)
        except (EOFError, OSError) as error:
            raise self._cause() from error
        if kind == "error":
            self._errors[rank] = value
            raise value
        return kind, value

    @contextmanager
    def sound(self) -> Iterator[None]:
        """If the work inside fails, the ranks are ended. Raises the error of another rank, or JobFailed rank_lost, in place of
        what the end of that rank has caused."""
        if self.ended:
            raise JobFailed("rank_lost", "the other ranks of this attempt have ended")
        try:
            yield
        except BaseException as error:
            if self.ended:  # by this in a block inside, which knew the cause
                raise
            follows = isinstance(error, RuntimeError) or _is_loss(error)
            cause = self._cause() if follows and (self._any_ended(within_s=1.0) or lost_touch(error)) else error
            self._kill()
            if cause is not error:
                raise cause from error
            raise

    def end(self) -> None:
        """End the ranks and leave their process group, as they do."""
        self._over.set()
        for line in self._lines:
            line.close()
        leaving = Thread(target=leave, name="leave", daemon=True)
        leaving.start()
        until = monotonic() + END_S
        for child in self._children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, until - monotonic()))
        self._kill()
        leaving.join(END_S)
        self._folder.cleanup()
        if leaving.is_alive():
            log.error("the process group of the ranks cannot be left; ending the process")
            os._exit(EXIT_RANK_LOST)

    # ---------------------------------------------------------------- inside

    def _start(self, rank: int) -> None:
        ours, theirs = socket.socketpair()
        descriptor = theirs.fileno()
        python = [sys.executable, "-P", "-m"]
        argv = [*python, "workers.ranks.follower", *map(str, (rank, self.count, descriptor))]
        tied = [*python, "service.local.tied", str(os.getpid()), *argv]  # it ends with this process, however that ends
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        with theirs:
            self._children.append(subprocess.Popen(tied, stdin=subprocess.DEVNULL, env=environment, pass_fds=[descriptor]))
        self._lines.append(Connection(ours.detach()))

    def _line(self, rank: int) -> "Connection[Any, Any]":
        return self._lines[rank - 1]

    def _kill(self) -> None:
        self._over.set()
        for child in self._children:
            child.kill()
        for child in self._children:
            child.wait()

    def _any_ended(self, *, within_s: float = 0.0) -> bool:
        """Whether a rank has ended; one that says its error first ends with status 0."""
        until = monotonic() + within_s
        while not (ended := any(child.poll() is not None for child in self._children)) and monotonic() < until:
            sleep(0.02)
        return ended

    def _cause(self) -> Exception:
        """Why a rank has ended: its own error, or JobFailed rank_lost."""
        self._any_ended(within_s=1.0)
        ended = {rank: child.returncode for rank, child in enumerate(self._children, 1) if child.returncode is not None}
        for rank in ended:
            line = self._line(rank)
            with suppress(EOFError, OSError):
                while line.poll():
                    kind, value = hear(line)
                    if kind == "error":
                        self._errors[rank] = value
        if own := [error for error in self._errors.values() if not _is_loss(error)]:
            return own[0]
        how = "; ".join(f"the process of rank {rank} ended with status {status}" for rank, status in ended.items())
        return JobFailed("rank_lost", how or "the process of a rank does not answer")

    def _run(self) -> None:
        """`hear` and `tell` notice that a rank has ended. Where the ranks meet the main thread may not, if its GPU waits."""
        since = monotonic()
        while not self._over.wait(LOOK_EVERY_S):
            if not self._meets or not self._any_ended():
                since = monotonic()
            elif monotonic() - since > NOTICE_S:
                log.error("a rank has ended and the others wait for it; ending the process", exc_info=self._cause())
                os._exit(EXIT_RANK_LOST)


def _is_loss(error: BaseException) -> bool:
    return isinstance(error, JobFailed) and error.code == "rank_lost"
