"""Rows of a reasoning-gym task, made in a process of their own, where each is the same in every attempt and on every machine.

Some tasks of reasoning-gym 0.1.25 do not derive their rows from the seed alone: isomorphic_strings, knight_swap,
polynomial_multiplication and ransom_note follow the order of sets, which differs from process to process (PYTHONHASHSEED),
and list_functions draws from Python's global generator too.
"""

import os
import pickle
import random
import signal
import subprocess
import sys
import time
from threading import Lock, Thread
from typing import Any

from service.jobs.gym import open_task
from service.spec.data import ReasoningGymSource


class RowMaker:
    """Makes the rows of any source. Its child starts with the first row, again if it was killed, and ends with this process."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = Lock()

    def row(self, source: ReasoningGymSource, index: int) -> dict[str, Any]:
        """Row `index` of the source. ValueError: the task cannot make it. RuntimeError: the child was ended twice."""
        with self._lock:
            status = None
            for _ in range(2):  # a second try, because the child may have been ended from outside
                try:
                    made = self._ask(source, index)
                    break
                except (OSError, EOFError, pickle.UnpicklingError):
                    status = self.close()
                except BaseException:  # its answer would be taken for that of the next row
                    self.close()
                    raise
            else:
                raise RuntimeError(f"the process that makes rows of {source.task} ended with status {status}, at row {index}")
        if isinstance(made, str):
            raise ValueError(f"{source.task} cannot make row {index}: {made}")
        return made

    def close(self) -> int | None:
        """End the child, if there is one. Returns its exit status."""
        child, self._child = self._child, None
        if child is None:
            return None
        child.kill()
        child.communicate()
        return child.returncode

    def __del__(self) -> None:
        self.close()

    def _ask(self, source: ReasoningGymSource, index: int) -> Any:
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "service.jobs.gym_rows"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        assert self._child.stdin is not None and self._child.stdout is not None
        pickle.dump((source, index), self._child.stdin)
        self._child.stdin.flush()
        return pickle.load(self._child.stdout)


def main() -> None:
    """The child: answers sources and numbers from stdin with rows, until its parent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a task prints must not mix with the rows
    tasks: dict[str, Any] = {}
    while True:
        try:
            source, index = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(_row(tasks, source, index), answers)
        answers.flush()


def _end_with(parent: int) -> None:
    """A row may take long: this does not wait for it."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _row(tasks: dict[str, Any], source: ReasoningGymSource, index: int) -> dict[str, Any] | str:
    """The row, or why there is none."""
    try:
        key = source.model_dump_json()
        if key not in tasks:
            tasks[key] = open_task(source.task, source.config, seed=source.seed, size=source.size)
        random.seed(source.seed + index)
        return tasks[key][index]
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
