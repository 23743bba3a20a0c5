"""The child's side of the sandbox, `python -m service.rewards.child`. Only service.rewards.sandbox talks to it.

Requests come pickled from the parent on stdin, because rows of reasoning-gym contain more than JSON can express. Answers go
back as lines of JSON, because the parent must not unpickle anything from a process that evaluates untrusted code.
"""

import json
import os
import pickle
import resource
import signal
import sys
from typing import Any

from service.rewards.scorers import SCORERS

# Events of Python's audit hooks. No scorer needs them; an answer that gets a scorer to evaluate it must not use them.
FORBIDDEN = ("subprocess.", "socket.", "ctypes.", "shutil.", "pty.", "urllib.", "os.")
HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.listxattr", "os.getxattr", "os.add_dll_directory")


def main() -> None:
    # This process ends only with its parent: a Ctrl-C or TERM to the whole group must not cause grading errors.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a scorer prints must not mix with the answers

    kind, options, within_s, memory_bytes = pickle.load(sys.stdin.buffer)
    try:
        score = SCORERS[kind](**options)
    except ImportError as error:
        print(json.dumps({"error": f"{error}; is the package installed?"}), file=answers)
        return
    fence(memory_bytes)
    print(json.dumps({"ready": True}), file=answers)
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        print(json.dumps(_answer(score, request, within_s)), file=answers)


def _answer(score: Any, request: tuple[Any, ...], within_s: float) -> dict[str, Any]:
    # Of CPU time, because on a busy machine a right answer may wait. The signal, which is not handled, ends even C code.
    signal.setitimer(signal.ITIMER_PROF, within_s)
    try:
        return {"score": float(score(*request))}
    except BaseException as error:  # an evaluated answer may raise anything, SystemExit too
        return {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def fence(memory_bytes: int) -> None:
    """Bound the memory, and take away what a scorer never needs: other processes, the network, writing files."""
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writing or (event.startswith(FORBIDDEN) and event not in HARMLESS):
        raise PermissionError(f"a grader may not do this ({event})")


if __name__ == "__main__":
    main()
