"""An embedded stack's data directory, port and key, and the settings that follow from them."""

import fcntl
import os
import secrets
import socket
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import sleep

from service.errors import RatchetError
from service.settings import Settings
from service.spec.addresses import literal

LOCK = "lock"  # in the data directory: the process that runs from there holds it, and its number is in it
LOCK_TRIES = 5


class CannotStart(RatchetError):
    """The stack cannot be started; the message says why and what to do."""

    code = "cannot_start"


@contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """Lock the data directory until this process ends, however it ends. Raises CannotStart if another process has it."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = (data_dir / LOCK).open("a+")
    except OSError as error:
        raise CannotStart(
            f"cannot use {data_dir} as the data directory: {error.strerror}. Name another with --data-dir"
        ) from None
    with file:
        if not _took(file.fileno()):
            file.seek(0)
            raise CannotStart(
                f"another `ratchet up` or restore (process {file.read().strip() or 'unknown'}) runs from {data_dir}. "
                "Stop it first, or name another directory with --data-dir"
            )
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _took(file: int) -> bool:
    """Take the lock, over a moment: a `ratchet down` that looks whether it is free holds it for an instant."""
    for _ in range(LOCK_TRIES):
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        sleep(0.05)
    return False


@contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """Open the API's socket, before anything is started. Raises CannotStart if the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(128)
        except OSError as error:
            raise CannotStart(
                f"cannot listen on {host}:{port}: {error.strerror}. Name another port with --port, or --port 0 for any free one"
            ) from None
        yield listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # all addresses; we connect to ourselves by this one
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def local_key(path: Path) -> str:
    """The key of the project `default`: the file's content, else a new key in a file that only its owner can read."""
    with suppress(FileNotFoundError):
        path.chmod(0o600)
        if (key := path.read_text().strip()).startswith("tml-"):
            return key
    key = "tml-" + urlsafe_b64encode(secrets.token_bytes(32)).decode().rstrip("=")
    _write_private(path, key)
    return key


def _write_private(path: Path, line: str) -> None:
    """Write the file atomically. Others cannot read it at any moment."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(line + "\n")
    temporary.replace(path)


def leave_out_what_it_brings() -> None:
    """Take the URLs of a database and a Redis from the environment, in any case, before anything reads it: the embedded stack
    has its own of both, so that what these hold need not even make sense."""
    for name in [name for name in os.environ if name.upper() in ("RATCHET_DATABASE_URL", "RATCHET_REDIS_URL")]:
        del os.environ[name]


def embedded_settings(data_dir: Path, port: int, folder: Path) -> Settings:
    """The settings of the embedded stack. They go through the environment, so that the worker has the same."""
    bootstrap_key = os.environ.get("RATCHET_BOOTSTRAP_KEY")
    if bootstrap_key:
        _write_private(data_dir / "key", bootstrap_key)
    os.environ.setdefault("RATCHET_LOG_FORMAT", "plain")  # people read these logs
    os.environ.setdefault("RATCHET_ANY_MODEL_FOLDER", "true")  # the user who starts it owns the folders
    if (host := literal(Settings().host)) is not None and host.is_loopback:  # only users of this machine can send requests
        os.environ.setdefault("RATCHET_GRADER_NETWORKS", "127.0.0.0/8, ::1/128")
        os.environ.setdefault("RATCHET_ROLLOUT_NETWORKS", "127.0.0.0/8, ::1/128")
        os.environ.setdefault("RATCHET_WEBHOOK_NETWORKS", "127.0.0.0/8, ::1/128")
    os.environ.update(
        RATCHET_DATA_DIR=str(data_dir),
        RATCHET_PORT=str(port),
        RATCHET_REDIS_URL=f"redis+socket://{folder / 'redis.sock'}",
        RATCHET_BOOTSTRAP_KEY=local_key(data_dir / "key"),
    )
    return Settings()


@contextmanager
def url_file(path: Path, url: str) -> Iterator[None]:
    _write_private(path, url)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
