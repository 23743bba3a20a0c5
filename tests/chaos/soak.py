"""`python -m chaos.soak`: tiny jobs back to back on two workers and an API, and random kills over everything (make soak).

What is broken, where, and after which pause derives from the seed, so that a run can be brought again; what the processes do
at that moment is theirs. Each job is examined by the oracle when it has ended, and the whole rig at the end.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx
from sqlalchemy import func, select

from chaos import points
from chaos.oracle import examine, left_behind
from chaos.reference import References
from chaos.rig import FINAL, Process, Rig, Zygote, is_alive, new_rig, rl_spec, supervised_spec
from chaos.servers import own_postgres_server, own_redis_server
from service.store.session import upgrade
from service.store.tables import Job

SPECS = [
    rl_spec(12, limits={"max_steps": 12, "max_attempts": 100}),
    supervised_spec(16, limits={"max_steps": 16, "max_attempts": 100}),
    rl_spec(
        10,
        objective={"preset": "grpo", "kl": {"coef": 0.05}},
        optimizer={"learning_rate": 1e-3, "schedule": {"kind": "cosine", "warmup_steps": 4}},
        limits={"max_steps": 10, "max_attempts": 100},
    ),
]
MOST_PASSES = {"while sampling": 30, "mid update": 12, "inside a transaction": 8, "after step row": 8, "before fsync": 16}
AT_ONCE = 3  # jobs that wait or run
PAUSES_S = (0.1, 1.1)
STUCK_AFTER_S = 180.0
REPORT = Path(__file__).resolve().parents[2] / "build" / "soak.jsonl"


@dataclass
class Soak:
    rig: Rig
    random: Random
    undisturbed: References
    workers: list[Process] = field(default_factory=list)
    api: Process | None = None
    live: dict[str, dict[str, Any]] = field(default_factory=dict)  # id -> spec
    brought: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    ended: int = 0
    attempts: int = 0
    problems: list[str] = field(default_factory=list)
    stopped: list[tuple[float, int]] = field(default_factory=list)  # (wakes at, pid)
    asked: tuple[str, dict[str, Any]] | None = None  # a request that was not answered yet
    ended_at: float = field(default_factory=time.monotonic)

    # ------------------------------------------------------------ what is broken

    def break_something(self) -> None:
        kinds: dict[str, tuple[int, bool, Callable[[], None]]] = {  # weight, whether it is a kill
            "kill -9 of a child at a point": (8, True, self._arm),
            "kill -9 of a child at any moment": (5, True, self._kill_child),
            "kill -9 of a parent": (2, True, self._kill_parent),
            "kill -9 of the API": (1, True, self._kill_api),
            "kill -9 of Redis": (1, True, self._kill_redis),
            "SIGTERM to a worker": (1, False, self._drain),
            "SIGSTOP of a child beyond its lease": (1, False, self._stop_child),
            "FLUSHALL": (1, False, self._flush),
        }
        if self.rig.postgres is not None:
            kinds["kill of PostgreSQL"] = (1, True, self._kill_postgres)
        kind = self.random.choices(list(kinds), [weight for weight, _, _ in kinds.values()])[0]
        _, kills, do = kinds[kind]
        with suppress(ProcessLookupError):
            do()
            self.brought[kind] += 1
            self.kills += kills
            if self.kills % 25 == 0:
                print(f"{self.kills} kills, {self.ended} jobs ended", flush=True)

    def _arm(self) -> None:
        """An order that no process comes by within its time is withdrawn, and does not count."""
        point = self.random.choice(points.WORKER_POINTS)
        most = MOST_PASSES.get(point, 2)
        order = self.rig.arm(point, at_pass=self.random.randint(1, most))
        deadline = time.monotonic() + 5
        while order.exists() and time.monotonic() < deadline:
            self.tend()
            time.sleep(0.02)
        with suppress(FileNotFoundError):
            order.unlink()
            raise ProcessLookupError

    def _kill_child(self) -> None:
        os.kill(self._child(), signal.SIGKILL)

    def _child(self) -> int:
        """A process that trains just now."""
        running = [job.resolved for job in map(self.rig.job, self.live) if job.status == "running"]
        alive = [facts["process"]["pid"] for facts in running if "process" in facts and is_alive(facts["process"]["pid"])]
        if not alive:
            raise ProcessLookupError
        return self.random.choice(alive)

    def _kill_parent(self) -> None:
        self.random.choice(self.workers).kill()

    def _kill_api(self) -> None:
        if self.api is None:
            raise ProcessLookupError
        self.api.kill()
        self.api = None

    def _kill_redis(self) -> None:
        self.rig.redis.kill()
        time.sleep(self.random.uniform(0, 2))
        self.rig.redis.start()

    def _kill_postgres(self) -> None:
        assert self.rig.postgres is not None
        self.rig.postgres.stop_at_once()
        time.sleep(self.random.uniform(0, 2))
        self.rig.postgres.start()

    def _drain(self) -> None:
        self.random.choice(self.workers).signal(signal.SIGTERM)

    def _stop_child(self) -> None:
        pid = self._child()
        os.kill(pid, signal.SIGSTOP)
        self.stopped.append((time.monotonic() + self.rig.settings.lease_ttl_s + 3, pid))

    def _flush(self) -> None:
        self.rig.redis.flush()

    # ------------------------------------------------------------ what goes on

    def tend(self) -> None:
        """Two workers and an API live, the stopped wake up in time, jobs that ended are examined."""
        self.workers = [worker for worker in self.workers if worker.alive]
        while len(self.workers) < 2:
            self.workers.append(self.rig.start_worker())
        if self.api is None:
            with suppress(AssertionError):  # it gives up when SQLite stays locked: what supervises it starts it again
                self.api = self.rig.start_api()
        for wakes_at, pid in [one for one in self.stopped if one[0] < time.monotonic()]:
            self.stopped.remove((wakes_at, pid))
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        for job_id in list(self.live):
            job = self.rig.job(job_id)
            if job.status in FINAL:
                found = examine(self.rig, job_id, self.undisturbed(self.live.pop(job_id)))
                self.problems += [f"{job_id}: {problem}" for problem in found]
                self.ended, self.attempts, self.ended_at = self.ended + 1, self.attempts + job.attempt, time.monotonic()
        if time.monotonic() - self.ended_at > STUCK_AFTER_S:
            standing = {job.id: (job.status, job.status_reason, job.step, job.attempt) for job in map(self.rig.job, self.live)}
            raise AssertionError(f"no job ended for {STUCK_AFTER_S:.0f} s: {standing}\n{self.rig.tails()}")

    def submit(self) -> None:
        """Over HTTP, with a key: asked as often as it takes, each job is created once."""
        while len(self.live) < AT_ONCE and self.api is not None and self.api.alive:
            key, spec = self.asked = self.asked or (f"soak-{self.ended + len(self.live)}", self.random.choice(SPECS))
            with suppress(httpx.HTTPError), self.rig.client() as client:
                answer = client.post("/v1/jobs", json=spec, headers={"Idempotency-Key": key})
                if answer.status_code != 201:  # in flight when the API was killed; or the store was away
                    assert answer.status_code in (409, 503), answer.text
                    return
                self.live[answer.json()["id"]] = spec
                self.asked = None

    def run(self, kills: int, until: float) -> None:
        self.tend()
        while self.kills < kills and time.monotonic() < until and not self.problems:
            self.tend()
            self.submit()
            time.sleep(self.random.uniform(*PAUSES_S))
            self.break_something()
        self._finish()

    def _finish(self) -> None:
        """Nothing is broken any more: everything ends, and nothing was created that nobody knows of."""
        while self.live and not self.problems:
            self.tend()
            time.sleep(0.1)
        with self.rig.store.begin(readonly=True) as session:
            created = session.scalar(select(func.count()).select_from(Job)) or 0
        if created - self.ended - len(self.live) > (self.asked is not None):
            self.problems.append(f"2: {created} jobs were created, {self.ended + len(self.live)} were asked for")
        self.problems += left_behind(self.rig)


@contextmanager
def soaking(folder: Path, seed: int, database: str) -> Iterator[Soak]:
    template = folder / "template.db"
    upgrade(f"sqlite:///{template}")
    with ExitStack() as stack:
        zygote = Zygote(folder)
        stack.callback(zygote.close)
        undisturbed = stack.enter_context(References(zygote, folder / "undisturbed", template))
        for spec in SPECS:
            undisturbed(spec)
        undisturbed.rest()
        redis = stack.enter_context(own_redis_server())
        postgres = stack.enter_context(own_postgres_server()) if database == "postgresql" else None
        rig = stack.enter_context(new_rig(zygote, folder / "rig", redis, template=template, postgres=postgres))
        yield Soak(rig, Random(seed), undisturbed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=30.0, help="the longest that things are broken")
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    asked = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="ratchet-soak-") as folder,
        soaking(Path(folder), asked.seed, asked.database) as soak,
    ):
        began = time.monotonic()
        try:
            soak.run(asked.kills, began + asked.minutes * 60)
        except Exception as error:
            soak.problems.append(repr(error))
        report = {
            "database": asked.database,
            "seed": asked.seed,
            "minutes": round((time.monotonic() - began) / 60, 1),
            "kills": soak.kills,
            "brought": dict(soak.brought),
            "jobs": soak.ended,
            "attempts": soak.attempts,
            "problems": soak.problems,
        }
        if soak.problems:
            print(soak.rig.tails()[-20_000:])
    REPORT.parent.mkdir(exist_ok=True)
    with REPORT.open("a") as file:
        file.write(json.dumps(report) + "\n")
    print(json.dumps(report, indent=2))
    sys.exit(bool(soak.problems))


if __name__ == "__main__":
    main()
