"""Child processes that are kept running: restarted with growing pauses, given time to finish on stop, never left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
LIVED_S = 60.0  # a child that ran for this long did not fail at its start
LOG_BYTES = 10 * 2**20  # a longer log is rotated when its child is started
TAIL_LINES = 5

Say = Callable[[str], None]


class Child:
    """One child process with its own session (so a Ctrl-C in the terminal reaches only the parent) and its own log file."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        log: Path,
        say: Say,
        env: Mapping[str, str] | None = None,
        before_start: Callable[[], None] = lambda: None,
    ) -> None:
        self.name, self._argv, self._log, self._say, self._before_start = name, list(argv), log, say, before_start
        self._env = dict(os.environ) | dict(env or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._failures = 0
        self._start_again_at: float | None = None

    def start(self) -> None:
        """Start the child. Call it in a thread that outlives the child, because the kernel kills the child with that thread."""
        self._before_start()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        if self._log.exists() and self._log.stat().st_size > LOG_BYTES:
            self._log.replace(self._log.with_suffix(".old.log"))
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "service.local.tied", str(os.getpid()), *self._argv],
                env=self._env | {"PYTHONSAFEPATH": "1"},  # do not import the caller's own `service` or `workers` folder
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._started_at, self._start_again_at = time.monotonic(), None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def look(self) -> None:
        """Notice that the child died, and restart it when its pause is over. The supervisor calls this all the time."""
        if self._start_again_at is not None:
            if time.monotonic() >= self._start_again_at:
                self.start()
            return
        if self._process is None or self.alive:
            return
        self._end_group()
        self._failures = 0 if time.monotonic() - self._started_at > LIVED_S else self._failures + 1
        pause_s = min(FIRST_PAUSE_S * 2 ** max(0, self._failures - 1), LONGEST_PAUSE_S)
        self._start_again_at = time.monotonic() + pause_s
        again = f"starting it again in {pause_s:.0f} s"
        self._say(f"{self.name} {self.how_it_ended()}; {again}. The end of {self._log}:\n{self.tail()}")

    def how_it_ended(self) -> str:
        code = None if self._process is None else self._process.poll()
        if code is None:
            return "is running"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"

    def tail(self) -> str:
        with suppress(OSError):
            return "\n".join(f"    {line}" for line in self._log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
        return ""

    def stop(self, *, grace_s: float, hurry: Callable[[], bool] = lambda: False) -> None:
        """SIGTERM, up to `grace_s` to finish (less when `hurry`), then SIGKILL to whatever is left of its process group."""
        self._start_again_at = None
        if self._process is None:
            return
        if self.alive:
            self._process.terminate()
            until = time.monotonic() + grace_s
            while self.alive and time.monotonic() < until and not hurry():
                time.sleep(0.05)
        self._end_group()
        self._process.wait()
        self._process = None

    def _end_group(self) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
