"""Grades in a process of its own, within a time: for a process that works for several projects and must not be held up.

`grade_apart` starts `python -m service.rewards.apart`, which grades answer by answer; patterns are compiled there alone.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from service.errors import JobFailed
from service.rewards.rewards import Rewards
from service.rewards.samples import Graded, Sample
from service.rewards.sandbox import MEMORY_BYTES, bare_environment
from service.spec.reward import RewardSpec

WITHIN_S = 60.0  # for all answers together, with the start of the process


def grade_apart(spec: RewardSpec, samples: Sequence[Sample], *, job_id: str) -> list[Graded]:
    """As `Rewards.grade`, for graders without secrets. Answers that are not graded within WITHIN_S have errors that say so.

    Raises JobFailed if a grader cannot work at all."""
    rows = {id(sample.row): sample.row for sample in samples}  # many answers share one, which may be large
    places = {key: place for place, key in enumerate(rows)}
    request = {
        "spec": spec.model_dump(mode="json", by_alias=True),
        "job_id": job_id,
        "memory_bytes": MEMORY_BYTES,
        "rows": list(rows.values()),
        "samples": [[places[id(one.row)], one.prompt, one.completion, one.tokens, one.truncated] for one in samples],
    }
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "service.rewards.apart"],
            input=json.dumps(request).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=bare_environment(),
            start_new_session=True,  # a Ctrl-C or TERM to the whole group must not cause grading errors
            timeout=WITHIN_S,
        )
        told, why = done.stdout, f"the graders' process ended with status {done.returncode}"
    except subprocess.TimeoutExpired as late:
        told, why = late.stdout or b"", f"the answers of an evaluation are graded for {WITHIN_S:g} s in all"
    lines = [json.loads(line) for line in told.splitlines(keepends=True) if line.endswith(b"\n")]
    if lines and "failed" in lines[-1]:
        code, detail = lines[-1]["failed"]
        raise JobFailed(code, detail)
    names = [grader.name or grader.kind for grader in spec.graders]
    rest = Graded(None, dict.fromkeys(names), dict.fromkeys(names, f"not graded: {why}"))
    return [Graded(**line) for line in lines] + [rest] * (len(samples) - len(lines))


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
