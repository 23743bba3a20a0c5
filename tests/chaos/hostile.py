"""One key that does all that it may, beside one that behaves: what the second notices of the first.

What the hostile key sends fits every bound, or is just refused by it: nothing here hurts, and that is what is measured.
"""

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx

from chaos.rig import Rig
from job_specs import RL
from service.edge.bodies import MAX_YAML_BYTES
from service.edge.documents import MAX_KEYS
from service.spec.patterns import MAX_UNROLLED
from service.spec.schemas import MAX_ENUM
from service.store import keys
from service.validation.strict_json import MAX_VALUES

AT_ONCE = 24  # requests of the hostile key, more than its shares
STREAMS = 40
# Of the API: lower than the defaults, so that a bound is met within seconds.
BOUNDS = {
    "RATCHET_MAX_BODY_BYTES": str(2**20),
    "RATCHET_MAX_DATASET_BYTES": str(4 * 2**20),
    "RATCHET_MAX_LOSS_BODY_BYTES": str(2**20),
    "RATCHET_MAX_WAITING_LOSS_BYTES": str(4 * 2**20),
    "RATCHET_KEY_REQUESTS_AT_ONCE": "8",
    "RATCHET_KEY_OPEN_STREAMS": "16",
}

LOCK = threading.Lock()
Act = Callable[[httpx.Client], httpx.Response]


def _job(grader: dict[str, Any]) -> bytes:
    return json.dumps(RL | {"reward": {"graders": [grader]}}).encode()


def acts(client: httpx.Client, job_id: str) -> dict[str, Act]:
    """What the hostile key does, by name. `job_id` is a job of its own; a large one and a dataset are made here."""
    enum = _job({"kind": "json_schema", "schema": {"enum": [f"value {n}" for n in range(MAX_ENUM)]}})
    old_enum = enum.replace(b'{"enum"', b'{"$schema": "http://json-schema.org/draft-04/schema#", "enum"')
    refused = _job({"kind": "regex", "pattern": f"a{{{MAX_UNROLLED // 20}}}["})
    costly = _job({"kind": "regex", "pattern": f"a{{{MAX_UNROLLED // 20}}}"})
    yaml = b"metadata: {values: [" + b"1," * ((MAX_YAML_BYTES - 40) // 2) + b"1]}"
    values = json.dumps(RL | {"metadata": {"values": [1] * (MAX_VALUES - 100)}}, separators=(",", ":")).encode()
    unknown = _job({"kind": "exact", "reference": "1"} | {f"referenc{n}": 1 for n in range(MAX_KEYS - 2)})
    rows = b'{"a":1}\n' * (2**19)
    losses = json.dumps({"items": [{"log_probs": [[-1.0] * 100_000], "advantages": [1.0]}]}).encode()

    large = client.post("/v1/jobs", content=values).json()["id"]
    dataset = client.post("/v1/datasets", content=rows, headers={"Content-Type": "application/jsonl"}).json()["id"]

    def post(path: str, body: bytes, kind: str = "application/json", **headers: str) -> Act:
        return lambda client: client.post(path, content=body, headers={"Content-Type": kind, **headers})

    return {
        "a long enum": post("/v1/jobs", enum),
        "an old draft": post("/v1/jobs", old_enum),
        "a pattern that is none": post("/v1/jobs", refused),
        "a costly pattern, dry": post("/v1/jobs:validate", costly),
        "YAML": post("/v1/jobs", yaml, "application/yaml"),
        "many values": post("/v1/jobs", values),
        "unknown keys": post("/v1/jobs", unknown),
        "a large job": lambda client: client.get(f"/v1/jobs/{large}"),
        "the last rows": lambda client: client.get(
            f"/v1/datasets/{dataset}/rows", params={"offset": 2**19 - 1000, "limit": 1000}
        ),
        "many rows": post("/v1/datasets", rows, "application/jsonl"),
        "losses": post("/v1/losses", losses),
        "a long poll": lambda client: client.get(f"/v1/jobs/{job_id}", params={"wait_s": 2}),
        "a list": lambda client: client.get("/v1/jobs", params={"limit": 100, "name": "%" * 100}),
        "many ranges": lambda client: client.get("/v1/losses/loss_x", headers={"Accept": "a/b;q=0.1," * 2000}),
    }


@dataclass
class Played:
    """What came of it. Seconds and bytes; statuses by what was done."""

    statuses: dict[str, Counter[int]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)  # of each request of the well-behaved key
    behaved: Counter[int] = field(default_factory=Counter)  # its statuses
    streams: int = 0  # of STREAMS that were asked for together
    grown_bytes: int = 0  # of the API's own memory, at most

    @property
    def p99_s(self) -> float:
        return sorted(self.seconds)[int(len(self.seconds) * 0.99)]

    @property
    def server_errors(self) -> int:
        return sum(count for one in (*self.statuses.values(), self.behaved) for status, count in one.items() if status >= 500)


def play(rig: Rig, *, seconds: float, hostile: bool = True) -> Played:
    """An API of its own over the rig's stores, and both keys at it. Without `hostile` the second is alone: the control."""
    api = rig.start_api(**BOUNDS)
    with _client(rig.api_url, _key(rig, "behaved")) as client, ExitStack() as stack:
        played, stop, before = Played(), threading.Event(), _memory(api.pid)
        watch = threading.Thread(target=_watch_memory, args=(api.pid, before, played, stop))
        watch.start()
        stack.callback(watch.join)
        stack.callback(stop.set)
        if not hostile:
            _behave(client, played, time.monotonic() + seconds)
            return played
        # A process of its own: this one shall measure the API, and not its own threads.
        argv = [sys.executable, "-m", "chaos.hostile", rig.api_url, _key(rig, "hostile")]
        with subprocess.Popen(argv, env=rig.zygote.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None and other.stdout.readline() == "ready\n"
            _behave(client, played, time.monotonic() + seconds)
            said = json.loads(other.communicate(timeout=120)[0])
    played.streams = said["streams"]
    played.statuses = {act: Counter({int(one): count for one, count in of.items()}) for act, of in said["statuses"].items()}
    return played


def _key(rig: Rig, project: str) -> str:
    with rig.store.begin() as session:
        return keys.create(session, project=project, name=project)[1]


def _client(url: str, key: str) -> httpx.Client:
    limits = httpx.Limits(max_connections=None)
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60, limits=limits)


def main(url: str, key: str) -> None:
    """The hostile key, until stdin ends; then what it was answered, as JSON."""
    stop = threading.Event()
    with _client(url, key) as client:
        job_id = client.post("/v1/jobs", json=RL).json()["id"]
        all_acts = acts(client, job_id)
        statuses, doing = {act: Counter[int]() for act in all_acts}, cycle(all_acts.items())
        with _streams(client, job_id) as streams:
            threads = [threading.Thread(target=_act, args=(client, doing, statuses, stop)) for _ in range(AT_ONCE)]
            for thread in threads:
                thread.start()
            print("ready", flush=True)
            sys.stdin.read()
            stop.set()
            for thread in threads:
                thread.join()
    print(json.dumps({"streams": streams, "statuses": statuses}))


def _act(
    client: httpx.Client, doing: Iterator[tuple[str, Act]], statuses: dict[str, Counter[int]], stop: threading.Event
) -> None:
    while not stop.is_set():
        with LOCK:
            name, act = next(doing)
        with suppress(httpx.WriteError, httpx.ReadError):  # a body that is too large is not read to its end
            statuses[name][act(client).status_code] += 1


def _behave(client: httpx.Client, played: Played, until: float) -> None:
    """Looks at its jobs, and submits one now and then."""
    job_id, number = client.post("/v1/jobs", json=RL).json()["id"], 0
    while time.monotonic() < until:
        number += 1
        began = time.monotonic()
        if number % 20 == 0:
            answer = client.post("/v1/jobs", json=RL)
        else:
            answer = client.get("/v1/jobs" if number % 2 else f"/v1/jobs/{job_id}")
        played.seconds.append(time.monotonic() - began)
        played.behaved[answer.status_code] += 1
        time.sleep(0.02)


@contextmanager
def _streams(client: httpx.Client, job_id: str) -> Iterator[int]:
    """Event streams that are asked for together and stay open: how many opened."""
    opened: list[int] = []
    with ExitStack() as stack:

        def follow() -> None:
            asked = client.stream("GET", f"/v1/jobs/{job_id}/events", headers={"Accept": "text/event-stream"})
            opened.append(stack.enter_context(asked).status_code)

        threads = [threading.Thread(target=follow) for _ in range(STREAMS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        yield opened.count(200)


def _memory(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split("kB")[0]) * 1024


def _watch_memory(pid: int, before: int, played: Played, stop: threading.Event) -> None:
    while not stop.wait(0.1):
        with suppress(FileNotFoundError, ProcessLookupError, IndexError):
            played.grown_bytes = max(played.grown_bytes, _memory(pid) - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
