"""A scripted HTTP server for what goes wrong on the way, and the real API over real HTTP for everything else."""

import io
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from pydantic import SecretStr

import ratchet_client.resources.progress
import ratchet_client.transport
from chaos.rig import Zygote
from service.app import create_app
from service.cli.main import app
from service.doorbell import Doorbell
from service.errors import Failure
from service.ids import new_id
from service.jobs import lease
from service.jobs.lease import CheckpointRow, Lease, RolloutRow
from service.settings import Settings
from service.store.session import Store
from workers.policy.checkpoint import write_manifest

KEY = "tml-0123456789abcdefghijklmnopqrstuvwxyzABCDEFG"


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False  # close the connection instead
    torn: bool = False  # close it in the middle of the body


class Script:
    """Answers requests in the order given; the last answer is repeated. Keeps what came."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.url = ""
        self._answers: list[Answer] = []
        self._lock = threading.Lock()

    def reply(self, content: Any = None, status: int = 200, **headers: str) -> "Script":
        self._answers.append(Answer(status, _bytes(content), {"Content-Type": "application/json", **_named(headers)}))
        return self

    def refuse(self, status: int, code: str, **headers: str) -> "Script":
        content = {"status": status, "code": code, "detail": f"it is {code}", "errors": [{"pointer": "/a", "detail": "no"}]}
        self._answers.append(Answer(status, _bytes(content), {"Content-Type": "application/problem+json", **_named(headers)}))
        return self

    def stream(self, text: str, *, torn: bool = False) -> "Script":
        self._answers.append(Answer(200, text.encode(), {"Content-Type": "text/event-stream"}, torn=torn))
        return self

    def drop(self) -> "Script":
        self._answers.append(Answer(drop=True))
        return self

    def answer(self, request: Request) -> Answer:
        with self._lock:
            self.requests.append(request)
            return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]

    def sent(self, name: str) -> list[str | None]:
        """A header of every request that came."""
        return [request.headers.get(name) for request in self.requests]


def _bytes(content: Any) -> bytes:
    return content if isinstance(content, bytes) else json.dumps({} if content is None else content).encode()


def _named(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


def _handler(script: Script) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            answer = script.answer(Request(self.command, self.path, headers, self.read_body(headers)))
            self.close_connection = answer.drop or answer.torn
            if answer.drop:
                return
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body) + answer.torn))
            self.end_headers()
            self.wfile.write(answer.body)

        do_POST = do_DELETE = do_GET

        def read_body(self, headers: dict[str, str]) -> bytes:
            if headers.get("transfer-encoding") != "chunked":
                return self.rfile.read(int(headers.get("content-length", 0)))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002

    return Handler


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(script))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    script.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield script
    server.shutdown()
    server.server_close()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the client would have slept; it does not."""
    slept: list[float] = []
    for module in (ratchet_client.resources.progress, ratchet_client.transport):
        monkeypatch.setattr(module, "sleep", slept.append)
    return slept


# ---------------------------------------------------------------- the real API, and what stands in for a worker


@pytest.fixture
def database_url(sqlite_template: Path, tmp_path: Path) -> str:
    """The command line is the same over any database."""
    shutil.copyfile(sqlite_template, tmp_path / "ratchet.db")
    return f"sqlite:///{tmp_path / 'ratchet.db'}"


@contextmanager
def serving(settings: Settings) -> Iterator[str]:
    """The service on a free port in a thread of this process. Gives its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(settings), log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the API did not start"
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(20)


@pytest.fixture
def api(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The service, found through the environment. Nothing trains."""
    with serving(settings.model_copy(update={"bootstrap_key": SecretStr(KEY)})) as url:
        monkeypatch.setenv("RATCHET_URL", url)
        monkeypatch.setenv("RATCHET_API_KEY", KEY)
        yield url


@dataclass(frozen=True)
class Whole:
    """The service in this process, and a worker in another."""

    url: str
    key: str
    settings: Settings
    log: Path


@pytest.fixture(scope="session")
def whole(
    tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path, new_redis: Any, zygote: Zygote
) -> Callable[..., AbstractContextManager[Whole]]:
    """`with whole({"max_body_bytes": 9}, RATCHET_SERVES="losses") as stack:`: settings of the API, variables of the worker."""

    @contextmanager
    def start(more: Mapping[str, Any] = {}, **environment: str) -> Iterator[Whole]:
        folder = tmp_path_factory.mktemp("whole")
        data_dir, log = folder / "data", folder / "worker.log"
        (data_dir / "models").mkdir(parents=True)
        shutil.copyfile(sqlite_template, data_dir / "ratchet.db")
        with new_redis() as redis:
            url, key = SecretStr(redis.url), SecretStr(KEY)
            settings = Settings(environment="development", data_dir=data_dir, redis_url=url, bootstrap_key=key, **more)
            variables = {
                "RATCHET_ENVIRONMENT": "development",
                "RATCHET_DATA_DIR": str(data_dir),
                "RATCHET_REDIS_URL": redis.url,
                "RATCHET_RECONCILE_EVERY_S": "1",
                "RATCHET_DEVICE": "cpu",
            }
            argv = ["celery", "-A", "workers.app", "worker", "--without-gossip", "--without-mingle"]
            worker = zygote.child(argv, {**os.environ, **variables, **environment}, log)
            with serving(settings) as address:
                yield Whole(address, KEY, settings, log)
            worker.terminate()
            try:
                worker.wait(20)
            finally:
                worker.kill()

    return start


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`cli("jobs", "--json")` runs the command in this process."""

    def run(*args: str, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        with pytest.raises(SystemExit) as left:
            app(args)
        out, err = capsys.readouterr()
        code = left.value.code
        return Result(code if isinstance(code, int) else int(code is not None), out, err)

    return run


class Hand:
    """Does by hand what a worker does: takes a job, commits steps, ends it."""

    def __init__(self, store: Store, settings: Settings, doorbell: Doorbell) -> None:
        self.store, self.settings, self.doorbell = store, settings, doorbell

    def take(self, within_s: float = 0) -> Lease:
        deadline = time.monotonic() + within_s
        while (claimed := lease.claim(self.store, self.settings, "hand", ["any", "cpu"])) is None:
            assert time.monotonic() < deadline, "nothing is queued"
            time.sleep(0.02)
        return claimed[0]

    def step(self, held: Lease, step: int, metrics: dict[str, float], rollouts: Sequence[RolloutRow] = ()) -> None:
        lease.commit_step(self.store, held, step, metrics, rollouts)
        self.doorbell.signal(held.job_id, "events")

    def save(self, held: Lease, step: int, *, reward: float = 0.5, **files: bytes) -> str:
        folder = self.store.blobs.temporary_dir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        sha256 = write_manifest(folder)
        row = CheckpointRow(
            id=new_id("ckpt"),
            step=step,
            adapter="full",
            model={"source": "tiny"},
            path=f"checkpoints/{held.job_id}/{step}",
            size_bytes=sum(map(len, files.values())),
            manifest_sha256=sha256,
            metrics={"eval/reward/mean": reward},
            has_optimizer=True,
            is_final=True,
        )
        self.store.blobs.commit_dir(folder, row.path)
        lease.commit_checkpoint(self.store, held, row)
        return row.id

    def succeed(self, held: Lease) -> None:
        lease.succeed(self.store, held, {"ended": "max_steps"}, "max_steps")
        self.doorbell.signal(held.job_id, "events")

    def fail(self, held: Lease, failure: Failure) -> None:
        lease.fail(self.store, held, failure, None)
        self.doorbell.signal(held.job_id, "events")


@pytest.fixture
def hand(store: Store, settings: Settings, doorbell: Doorbell) -> Hand:
    return Hand(store, settings, doorbell)
