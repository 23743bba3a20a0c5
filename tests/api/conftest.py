"""A real server on a free port, over real databases and a real Redis, and clients of projects of their own."""

import logging
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from jsonschema import Draft202012Validator
from pydantic import SecretStr

from job_specs import RL
from service.app import create_app
from service.doorbell import Doorbell
from service.edge.protocol import BoundedHttp
from service.jobs import lease as leases
from service.jobs.lease import Lease
from service.settings import Settings
from service.store import keys
from service.store.session import Store, open_store
from service.store.tables import Job

SPEC: dict[str, Any] = RL | {
    "name": "a job",
    "rollout": {"prompts_per_step": 2, "group_size": 2, "max_completion_tokens": 4},
    "limits": {"max_steps": 10},
}
_projects = count(1)


def conforms(response: httpx.Response) -> None:
    """Every answer in every test is one that openapi.json announces: its status, its media type, its schema."""
    if response.request.url.path == "/openapi.json":
        return
    paths = _document()["paths"]
    method, status = response.request.method, str(response.status_code)
    path = next((path for path in paths if _template(path).fullmatch(response.request.url.path)), None)
    operation = paths.get(path, {}).get(method.lower())
    if operation is None:
        assert response.status_code in (400, 404, 405), status
        return
    assert status in operation["responses"], f"{method} {path}: {status}"
    kind = response.headers.get("content-type", "").partition(";")[0]
    if response.status_code != 204:
        assert kind in operation["responses"][status].get("content", {}), f"{method} {path} answered {kind}"
    if kind.endswith("json"):
        response.read()
        _validator(path, method.lower(), status, kind).validate(response.json())


@cache
def _validator(path: str, method: str, status: str, kind: str) -> Draft202012Validator:
    document = _document()
    schema = document["paths"][path][method]["responses"][status]["content"][kind]["schema"]
    return Draft202012Validator({**schema, "components": document["components"]})


@cache
def _document() -> dict[str, Any]:
    return create_app(Settings()).openapi()


@cache
def _template(path: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path)))


@dataclass(frozen=True)
class Api:
    """A running server, and what stands behind it."""

    url: str
    app: FastAPI
    settings: Settings
    store: Store
    doorbell: Doorbell

    def client(self, project: str | None = None) -> httpx.Client:
        """A client with a fresh key, of a fresh project unless one is named."""
        with self.store.begin() as session:
            _, text = keys.create(session, project=project or f"project-{next(_projects)}", name="test")
        return self.anonymous(Authorization=f"Bearer {text}")

    def anonymous(self, **headers: str) -> httpx.Client:
        # Without TLS it need not read certificates for 40 ms.
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, event_hooks={"response": [conforms]}, verify=False)

    def claim(self, job_id: str, owner: str = "wrk_test") -> tuple[Lease, Job]:
        """Take the job as a worker does, whatever else is queued."""
        while (claimed := leases.claim(self.store, self.settings, owner, ["any"])) is not None:
            if claimed[1].id == job_id:
                return claimed
        raise AssertionError(f"{job_id} is not queued")


@contextmanager
def log_is_kept() -> Iterator[None]:
    """The application takes the root logger over when it starts."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@contextmanager
def running(settings: Settings) -> Iterator[Api]:
    """The application under uvicorn, in a thread, until the block ends."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = create_app(settings)
    config = uvicorn.Config(
        app, http=BoundedHttp, log_config=None, access_log=False, timeout_graceful_shutdown=1, ws="none", lifespan="on"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    with log_is_kept():
        thread.start()
        deadline = time.monotonic() + 15
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < deadline, "the server did not start in time"
            time.sleep(0.01)
    store, doorbell = open_store(settings), Doorbell(settings)
    try:
        yield Api(f"http://127.0.0.1:{listener.getsockname()[1]}", app, settings, store, doorbell)
    finally:
        server.should_exit = True
        thread.join(timeout=15)
        listener.close()
        doorbell.close()
        store.close()
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="session")
def api(sqlite_template: Path, _redis_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One server on SQLite for all tests that need nothing special; each test has its own project in it."""
    folder = tmp_path_factory.mktemp("api")
    shutil.copyfile(sqlite_template, folder / "ratchet.db")
    settings = Settings(
        environment="development",
        data_dir=folder,
        redis_url=SecretStr(_redis_database),
        max_body_bytes=200_000,
        max_dataset_bytes=300_000,
        reconcile_every_s=3600,  # hundreds of jobs are left queued: nobody shall ring for them
        grader_secrets={"judge": SecretStr("a-secret-of-the-operator")},
    )
    with running(settings) as api:
        yield api


@pytest.fixture(scope="session")
def new_api() -> Callable[[Settings], AbstractContextManager[Api]]:
    """For tests that want a server with settings of their own."""
    return running


@pytest.fixture
def client(api: Api) -> Iterator[httpx.Client]:
    with api.client() as client:
        yield client


@pytest.fixture
def other(api: Api) -> Iterator[httpx.Client]:
    """Somebody else: a key of another project."""
    with api.client() as client:
        yield client


@pytest.fixture
def each_api(settings: Settings) -> Iterator[Api]:
    """A server of its own, once on SQLite and once on PostgreSQL."""
    with running(settings) as api:
        yield api


@pytest.fixture
def submit(client: httpx.Client, spec: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Submits such a spec, and answers the job."""

    def submit(**sections: Any) -> dict[str, Any]:
        answer = client.post("/v1/jobs", json=spec(**sections))
        assert answer.status_code == 201, answer.text
        return answer.json()

    return submit


@pytest.fixture
def spec() -> Callable[..., dict[str, Any]]:
    """SPEC with sections replaced; a section that is a dict is laid over SPEC's own."""

    def spec(**sections: Any) -> dict[str, Any]:
        laid = {
            key: {**SPEC[key], **value} if isinstance(value, dict) and key in SPEC else value for key, value in sections.items()
        }
        return {**SPEC, **laid}

    return spec


@pytest.fixture
def serve() -> Callable[[Settings], AbstractContextManager[Api]]:
    """For servers with settings of their own: `with serve(settings) as api:`."""
    return running


@pytest.fixture(scope="session")
def serve_for_long() -> Callable[[Settings], AbstractContextManager[Api]]:
    """`serve` for fixtures of a wider scope."""
    return running


@pytest.fixture
def own_log() -> Iterator[None]:
    with log_is_kept():
        yield
