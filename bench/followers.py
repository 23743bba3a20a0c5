"""200 followers of one running job over server-sent events: is every event told, and how long does it take?

    python bench/followers.py [--followers 200] [--events 200] [--backend sqlite]

A process of its own plays the worker: it commits steps at a steady rate and signals, as a worker does. The delay is from the
event's commit to its arrival in the client, who shares the clock; with one follower and with all of them. Then a burst: steps
as fast as they can be committed, which says how much can be told in a second. Every follower must have got 1, 2, 3 ... without
a gap, in all three.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field

from loopback import BACKENDS, Stack, cpu_s, machine, started
from wire import connect, get, percentile

from service.doorbell import Doorbell
from service.jobs import lease as leases
from service.settings import Settings
from service.store.session import open_store

EVERY_S = 0.1  # between two steps
WITHIN_S = 120.0  # or an event is lost
SPEC = {
    "kind": "supervised",
    "name": "followed",
    "model": {"source": "tiny"},
    "data": {"train": {"source": "inline", "rows": [{"q": "1", "a": "1"}]}, "prompt": "{q}", "answer": "{a}"},
    "limits": {"max_steps": 1_000_000},
}


# ---------------------------------------------------------------- the worker: python bench/followers.py worker


def worker() -> None:
    """For every line `STEPS SECONDS` on stdin: claim a job, commit so many steps so far apart, end it; answer the times."""
    settings = Settings()
    store, doorbell = open_store(settings), Doorbell(settings)
    print("ready", flush=True)
    for line in sys.stdin:
        steps, every_s = int(line.split()[0]), float(line.split()[1])
        claimed = leases.claim(store, settings, "wrk_bench", ["any"])
        assert claimed is not None
        lease, _ = claimed
        committed: dict[int, float] = {}
        due = time.monotonic()
        for step in range(1, steps + 1):
            due += every_s
            time.sleep(max(0.0, due - time.monotonic()))
            leases.commit_step(store, lease, step, {"reward/mean": 0.5, "loss": 1.0, "policy/approx_kl_k3": 0.01})
            committed[step] = time.monotonic()
            doorbell.signal(lease.job_id, "events")
        leases.succeed(store, lease, {"reason": "max_steps"}, "max_steps")
        doorbell.signal(lease.job_id, "events")
        print(json.dumps(committed), flush=True)


# ---------------------------------------------------------------- the followers


@dataclass
class Follower:
    """What one client got: when each step arrived, and the numbers of all events in order."""

    opened: asyncio.Event = field(default_factory=asyncio.Event)
    arrived: dict[int, float] = field(default_factory=dict)
    seqs: list[int] = field(default_factory=list)

    async def follow(self, stack: Stack, job_id: str) -> None:
        """Until the stream ends with the job."""
        reader, writer = await connect(stack.url)
        writer.write(get(f"/v1/jobs/{job_id}/events", stack.key, Accept="text/event-stream"))
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in head.partition(b"\r\n")[0], head
        type_, told = b"", b""
        while line := await reader.readline():
            if line.startswith(b"event: "):
                type_ = line[7:-1]
            elif line.startswith(b"data: "):
                told = line[6:]
            elif line.startswith(b"id: "):
                self.seqs.append(int(line[4:]))
                if type_ == b"step":
                    now = time.monotonic()
                    self.arrived[json.loads(told)["data"]["step"]] = now
                if len(self.seqs) == 2:  # created, queued: now it waits
                    self.opened.set()
            elif line == b"0\r\n":
                break
        writer.close()


@dataclass
class Found:
    delays: list[float]
    lost: int
    took_s: float
    api_s: float


async def follow(stack: Stack, process: subprocess.Popen[str], count: int, steps: int, every_s: float) -> Found:
    submitted = stack.ratchet._transport.attempt("POST", "/v1/jobs", json=SPEC)
    job_id = submitted.json()["id"]
    followers = [Follower() for _ in range(count)]
    tasks = [asyncio.create_task(one.follow(stack, job_id)) for one in followers]
    for one in followers:
        await asyncio.wait_for(one.opened.wait(), WITHIN_S)
    assert process.stdin is not None and process.stdout is not None
    before, began = cpu_s(stack.processes["API"]), time.monotonic()
    process.stdin.write(f"{steps} {every_s}\n")
    process.stdin.flush()
    await asyncio.wait_for(asyncio.gather(*tasks), WITHIN_S)
    took_s, api_s = time.monotonic() - began, cpu_s(stack.processes["API"]) - before
    committed = {int(step): at for step, at in json.loads(process.stdout.readline()).items()}
    last = stack.ratchet._transport.attempt("GET", f"/v1/jobs/{job_id}").json()["last_event"]
    lost = sum(last - len(one.seqs) for one in followers)
    assert all(one.seqs == sorted(set(one.seqs)) for one in followers), "an event came twice or too early"
    delays = [at - committed[step] for one in followers for step, at in one.arrived.items()]
    return Found(delays, lost, took_s, api_s)


def measure(backend: str, followers: int, steps: int) -> dict[str, Found]:
    with started(backend) as stack:
        environment = {
            "RATCHET_ENVIRONMENT": "development",
            "RATCHET_DATA_DIR": str(stack.settings.data_dir),
            "RATCHET_DATABASE_URL": stack.settings.sql_url,
            "RATCHET_REDIS_URL": stack.settings.redis_url.get_secret_value(),
        }
        argv = [sys.executable, __file__, "worker"]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
            try:
                assert process.stdout is not None and process.stdout.readline() == "ready\n"
                runs = {"1 follower": (1, EVERY_S), f"{followers} followers": (followers, EVERY_S), "a burst": (followers, 0.0)}
                return {name: asyncio.run(follow(stack, process, count, steps, s)) for name, (count, s) in runs.items()}
            finally:
                process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--followers", type=int, default=200)
    parser.add_argument("--events", type=int, default=200)
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="default: both")
    options = parser.parse_args()
    print(f"{machine()}; client, API, worker and database share them")
    print(f"{options.events} steps, {1 / EVERY_S:g} a second; in the burst all at once\n")
    for backend in options.backend or BACKENDS:
        found = measure(backend, options.followers, options.events)
        columns = ("p50 ms", "p95 ms", "p99 ms", "lost", "told/s", "API CPU s")
        print(f"{backend:16}" + "".join(f"{column:>12}" for column in columns))
        for name, one in found.items():
            delays = "".join(f"{percentile(one.delays, part):12.1f}" for part in (50, 95, 99))
            print(f"{name:16}{delays}{one.lost:12}{len(one.delays) / one.took_s:12.0f}{one.api_s:12.2f}")
        alone, many = (percentile(one.delays, 95) for one in list(found.values())[:2])
        print(f"p95 with {options.followers} over p95 with one: {many / alone:.1f}\n", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker()
    else:
        main()
