"""A child process for graders that may run without end: sympy on a model's formula, or a scorer that evaluates an answer.

The child has no secrets in its environment and little memory. An alarm ends it if one answer takes too long, even inside C
code. It also ends when this process does, however that happens.
"""

import json
import os
import pickle
import select
import signal
import subprocess
import sys
from time import monotonic
from typing import Any

from service.errors import JobFailed
from service.rewards.samples import NotGraded, Outcome, one_by_one

ANSWER_WITHIN_S = 5.0
MEMORY_BYTES = 4 * 2**30
START_WITHIN_S = 120.0
GRACE_S = 25.0  # by the clock, beyond the CPU time that the child allows itself


def bare_environment() -> dict[str, str]:
    """What a child needs to start, without this process's secrets."""
    return {
        "PATH": os.environ.get("PATH", ""),
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",  # a scorer that goes through a set does so in the same order in every attempt
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }


class Sandbox:
    """One child, started at the first request, and restarted at the next one after it has ended. See service.rewards.child."""

    def __init__(
        self,
        kind: str,
        options: dict[str, Any],
        pointer: str,
        *,
        within_s: float | None = None,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        """`within_s`: the CPU time for one answer, by default ANSWER_WITHIN_S. `memory_bytes`: the limit of the child's address
        space during its whole life."""
        self._kind, self._options, self._pointer = kind, options, pointer
        self._within_s, self._memory_bytes = within_s or ANSWER_WITHIN_S, memory_bytes
        self._child: subprocess.Popen[bytes] | None = None

    def ask_all(self, requests: list[tuple[Any, ...]]) -> list[Outcome]:
        return one_by_one(self._ask, requests)

    def close(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()

    def _ask(self, request: tuple[Any, ...]) -> Outcome:
        code = None
        for _ in range(2):  # a second try, because the child may have been ended from outside
            began, longest_s = monotonic(), self._within_s + GRACE_S
            answer = self._exchange(request, longest_s)
            if answer is not None:
                return NotGraded(answer["error"]) if "error" in answer else float(answer["score"])
            code = self._end()
            if code == -signal.SIGPROF:
                return NotGraded(f"took longer than {self._within_s:g} s to grade")
            if monotonic() - began >= longest_s:
                return NotGraded(f"was not graded within {longest_s:g} s")
        return NotGraded(f"the grader's process ended with status {code} on this answer")

    def _exchange(self, request: tuple[Any, ...], within_s: float) -> dict[str, Any] | None:
        """The child's answer, or None if it died or is late."""
        child = self._child or self._start()
        try:
            self._send(child, request)
        except OSError:
            return None
        return self._receive(child, within_s)

    def _start(self) -> subprocess.Popen[bytes]:
        child = self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "service.rewards.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=bare_environment(),
            bufsize=0,
        )
        try:
            self._send(child, (self._kind, self._options, self._within_s, self._memory_bytes))
            hello = self._receive(child, START_WITHIN_S)
        except OSError:
            hello = None
        if hello is None or "error" in hello:
            code = self._end()
            reason = hello["error"] if hello else f"its process did not start (status {code})"
            raise JobFailed(
                "grader_unavailable",
                f"the grader {self._kind} cannot work here: {reason}",
                pointer=self._pointer,
            )
        return child

    def _end(self) -> int | None:
        """Kill the child if it still runs. Returns its exit status."""
        child = self._child
        if child is None:
            return None
        try:
            child.wait(0.2)
        except subprocess.TimeoutExpired:
            child.kill()
        self.close()
        return child.returncode

    @staticmethod
    def _send(child: subprocess.Popen[bytes], message: Any) -> None:
        assert child.stdin is not None
        payload = memoryview(pickle.dumps(message))
        while payload:
            payload = payload[child.stdin.write(payload) :]

    @staticmethod
    def _receive(child: subprocess.Popen[bytes], within_s: float) -> dict[str, Any] | None:
        assert child.stdout is not None
        deadline, line = monotonic() + within_s, b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([child.stdout], [], [], max(0.0, deadline - monotonic()))
            part = os.read(child.stdout.fileno(), 65_536) if ready else b""
            if not part:
                return None
            line += part
        return json.loads(line)
