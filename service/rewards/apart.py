"""Grades in a process of its own, within a time: for a process that works for several projects and must not be held up.

`GradedApart` starts `python -m service.rewards.apart`, which grades answer by answer; patterns are compiled there alone.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from tempfile import TemporaryFile
from time import monotonic
from typing import Any

from service.errors import JobFailed
from service.rewards.rewards import Rewards
from service.rewards.samples import Graded, Sample
from service.rewards.sandbox import MEMORY_BYTES, bare_environment
from service.spec.reward import RewardSpec

WITHIN_S = 60.0  # for all answers together, with the start of the process


class GradedApart:
    """Answers that are being graded, as `Rewards.grade` does, by graders without secrets. Its caller may do other things until
    it is `done`, takes the `result`, or does without it: `close`."""

    def __init__(self, spec: RewardSpec, samples: Sequence[Sample], *, job_id: str) -> None:
        rows = {id(sample.row): sample.row for sample in samples}  # many answers share one, which may be large
        places = {key: place for place, key in enumerate(rows)}
        request = {
            "spec": spec.model_dump(mode="json", by_alias=True),
            "job_id": job_id,
            "memory_bytes": MEMORY_BYTES,
            "rows": list(rows.values()),
            "samples": [[places[id(one.row)], one.prompt, one.completion, one.tokens, one.truncated] for one in samples],
        }
        self._names = [grader.name or grader.kind for grader in spec.graders]
        self._count, self._until = len(samples), monotonic() + WITHIN_S
        self._told = TemporaryFile()  # noqa: SIM115 - `close` does. A file is never full, so that nobody has to read it meanwhile
        with TemporaryFile() as asked:
            asked.write(json.dumps(request).encode())
            asked.seek(0)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "service.rewards.apart"],
                stdin=asked,
                stdout=self._told,
                stderr=subprocess.DEVNULL,
                env=bare_environment(),
                start_new_session=True,  # a Ctrl-C or TERM to the whole group must not cause grading errors
            )

    @property
    def done(self) -> bool:
        return self._process.poll() is not None or monotonic() >= self._until

    def result(self) -> list[Graded]:
        """Waits. Answers that are not graded WITHIN_S from the start have errors that say so. Raises JobFailed if a grader
        cannot work at all."""
        try:
            status = self._process.wait(max(0.0, self._until - monotonic()))
            why = f"the graders' process ended with status {status}"
        except subprocess.TimeoutExpired:
            self._end()
            why = f"the answers of an evaluation are graded for {WITHIN_S:g} s in all"
        self._told.seek(0)
        lines = [json.loads(line) for line in self._told if line.endswith(b"\n")]
        self.close()
        if lines and "failed" in lines[-1]:
            code, detail = lines[-1]["failed"]
            raise JobFailed(code, detail)
        rest = Graded(None, dict.fromkeys(self._names), dict.fromkeys(self._names, f"not graded: {why}"))
        return [Graded(**line) for line in lines] + [rest] * (self._count - len(lines))

    def close(self) -> None:
        self._end()
        self._told.close()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    request: dict[str, Any] = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_AS, (request["memory_bytes"],) * 2)
    with Rewards(RewardSpec.model_validate(request["spec"]), job_id=request["job_id"], secrets={}) as rewards:
        try:
            for row, prompt, completion, tokens, truncated in request["samples"]:
                [graded] = rewards.grade([Sample(prompt, completion, tokens, truncated, request["rows"][row])])
                print(json.dumps(asdict(graded)), flush=True)
        except JobFailed as error:
            print(json.dumps({"failed": [error.code, error.detail]}), flush=True)


if __name__ == "__main__":
    main()
