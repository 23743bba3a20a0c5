"""Stop the stack that runs from a data directory."""

import fcntl
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import TextIO

from service.errors import NotFound
from service.local.place import LOCK

LOOK_S = 0.1
LOOKS = 20  # an `up` that has just taken the lock has not yet written its number
PROC = Path("/proc")


def down(data_dir: Path, say: Callable[[str], None]) -> None:
    """As Ctrl-C in its terminal would, and wait for its end. Raises NotFound if none runs there that it may stop."""
    try:
        file = (data_dir / LOCK).open()
    except OSError:
        raise _nothing(data_dir) from None
    with file:
        process = _find(file, data_dir)
        say(f"stopping process {process}; a running job is saved first")
        try:
            os.kill(process, signal.SIGTERM)
        except ProcessLookupError:
            return  # it has just ended
        except PermissionError:
            raise _of_another(process, data_dir) from None
        while _may_hold(process, file):
            sleep(LOOK_S)


def _find(file: TextIO, data_dir: Path) -> int:
    """The process of this machine that holds the lock."""
    said = ""
    for _ in range(LOOKS):
        if _is_free(file.fileno()):
            raise _nothing(data_dir)
        file.seek(0)
        said = file.read().strip()
        try:
            if said.isdecimal() and _holds(int(said), file):
                return int(said)
        except PermissionError:
            raise _of_another(int(said), data_dir) from None
        sleep(LOOK_S)
    raise NotFound(
        f"process {said or 'unknown'}, which runs from {data_dir}, is not on this machine. "
        "Run `ratchet down` on the machine or in the container where it was started"
    )


def _holds(process: int, file: TextIO) -> bool:
    """Whether a process of this number has the lock file open: the number may be of another machine or container."""
    if process == os.getpid():
        return False
    if not PROC.joinpath("self").exists():  # macOS
        shown = subprocess.run(["ps", "-o", "command=", "-p", str(process)], capture_output=True, text=True, check=False)
        return "up" in shown.stdout.split() and ("ratchet" in shown.stdout or "service.cli" in shown.stdout)
    lock = os.fstat(file.fileno())
    try:
        opened = list(PROC.joinpath(str(process), "fd").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return False
    for each in opened:
        try:
            if os.path.samestat(each.stat(), lock):
                return True
        except (FileNotFoundError, ProcessLookupError):
            continue
    return False


def _may_hold(process: int, file: TextIO) -> bool:
    try:
        return _holds(process, file)
    except PermissionError:  # it was ours to look at until it ended
        return False


def _is_free(file: int) -> bool:
    """Whether no `ratchet up` holds the lock. It takes it for an instant, for which a starting `up` waits."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(file, fcntl.LOCK_UN)
    return True


def _nothing(data_dir: Path) -> NotFound:
    return NotFound(f"no `ratchet up` runs from {data_dir}. Name its directory with --data-dir")


def _of_another(process: int, data_dir: Path) -> NotFound:
    return NotFound(
        f"process {process}, which the lock of {data_dir} names, is another user's here. "
        "Run `ratchet down` as the user, and on the machine or in the container, that started it"
    )
