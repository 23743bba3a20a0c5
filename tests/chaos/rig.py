"""A stack of real processes to break: workers and an API from the zygote, a redis-server, SQLite or PostgreSQL."""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from pydantic import SecretStr
from sqlalchemy import select

import job_specs
from chaos import points, stale
from chaos.loops import Loop
from chaos.servers import OwnPostgres, OwnRedis
from job_specs import reversing
from service.doorbell import Doorbell
from service.jobs.lifecycle import create_job
from service.jobs.resolve import resolve
from service.settings import Settings
from service.spec.job import JobSpec
from service.store import jobs
from service.store.session import Store, open_store, upgrade
from service.store.tables import Event, Job, Worker
from service.validation import parse

FINAL = ("succeeded", "failed", "cancelled")
KEY = "tml-chaos-0123456789abcdefghijklmnopqrstuvwxyz"
TESTS = Path(__file__).resolve().parent.parent
# Everything ten times faster than in production, so that a lease ends while one watches.
SHORT = {
    "lease_ttl_s": 6.0,
    "lease_self_stop_s": 4.5,
    "lease_renew_s": 1.0,
    "reconcile_every_s": 1.0,
    "ring_again_s": 3.0,
    "drain_grace_s": 20.0,
}


def rl_spec(steps: int = 24, **sections: Any) -> dict[str, Any]:
    """Evaluations, several updates a rollout, a checkpoint every other step."""
    ours = {"data": reversing(eval_rows=8), "update": {"minibatches": 2}, "limits": {"max_steps": steps, "max_attempts": 100}}
    return job_specs.rl_spec(**ours | sections)


def supervised_spec(steps: int = 24, **sections: Any) -> dict[str, Any]:
    ours = {"data": reversing(eval_rows=8), "eval": {"every_steps": 4}, "checkpoints": {"every_steps": 3}}
    return job_specs.supervised_spec(**ours | {"limits": {"max_steps": steps, "max_attempts": 100}} | sections)


class Zygote:
    """See zygote.py: starts `python -m argv...` within a fraction of a second."""

    def __init__(self, folder: Path) -> None:
        ours, theirs = socket.socketpair()
        theirs.set_inheritable(True)
        env = {name: value for name, value in os.environ.items() if not name.startswith("RATCHET_")}
        env |= {"PYTHONPATH": str(TESTS), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.env = env
        with (folder / "zygote.log").open("wb") as log:
            argv = [sys.executable, "-m", "chaos.zygote", str(theirs.fileno())]
            self._process = subprocess.Popen(
                argv, env=env, pass_fds=[theirs.fileno()], stdout=log, stderr=log, cwd=TESTS.parent
            )
        theirs.close()
        self._lines = ours.makefile("rw")
        assert json.loads(self._lines.readline() or "{}") == {"ready": True}, (folder / "zygote.log").read_text()
        ours.close()

    def start(
        self, argv: Sequence[str], env: dict[str, str], log: Path, *, beside: bool = False, cwd: Path = TESTS.parent
    ) -> int:
        order = {"argv": list(argv), "env": self.env | env, "log": str(log), "beside": beside, "cwd": str(cwd)}
        print(json.dumps(order), file=self._lines, flush=True)
        return json.loads(self._lines.readline())["pid"]

    def child(self, argv: Sequence[str], env: dict[str, str], log: Path, **more: Path) -> "Child":
        """The same as a child of this process."""
        return Child(self.start(argv, env, log, beside=True, **more))

    def run(self, *argv: str, **env: str) -> str:
        """What it printed. An AssertionError with that if it fails."""
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            code = self.child(argv, env, log).wait()
            said = log.read_text()
        assert code == 0, said
        return said

    def close(self) -> None:
        self._lines.close()
        self._process.kill()
        self._process.wait()


class Child:
    """A child of this process that the zygote made: of subprocess.Popen what tests use."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = 120) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@dataclass(frozen=True)
class Process:
    """A process of the rig with all that came from it; they share its session."""

    pid: int
    log: Path

    @property
    def alive(self) -> bool:
        return is_alive(self.pid)

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9 of it alone: what becomes of its children is the product's affair."""
        self.signal(signal.SIGKILL)
        wait_until(lambda: not self.alive, 10, "a killed process to vanish")


def is_alive(pid: int) -> bool:
    """It runs, or is stopped; a process that only waits to be waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def of_sessions(leaders: set[int]) -> list[int]:
    """Every living process that belongs to one of these sessions."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            state, _, _, session = path.read_text().rsplit(")", 1)[1].split()[:4]
            if int(session) in leaders and state not in "ZX":
                found.append(int(path.parent.name))
    return found


def wait_until(holds: Callable[[], Any], within_s: float, what: str, every_s: float = 0.02) -> Any:
    deadline = time.monotonic() + within_s
    while not (value := holds()):
        assert time.monotonic() < deadline, f"waited {within_s:.0f} s in vain for {what}"
        time.sleep(every_s)
    return value


@dataclass(frozen=True)
class _Rings:
    """A doorbell that sends each message so many times, and never says that it did not."""

    doorbell: Doorbell
    times: int

    def ring(self, job_id: str, resource_class: str) -> bool:
        return all(self.doorbell.ring(job_id, resource_class) for _ in range(self.times))


@dataclass
class Rig:
    zygote: Zygote
    folder: Path
    redis: OwnRedis
    settings: Settings
    postgres: OwnPostgres | None = None
    started: list[Process] = field(default_factory=list)
    loops: dict[str, Loop] = field(default_factory=dict)  # by the id of the session

    def __post_init__(self) -> None:
        self.orders = self.folder / "points"
        self.store: Store = open_store(self.settings)
        self.doorbell = Doorbell(self.settings)
        self.api_url = ""
        self._messages = 1
        self.environment: dict[str, str] = {}  # of every process that is started from now on

    # ------------------------------------------------------------ processes

    def _start(self, argv: list[str], **env: str) -> Process:
        short = {f"RATCHET_{name.upper()}": str(getattr(self.settings, name)) for name in SHORT}
        ours = {
            "RATCHET_ENVIRONMENT": "development",
            "RATCHET_DATA_DIR": str(self.settings.data_dir),
            "RATCHET_DATABASE_URL": self.settings.sql_url,
            "RATCHET_REDIS_URL": self.settings.redis_url.get_secret_value(),
            "RATCHET_DEVICE": "cpu",
            "RATCHET_STRICT_METRICS": "true",
            "RATCHET_BOOTSTRAP_KEY": KEY,
            points.FOLDER: str(self.orders),
        }
        log = self.folder / f"{argv[0]}-{len(self.started)}.log"
        process = Process(self.zygote.start(argv, ours | short | self.environment | env, log), log)
        self.started.append(process)
        return process

    def start_worker(self, **env: str) -> Process:
        return self._start(["celery", "-A", "chaos.app", "worker", "--without-gossip", "--without-mingle"], **env)

    def start_api(self, **env: str) -> Process:
        """At one address always: a client that lost it finds it again."""
        if not self.api_url:
            with socket.create_server(("127.0.0.1", 0)) as free:
                self.api_url = f"http://127.0.0.1:{free.getsockname()[1]}"
        api = self._start(["chaos.api"], RATCHET_PORT=self.api_url.rpartition(":")[2], **env)
        with httpx.Client(base_url=self.api_url, timeout=2) as client:

            def answers() -> bool:
                with suppress(httpx.HTTPError):
                    return client.get("/livez").status_code == 200
                return False

            wait_until(lambda: answers() or not api.alive, 60, f"the API to answer; {api.log}")
        assert api.alive, api.log.read_text()
        return api

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.api_url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30)

    def holder_of(self, job_id: str) -> Process:
        """The worker whose child trains this job."""
        with self.store.begin(readonly=True) as session:
            job = jobs.find(session, job_id)
            worker = None if job is None or job.lease_owner is None else session.get(Worker, job.lease_owner)
        assert worker is not None, f"nobody holds {job_id}"
        return next(process for process in self.started if process.pid == worker.pid)

    def child_of(self, job_id: str) -> int:
        """The process that trains this job, as it says itself."""
        return self.job(job_id).resolved["process"]["pid"]

    # ------------------------------------------------------------ faults

    def arm(self, point: str, *, at_pass: int = 1, do: str = "kill") -> Path:
        return points.arm(self.orders, point, at_pass=at_pass, do=do)

    def messages_a_ring(self, count: int) -> None:
        """From now on each ring of each process sends so many messages."""
        self.orders.mkdir(exist_ok=True)
        (self.orders / points.RINGS).write_text(str(count))
        self._messages = count

    def struck(self, order: Path, within_s: float = 120) -> float:
        """Wait until an armed point was reached. Returns when (seconds since the epoch)."""
        done = order.with_suffix(".done")
        wait_until(done.exists, within_s, f"{order.name} to be reached\n{self.tails()}")
        return json.loads(done.read_text())["at"]

    # ------------------------------------------------------------ jobs

    def submit(self, spec: dict[str, Any]) -> str:
        """A job of this spec. A session needs an API, and its client begins at once."""
        if spec["kind"] == "session":
            loop = Loop(self.api_url, KEY, spec)
            self.loops[loop.id] = loop
            loop.start()
            return loop.id
        resolved = resolve(self.store, self.settings, "default", parse(JobSpec, spec))
        bell: Any = _Rings(self.doorbell, self._messages)
        return create_job(self.store, bell, project="default", sent=spec, resolved=resolved).id

    def job(self, job_id: str) -> Job:
        with self.store.begin(readonly=True) as session:
            job = jobs.find(session, job_id)
        assert job is not None
        return job

    def until(self, job_id: str, holds: Callable[[Job], Any], within_s: float = 240) -> Job:
        deadline = time.monotonic() + within_s
        while not holds(job := self.job(job_id)):
            waited = f"waited {within_s:.0f} s in vain: {job.status} ({job.status_reason}) at step {job.step}, {job.error}"
            assert time.monotonic() < deadline, f"{waited}\n{self.tails()}"
            time.sleep(0.02)
        return job

    def reached(self, job_id: str, step: int, within_s: float = 240) -> Job:
        return self.until(job_id, lambda job: job.status == "running" and job.step >= step, within_s)

    def finished(self, job_id: str, within_s: float = 300) -> Job:
        job = self.until(job_id, lambda job: job.status in FINAL, within_s)
        if job_id in self.loops:
            self.loops[job_id].join(within_s)
        return job

    def events(self, job_id: str) -> list[Event]:
        with self.store.begin(readonly=True) as session:
            return list(session.scalars(select(Event).where(Event.job_id == job_id).order_by(Event.seq)))

    def went_on_after(self, job_id: str, moment: float) -> float:
        """Seconds from `moment` until the job's next step was committed, or the job ended."""
        for event in self.events(job_id):
            ended = event.type == "status_changed" and event.data["to"] in FINAL
            if (event.type == "step" or ended) and event.created_at > datetime.fromtimestamp(moment, UTC):
                return event.created_at.timestamp() - moment
        raise AssertionError(f"{job_id} did not go on")

    # ------------------------------------------------------------ the end

    def tails(self) -> str:
        return "\n".join(f"--- {one.log.name}\n{one.log.read_text()[-2500:]}" for one in self.started if one.log.exists())

    def stop(self) -> None:
        """In good order, and hard after twenty seconds; the oracle looks for what is left."""
        for process in self.started:
            process.signal(signal.SIGTERM)
        with suppress(AssertionError):
            wait_until(lambda: not any(process.alive for process in self.started), 20, "the rig to stop")
        for process in self.started:
            process.signal(signal.SIGKILL)

    def close(self) -> None:
        self.stop()
        for pid in of_sessions({process.pid for process in self.started}):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.doorbell.close()
        self.store.close()


@contextmanager
def new_rig(
    zygote: Zygote,
    folder: Path,
    redis: OwnRedis,
    *,
    template: Path | None = None,
    postgres: OwnPostgres | None = None,
    **settings: Any,
) -> Iterator[Rig]:
    """A rig over a copy of a migrated SQLite file, or over an empty PostgreSQL, which is migrated here."""
    data_dir = folder / "data"
    data_dir.mkdir(parents=True)
    if postgres is None:
        assert template is not None
        shutil.copyfile(template, data_dir / "ratchet.db")
        database_url = f"sqlite:///{data_dir / 'ratchet.db'}"
    else:
        database_url = postgres.url
        upgrade(database_url)
    stale.watch(database_url)
    every: dict[str, Any] = SHORT | settings
    rig = Rig(
        zygote,
        folder,
        redis,
        Settings(
            environment="development",
            data_dir=data_dir,
            database_url=SecretStr(database_url),
            redis_url=SecretStr(redis.url),
            **every,
        ),
        postgres,
    )
    try:
        yield rig
    finally:
        rig.close()


@contextmanager
def sqlite_locked(path: Path) -> Iterator[None]:
    """Another process writes, and does not come to an end."""
    connection = sqlite3.connect(path, isolation_level=None, timeout=30)
    connection.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()
