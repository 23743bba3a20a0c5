"""What is measured in a process of its own, TRL in another interpreter: it does a turn (`turns.py`) when it is told to."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

WITH_TRL = os.environ.get("TRL_PYTHON")


class Peer:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.answer()  # it is ready

    def turn(self) -> Any:
        self._say("go\n")
        return self.answer()

    def leave(self) -> None:
        """Let it end in order."""
        self._say("\n")
        self._process.wait(120)

    def answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"TRL's process ended with {self._process.wait()}")
        return json.loads(line)

    def _say(self, what: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(what)
        self._process.stdin.flush()


def takes_python(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trl", default=WITH_TRL, required=WITH_TRL is None, metavar="PYTHON", help="an interpreter with TRL (TRL_PYTHON)"
    )


def trl(python: str, *arguments: str, log: Path) -> AbstractContextManager[Peer]:
    """`log` gets what its libraries say."""
    return _started([python, str(Path(__file__).with_name("trl_peer.py")), *arguments], log)


def ours(script: str, *arguments: str, log: Path) -> AbstractContextManager[Peer]:
    """A script beside this file, told `side`, in this interpreter."""
    return _started([sys.executable, script, "side", *arguments], log)


@contextmanager
def _started(command: list[str], log: Path) -> Iterator[Peer]:
    with log.open("w") as file:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True)
        try:
            yield Peer(process)
        except BaseException:
            print(log.read_text()[-2000:], file=sys.stderr)
            raise
        finally:
            process.kill()
            process.wait()
