"""A stack on loopback for the scripts beside this file: an empty database, a Redis, the API, and a loss worker where one is
asked for; each a process of its own, and all gone at the end."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
from sqlalchemy import create_engine, make_url, text

from ratchet_client import Ratchet
from service.local.redis_server import redis_binary
from service.settings import Settings
from service.store import keys
from service.store.session import open_store, upgrade

BACKENDS = ("sqlite", "postgresql")
# Whoever this names must be allowed to create databases.
POSTGRES_URL = os.environ.get("RATCHET_TEST_POSTGRES_URL", "postgresql+psycopg://postgres@127.0.0.1:5432/test")
READY_WITHIN_S = 60.0
UNLIMITED = 1_000_000  # requests a second, of the key that measures


@dataclass(frozen=True)
class Stack:
    ratchet: Ratchet
    settings: Settings  # as the API has them
    processes: dict[str, int]  # the id of each by its name

    @property
    def url(self) -> str:
        return self.ratchet.base_url

    @property
    def key(self) -> str:
        """Of the project `default`, with a rate that no measurement reaches; it is counted all the same."""
        assert self.settings.bootstrap_key is not None
        return self.settings.bootstrap_key.get_secret_value()


@contextmanager
def started(backend: str = "sqlite", *, workers: int = 0, **environment: str) -> Iterator[Stack]:
    """`environment`: further settings (RATCHET_...), for all processes. `workers`: how many there are; they serve losses unless
    RATCHET_SERVES says otherwise."""
    children: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as folder, database(backend, Path(folder)) as database_url:
        data_dir, key = Path(folder), "tml-" + secrets.token_urlsafe(32)
        redis_port, api_port = free_port(), free_port()
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RATCHET_")},
            "RATCHET_ENVIRONMENT": "development",
            "RATCHET_DATA_DIR": folder,
            "RATCHET_DATABASE_URL": database_url,
            "RATCHET_REDIS_URL": f"redis://127.0.0.1:{redis_port}/0",
            "RATCHET_BOOTSTRAP_KEY": key,
            "RATCHET_PORT": str(api_port),
            "RATCHET_SERVES": "losses",
            "RATCHET_DEVICE": "cpu",
            "RATCHET_LOG_LEVEL": "WARNING",
            **environment,
        }
        names: dict[str, int] = {}

        def start(name: str, *argv: str) -> None:
            with (data_dir / f"{name}.log").open("wb") as log:
                children.append(subprocess.Popen(argv, env=environment, stdout=log, stderr=log, cwd=folder))
            names[name] = children[-1].pid

        settings = settings_of(environment)
        upgrade(database_url)
        make_key(settings, key)
        try:
            start("Redis", redis_binary(), "--port", str(redis_port), "--bind", "127.0.0.1", "--save", "")
            start("API", sys.executable, "-P", "-m", "service")
            celery = ["celery", "-A", "workers.app", "worker", "--without-gossip", "--without-mingle"]
            for name in ("worker", *(f"worker {number}" for number in range(2, workers + 1)))[:workers]:
                start(name, sys.executable, "-P", "-m", *celery, "-n", f"{name.replace(' ', '-')}@%h")
            with Ratchet(f"http://127.0.0.1:{api_port}", key) as ratchet:
                wait_until_ready(ratchet.base_url, children)
                yield Stack(ratchet, settings, names)
        except BaseException:
            for log in sorted(data_dir.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}", file=sys.stderr)
            raise
        finally:
            stop(children)


def settings_of(environment: dict[str, str]) -> Settings:
    prefix = "RATCHET_"
    given: dict[str, Any] = {
        name.removeprefix(prefix).lower(): value for name, value in environment.items() if name.startswith(prefix)
    }
    return Settings(**given)


@contextmanager
def database(backend: str, folder: Path) -> Iterator[str]:
    """The URL of an empty one, gone at the end."""
    if backend == "sqlite":
        yield f"sqlite:///{folder / 'ratchet.db'}"
        return
    name, admin = f"ratchet_bench_{uuid4().hex[:12]}", create_engine(POSTGRES_URL, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE template0"))
    try:
        yield make_url(POSTGRES_URL).set(database=name).render_as_string(hide_password=False)
    finally:
        with admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        admin.dispose()


def make_key(settings: Settings, key: str) -> None:
    store = open_store(settings)
    with store.begin() as session:
        rate: Any = {"requests_per_s": float(UNLIMITED), "burst": UNLIMITED}
        keys.create(session, project="default", name="bench", text=key, **rate)
    store.close()


def stop(children: list[subprocess.Popen[bytes]]) -> None:
    for child in reversed(children):
        child.send_signal(signal.SIGTERM)
    for child in children:
        try:
            child.wait(15)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def wait_until_ready(url: str, children: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while True:
        try:
            if httpx.get(f"{url}/readyz", trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass
        if time.monotonic() > deadline or any(child.poll() is not None for child in children):
            raise RuntimeError("the stack did not start")
        time.sleep(0.1)


# ---------------------------------------------------------------- measuring


def cpu_s(pid: int) -> float:
    """User and system time of a process and its children, those too that are no more. From /proc, to 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    spent = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return spent + sum(cpu_s(int(child)) for task in tasks for child in (task / "children").read_text().split())


def machine() -> str:
    """What the figures depend on beside the code."""
    return f"{os.uname().machine}, {os.cpu_count()} cores, load before this run {os.getloadavg()[0]:.1f}"
