"""Real Celery workers, in processes of their own, over a real store and a private redis-server."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_network
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import SecretStr
from safetensors.torch import load_file
from torch import Tensor

from chaos.rig import Child, Zygote
from job_specs import rl_spec, supervised_spec
from service.doorbell import Doorbell
from service.ids import utcnow
from service.jobs.lifecycle import create_job
from service.jobs.resolve import resolve
from service.settings import Settings
from service.spec.job import JobSpec
from service.store import checkpoints, jobs, workers
from service.store.session import Store, open_store
from service.store.tables import Job
from service.validation import parse

FINAL = ("succeeded", "failed", "cancelled")


class Stack:
    """A store, a doorbell, and as many workers as a test starts: with a zygote in a blink, else as a user starts them."""

    def __init__(self, settings: Settings, log_dir: Path, zygote: Zygote | None = None) -> None:
        self.settings, self.log_dir, self.zygote = settings, log_dir, zygote
        self.store: Store = open_store(settings)
        self.doorbell = Doorbell(settings)
        self.workers: list[subprocess.Popen[bytes] | Child] = []

    def start_worker(self, **environment: str) -> subprocess.Popen[bytes] | Child:
        variables = {
            "RATCHET_ENVIRONMENT": "development",
            "RATCHET_DATA_DIR": str(self.settings.data_dir),
            "RATCHET_DATABASE_URL": self.settings.sql_url,
            "RATCHET_REDIS_URL": self.settings.redis_url.get_secret_value(),
            "RATCHET_GRADER_NETWORKS": ",".join(map(str, self.settings.grader_networks)),
            "RATCHET_RECONCILE_EVERY_S": "1",
            "RATCHET_DEVICE": "cpu",
            "HF_HUB_OFFLINE": "1",
        }
        argv = ["celery", "-A", "workers.app", "worker", "--without-gossip", "--without-mingle"]
        env = {**os.environ, **variables, **environment}
        log = self.log_dir / f"worker-{len(self.workers)}.log"
        if self.zygote is not None:
            worker = self.zygote.child(argv, env, log)
        else:
            with log.open("wb") as file:
                worker = subprocess.Popen([sys.executable, "-m", *argv], env=env, stdout=file, stderr=file)
        self.workers.append(worker)
        return worker

    def workers_alive(self) -> int:
        with self.store.begin(readonly=True) as session:
            return len(workers.alive(session, utcnow()))

    def submit(self, spec: dict[str, Any], project: str = "default") -> Job:
        parsed = parse(JobSpec, spec)
        resolved = resolve(self.store, self.settings, project, parsed)
        return create_job(self.store, self.doorbell, project=project, sent=spec, resolved=resolved)

    def job(self, job_id: str) -> Job:
        with self.store.begin(readonly=True) as session:
            job = jobs.find(session, job_id)
        assert job is not None
        return job

    def until(self, job_id: str, holds: Callable[[Job], bool], timeout_s: float = 90) -> Job:
        deadline = time.monotonic() + timeout_s
        while not holds(job := self.job(job_id)):
            assert time.monotonic() < deadline, f"{job.status} at step {job.step}, {job.error}\n{self.logs()}"
            time.sleep(0.02)
        return job

    def finished(self, job_id: str, timeout_s: float = 90) -> Job:
        return self.until(job_id, lambda job: job.status in FINAL, timeout_s)

    def succeeded(self, job_id: str, timeout_s: float = 90) -> Job:
        job = self.finished(job_id, timeout_s)
        assert job.status == "succeeded", f"{job.status}: {job.error}\n{self.logs()}"
        return job

    def weights(self, job: Job) -> dict[str, Tensor]:
        """Every tensor of the job's last checkpoint, optimizer state too."""
        assert job.checkpoint_id is not None
        with self.store.begin(readonly=True) as session:
            checkpoint = checkpoints.get(session, job.project, job.checkpoint_id)
        folder = self.store.blobs.fetch(checkpoint.path)
        return {f"{file.name}:{k}": v for file in sorted(folder.rglob("*.safetensors")) for k, v in load_file(file).items()}

    def logs(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.log_dir.glob("worker-*.log")))

    def stop(self) -> None:
        for worker in self.workers:
            worker.send_signal(signal.SIGTERM)
        for worker in self.workers:
            try:
                worker.wait(timeout=20)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
        self.doorbell.close()
        self.store.close()


@pytest.fixture
def stack(settings: Settings, own_redis: Any, tmp_path: Path, zygote: Zygote) -> Iterator[Stack]:
    """A stack of the test's own, without a worker yet: for tests that end workers."""
    stack = Stack(settings.model_copy(update={"redis_url": SecretStr(own_redis.url)}), tmp_path, zygote)
    yield stack
    stack.stop()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path, new_redis: Any, zygote: Zygote) -> Iterator[Stack]:
    """A stack with one worker (SQLite) for all tests that leave its parent alive."""
    folder = tmp_path_factory.mktemp("shared")
    data_dir = folder / "data"
    data_dir.mkdir()
    shutil.copyfile(sqlite_template, data_dir / "ratchet.db")
    with new_redis() as server:
        stack = Stack(
            Settings(
                environment="development",
                data_dir=data_dir,
                redis_url=SecretStr(server.url),
                grader_networks=(ip_network("127.0.0.0/8"),),
            ),
            folder,
            zygote,
        )
        stack.start_worker()
        yield stack
        stack.stop()


@pytest.fixture
def run_killed(settings: Settings, zygote: Zygote, tmp_path: Path) -> Callable[..., list[int]]:
    """`run_killed(*points)`: how each attempt ended, KILLED or 0."""
    sent = {
        "environment": "development",
        "data_dir": str(settings.data_dir),
        "database_url": settings.sql_url,
        "redis_url": settings.redis_url.get_secret_value(),
        "device": "cpu",
        "session_idle_s": 0.05,
    }

    def run(*points: str) -> list[int]:
        log = tmp_path / "killed.log"
        child = zygote.child(["worker.killed", json.dumps(sent), *points], dict(os.environ), log)
        try:
            assert child.wait(110) == 0, log.read_text()[-3000:]
        finally:
            child.kill()
        return [os.waitstatus_to_exitcode(status) for status in json.loads(log.read_text().splitlines()[-1])]

    return run


@pytest.fixture(scope="session")
def new_stack() -> type[Stack]:
    """For fixtures of a wider scope that want one of their own."""
    return Stack


@pytest.fixture
def specs() -> SimpleNamespace:
    return SimpleNamespace(rl=rl_spec, supervised=supervised_spec)
