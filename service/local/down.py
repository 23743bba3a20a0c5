"""Stop the stack that runs from a data directory."""

import fcntl
import os
import signal
from collections.abc import Callable
from pathlib import Path
from time import sleep

from service.errors import NotFound
from service.local.place import LOCK

LOOK_S = 0.1


def down(data_dir: Path, say: Callable[[str], None]) -> None:
    """As Ctrl-C in its terminal would, and wait until it has stopped. Raises NotFound if none runs from there."""
    try:
        file = (data_dir / LOCK).open()
    except OSError:
        raise _nothing(data_dir) from None
    with file:
        if _is_free(file.fileno()):
            raise _nothing(data_dir)
        process = int(file.read())
        say(f"stopping process {process}; a running job is saved first")
        try:
            os.kill(process, signal.SIGTERM)
        except ProcessLookupError:  # it has just ended, or runs in another container
            if not _is_free(file.fileno()):
                raise NotFound(f"process {process}, which runs from {data_dir}, is not on this machine") from None
        while not _is_free(file.fileno()):
            sleep(LOOK_S)


def _is_free(file: int) -> bool:
    """Whether no `ratchet up` holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(file, fcntl.LOCK_UN)
    return True


def _nothing(data_dir: Path) -> NotFound:
    return NotFound(f"no `ratchet up` runs from {data_dir}. Name its directory with --data-dir")
