"""What a read costs at saturation: a mix of routes over 16 connections, against the same routes in a bare FastAPI application
that answers the same bytes from memory, without a store, a key, a check or a log.

    python bench/reads.py [--rounds 5] [--backend sqlite]

Both run under uvicorn in one process each, on all cores, beside the client; they take turns and never run at once.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import uvicorn
from fastapi import FastAPI, Request, Response
from loopback import BACKENDS, Stack, cpu_s, free_port, machine, started, stop, wait_until_ready
from wire import Answer, ask, get, percentile, post

from service.ids import utcnow
from service.jobs import lease as leases
from service.store import rollouts
from service.store.rollouts import RolloutRow
from service.store.session import open_store

AT_ONCE = 16
IN_A_ROUND = 1200
JOBS, STEPS, CURVES = 50, 200, 25
WITH_STEPS = 5  # jobs
SPEC = {
    "kind": "supervised",
    "model": {"source": "tiny"},
    "data": {
        "train": {"source": "inline", "rows": [{"q": str(i), "a": str(i)} for i in range(50)]},
        "prompt": "{q}",
        "answer": "{a}",
    },
    "limits": {"max_steps": 1_000_000},
}
# How often each is asked for, of ten times.
MIX = {
    "/v1/jobs": 2,
    "/v1/jobs?status=running": 1,
    "/v1/jobs/{id}": 3,
    "/v1/jobs/{id}/events?after=100&limit=50": 1,
    "/v1/jobs/{id}/metrics?name=reward/mean&points=100": 2,
    "/v1/jobs/{id}/rollouts?limit=5": 1,
}


# ---------------------------------------------------------------- the yardstick: python bench/reads.py bare FILE PORT


def bare(answers: dict[str, bytes], port: int) -> None:
    app = FastAPI()

    async def answer(request: Request) -> Response:
        url = request.url
        return Response(answers[f"{url.path}?{url.query}" if url.query else url.path], media_type="application/json")

    async def answer_of_job(request: Request, job_id: str) -> Response:
        return await answer(request)

    async def ready() -> Response:
        return Response()

    app.get("/readyz")(ready)
    for path in sorted({path.partition("?")[0] for path in MIX}, key=len):
        app.get(path.replace("{id}", "{job_id}"))(answer_of_job if "{id}" in path else answer)
    uvicorn.run(app, port=port, log_config=None, access_log=False, server_header=False)


# ---------------------------------------------------------------- ours


def fill(stack: Stack) -> list[str]:
    """Jobs, of which some have run for a while. Returns their ids."""
    ask(stack.url, (post("/v1/jobs", stack.key, {**SPEC, "name": f"job {i}"}) for i in range(JOBS)), 4, status=201)
    store, found, draw = open_store(stack.settings), [], Random(0)
    for _ in range(WITH_STEPS):
        claimed = leases.claim(store, stack.settings, "wrk_bench", ["any"])
        assert claimed is not None
        lease, _job = claimed
        found.append(lease.job_id)
        for step in range(1, STEPS + 1):
            point = {"reward/mean": draw.random(), **{f"policy/curve_{i}": draw.random() for i in range(CURVES - 1)}}
            leases.commit_step(store, lease, step, point)
        sample = {"completion": "2 + 2 = 4", "reward": 1.0}
        groups = [RolloutRow("train", STEPS, group, "2 + 2 =", "4", [sample] * 8) for group in range(8)]
        with store.begin() as session:
            rollouts.write(session, lease.job_id, groups, attempt=lease.attempt, now=utcnow())
    store.close()
    return found


def mixed(job_ids: list[str]) -> list[str]:
    """Paths, shuffled, always the same."""
    draw = Random(1)
    once = [path for path, times in MIX.items() for _ in range(times)]
    paths = [path.replace("{id}", draw.choice(job_ids)) for path in once * (IN_A_ROUND // len(once))]
    draw.shuffle(paths)
    return paths


@dataclass
class Arm:
    url: str
    pid: int
    key: str = ""
    took_s: float = 0.0
    cpu_s: float = 0.0
    answers: list[Answer] = field(default_factory=list)

    def turn(self, requests: Sequence[bytes], *, status: int = 200) -> None:
        before, began = cpu_s(self.pid), time.perf_counter()
        self.answers += ask(self.url, requests, AT_ONCE, status=status)  # raises where one has another status
        self.took_s += time.perf_counter() - began
        self.cpu_s += cpu_s(self.pid) - before

    @property
    def rate(self) -> float:
        return len(self.answers) / self.took_s

    def row(self, name: str) -> str:
        times = [answer.took_s for answer in self.answers]
        numbers = (len(times), self.rate, percentile(times, 50), percentile(times, 99), 1000 * self.cpu_s / len(times))
        return f"{name:16}" + "".join(f"{number:12.{digits}f}" for number, digits in zip(numbers, (0, 0, 1, 1, 2), strict=True))


def measure(backend: str, rounds: int) -> tuple[Arm, Arm]:
    with started(backend) as stack:
        paths = mixed(fill(stack))
        ours = Arm(stack.url, stack.processes["API"], stack.key)
        file, port = Path(stack.settings.data_dir) / "answers.json", free_port()
        kinds = sorted(set(paths))
        answers = ask(stack.url, [get(path, stack.key) for path in kinds])
        file.write_text(json.dumps({path: one.body.decode() for path, one in zip(kinds, answers, strict=True)}))
        process = subprocess.Popen([sys.executable, __file__, "bare", str(file), str(port)])
        yardstick = Arm(f"http://127.0.0.1:{port}", process.pid)
        try:
            wait_until_ready(yardstick.url, [process])
            for arm in (ours, yardstick):  # warms up
                ask(arm.url, [get(path, arm.key) for path in paths[:200]], AT_ONCE)
            for _ in range(rounds):
                for arm in (ours, yardstick):
                    arm.turn([get(path, arm.key) for path in paths])
        finally:
            stop([process])
    return ours, yardstick


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="default: both")
    options = parser.parse_args()
    print(f"{machine()}; {AT_ONCE} connections, client and server share the cores\n")
    for backend in options.backend or BACKENDS:
        ours, yardstick = measure(backend, options.rounds)
        columns = ("requests", "requests/s", "p50 ms", "p99 ms", "CPU ms")
        print(f"{backend:16}" + "".join(f"{column:>12}" for column in columns))
        print(ours.row("Ratchet"))
        print(yardstick.row("bare FastAPI"))
        print(f"Ratchet over bare: {ours.rate / yardstick.rate:.3f} of the requests/s; no errors\n", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["bare"]:
        bare({path: body.encode() for path, body in json.loads(Path(sys.argv[2]).read_text()).items()}, int(sys.argv[3]))
    else:
        main()
