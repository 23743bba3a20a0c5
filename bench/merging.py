"""What merging is worth: many small loss requests at once, over HTTP, with it and without it in one run.

    python bench/merging.py

A redis-server, the API and two loss workers, of which one merges; each has its turn several times, in alternation. Client and
servers share the machine's cores, so the client is a plain socket. CPU a request is what other work on the machine disturbs
least.
"""

import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

import safetensors.torch
import torch

from service.local.redis_server import redis_argv
from service.relay.line import losses
from service.relay.queue import WorkerQueue
from service.settings import Settings
from service.store.session import upgrade

CONCURRENT = 200
EACH = 5  # requests of each of them in a turn, one after the other
TURNS = 3
ROWS, TOKENS = 4, 64
Result = tuple[float, int, float | None]  # seconds, status, loss
KEY = "tml-bench-0123456789abcdefghijklmnopqrstuvwxyzAB"
PORT = 8765


# ---------------------------------------------------------------- the worker: python bench/merging.py worker on|off


def worker(merging: bool) -> None:
    """Serves once for every line that comes, under the id on that line, until it is asked to stop."""
    from workers.losses.serve import serve

    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        settings = Settings()
        serve(WorkerQueue(settings, losses(settings)), line.strip(), linger=True, merging=merging)
        print("left", flush=True)


# ---------------------------------------------------------------- the stack


@contextmanager
def stack() -> Iterator[tuple[Settings, int, dict[bool, subprocess.Popen[str]]]]:
    """The settings, the API's process id, and the worker of each kind."""
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as name:
        folder = Path(name)
        (folder / "redis").mkdir()
        os.environ |= {
            "RATCHET_ENVIRONMENT": "development",
            "RATCHET_DATA_DIR": name,
            "RATCHET_REDIS_URL": f"redis+socket://{folder / 'redis.sock'}",
            "RATCHET_BOOTSTRAP_KEY": KEY,
            "RATCHET_PORT": str(PORT),
            "RATCHET_LOG_LEVEL": "WARNING",
        }
        settings = Settings()
        upgrade(settings.sql_url)
        quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started: list[Any] = [subprocess.Popen(redis_argv(folder, folder), **quiet)]
        api = subprocess.Popen([sys.executable, "-m", "service"], **quiet)
        started.append(api)
        workers = {}
        for merging in (False, True):
            argv = [sys.executable, __file__, "worker", "on" if merging else "off"]
            workers[merging] = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started += workers.values()
        try:
            for one in workers.values():
                assert one.stdout is not None and one.stdout.readline() == "ready\n"
            yield settings, api.pid, workers
        finally:
            for process in started:
                process.kill()
                process.wait()


def cpu_s(pid: int) -> float:
    """What a process has used so far."""
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


# ---------------------------------------------------------------- the client


def request(seed: int) -> bytes:
    """gspo with gradients, as a safetensors body."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(ROWS, TOKENS, generator=generator) - 0.1
    tensors = {
        "0/log_probs": old + 0.02 * torch.randn(ROWS, TOKENS, generator=generator),
        "0/old_log_probs": old,
        "0/response_mask": torch.ones(ROWS, TOKENS),
        "0/advantages": torch.randn(ROWS, generator=generator),
    }
    asked = {"items": [{"objective": "gspo", "return": ["gradients"]}]}
    body = safetensors.torch.save(tensors, {"request": json.dumps(asked)})
    head = (
        f"POST /v1/losses HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\nPrefer: wait=60\r\n"
        f"Content-Type: application/vnd.safetensors\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def ask(bodies: list[bytes]) -> list[Result]:
    """Send them one after the other over one connection: seconds, status, loss of each."""
    found = []
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
    for body in bodies:
        began = time.perf_counter()
        writer.write(body)
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
        answer = await reader.readexactly(length)
        took_s, status = time.perf_counter() - began, int(head.split(b" ", 2)[1])
        if status != 200:
            print(f"lost: {status} {json.loads(answer).get('code')} after {took_s:.2f} s", file=sys.stderr)
        found.append((took_s, status, loss_of(answer) if status == 200 else None))
    writer.close()
    return found


def loss_of(answer: bytes) -> float:
    header = json.loads(answer[8 : 8 + int.from_bytes(answer[:8], "little")])
    return json.loads(header["__metadata__"]["response"])["data"][0]["loss"]


async def burst(requests: list[list[bytes]]) -> tuple[float, list[Result]]:
    began = time.perf_counter()
    found = await asyncio.gather(*map(ask, requests))
    return time.perf_counter() - began, [one for of_connection in found for one in of_connection]


def until_up() -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            asyncio.run(ask([]))
            return
        except OSError:
            assert time.monotonic() < deadline, "the API did not start"
            time.sleep(0.1)


# ---------------------------------------------------------------- the measurement


@dataclass
class Arm:
    """What was measured of one kind of worker."""

    took_s: float = 0.0
    worker_s: float = 0.0
    api_s: float = 0.0
    results: list[Result] = field(default_factory=list)

    def row(self, name: str) -> str:
        count, times = len(self.results), quantiles((1000 * result[0] for result in self.results), n=100)
        lost = sum(status != 200 for _, status, _ in self.results)
        cpu = [1000 * seconds / count for seconds in (self.worker_s, self.api_s)]
        numbers = (count, lost, count / self.took_s, times[49], times[98])
        return f"{name:12}" + "".join(f"{n:>12.0f}" for n in numbers) + "".join(f"{n:>12.2f}" for n in cpu)


def measure() -> dict[bool, Arm]:
    requests = [[request(seed=EACH * i + k) for k in range(EACH)] for i in range(CONCURRENT)]
    arms = {False: Arm(), True: Arm()}
    with stack() as (settings, api, workers):
        until_up()
        queue = WorkerQueue(settings, losses(settings))
        for turn in range(TURNS + 1):
            for merging, process in workers.items():
                assert process.stdin is not None and process.stdout is not None
                worker_id = f"bench-{turn}-{merging}"
                process.stdin.write(worker_id + "\n")
                process.stdin.flush()
                before = cpu_s(process.pid), cpu_s(api)
                took_s, results = asyncio.run(burst(requests if turn else requests[:20]))
                if turn:  # the first turn warms up
                    arm = arms[merging]
                    arm.took_s += took_s
                    arm.worker_s += cpu_s(process.pid) - before[0]
                    arm.api_s += cpu_s(api) - before[1]
                    arm.results += results
                queue.ask_to_stop(worker_id)
                assert process.stdout.readline() == "left\n"
    return arms


def main() -> None:
    arms = measure()
    pairs = zip(arms[False].results, arms[True].results, strict=True)
    same = all(a[2] is None or b[2] is None or abs(a[2] - b[2]) < 1e-5 for a, b in pairs)
    print(f"{CONCURRENT} at once, each {ROWS} x {TOKENS} tokens, gspo with gradients, safetensors over HTTP, one loss worker")
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}; client, API and worker share them\n")
    columns = ("requests", "lost", "requests/s", "p50 ms", "p99 ms", "worker ms", "API ms")
    print(f"{'':12}" + "".join(f"{column:>12}" for column in columns) + "  (the last two: CPU a request)")
    print(arms[False].row("one by one"))
    print(arms[True].row("merged"))
    throughput, cpu = arms[False].took_s / arms[True].took_s, arms[False].worker_s / arms[True].worker_s
    print(f"\nmerged over one by one: {throughput:.2f} times the throughput, for the worker's CPU time {cpu:.2f} times")
    print(f"the same losses: {'yes' if same else 'NO'}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2] == "on")
    else:
        main()
