"""Health, numbers, models, headers, and what stops the service from starting."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from time import monotonic, sleep

import httpx
import pytest
from pydantic import SecretStr

from service.api.examples import JOB_SPEC
from service.app import create_app
from service.edge.startup import BadSettings, check_secrets, ensure_bootstrap_key
from service.ids import new_id, utcnow
from service.jobs.lease import hello
from service.settings import Settings
from service.store import keys
from service.store.session import open_store
from service.store.tables import Worker

KEY = "tml-" + "aB3dE6gH9kL2nP5rS8uV1xY4zA7cF0iJ3mO6qT9wX2Z"


def a_worker():
    now = utcnow()
    return Worker(
        id=new_id("wrk"), host="here", pid=1, device="cpu", resource_classes=["any", "cpu"], started_at=now, last_seen_at=now
    )


def test_alive_and_ready(each_api):
    with each_api.anonymous() as anybody:
        assert anybody.get("/livez").json() == {"status": "alive"}
        ready = anybody.get("/readyz")
        assert ready.status_code == 200
        assert (ready.json()["status"], ready.json()["database"]["ok"], ready.json()["redis"]["ok"]) == ("ready", True, True)
        assert ready.json()["workers"]["alive"] == 0
        assert "no worker" in ready.json()["workers"]["detail"]  # told, not failed: jobs wait for one
        hello(each_api.store, a_worker())
        assert anybody.get("/readyz").json()["workers"] == {"alive": 1, "detail": None}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_without_redis_it_is_not_ready_but_works(serve, settings, own_redis, spec):
    with serve(settings.model_copy(update={"redis_url": SecretStr(own_redis.url)})) as api, api.client() as client:
        assert client.get("/readyz").status_code == 200
        own_redis.kill()
        away = client.get("/readyz")
        assert away.status_code == 503
        assert away.headers["Retry-After"] == "5"
        assert away.json()["redis"]["ok"] is False
        assert away.json()["database"]["ok"] is True
        assert client.get("/livez").status_code == 200
        assert client.post("/v1/jobs", json=spec()).status_code == 201  # the reconciler rings later
        own_redis.start()
        assert client.get("/readyz").status_code == 200


def test_numbers_for_prometheus(each_api, spec):
    with each_api.client() as client:
        client.post("/v1/jobs", json=spec(resources={"class": "gpu"}))
        paused = client.post("/v1/jobs", json=spec()).json()
        client.post(f"/v1/jobs/{paused['id']}/pause")
        client.get("/v1/jobs/job_absent")
        hello(each_api.store, a_worker())
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    values = dict(re.findall(r"^(\w+(?:\{.*\})?) (\S+)$", answer.text, re.MULTILINE))
    assert values['ratchet_jobs{status="queued"}'] == "1.0"
    assert values['ratchet_jobs{status="paused"}'] == "1.0"
    assert values['ratchet_jobs{status="failed"}'] == "0.0"
    assert values['ratchet_queue_depth{resource_class="gpu"}'] == "1.0"
    assert values['ratchet_queue_depth{resource_class="any"}'] == "0.0"
    assert values["ratchet_workers_alive"] == "1.0"
    assert float(values['ratchet_http_requests_total{method="GET",route="/v1/jobs/{job_id}",status="404"}']) >= 1
    assert paused["id"] not in answer.text


def test_models_are_listed(api, client):
    folder = api.settings.local_models_dir / "small"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64, "torch_dtype": "x"}))
    (folder / "model.safetensors").write_bytes(b"w" * 100)
    (api.settings.local_models_dir / "no model").mkdir(exist_ok=True)
    models = {one["id"]: one for one in client.get("/v1/models").json()["data"]}
    assert set(models) == {"tiny", "small"}
    assert models["small"]["config"] == {"model_type": "llama", "hidden_size": 64}
    assert models["small"]["size_bytes"] == 100


def test_a_listed_model_can_be_named_in_a_spec(api, client, spec):
    folder = api.settings.local_models_dir / "named"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    job = client.post("/v1/jobs", json=spec(model={"source": "named"}))
    assert job.status_code == 201, job.text
    assert job.json()["spec"]["model"]["source"] == str(folder)


def test_every_answer_has_an_id_and_safe_headers(client):
    first, second = client.get("/v1/jobs"), client.get("/v1/nothing")
    assert re.fullmatch(r"req_[0-9a-z]{26}", first.headers["x-request-id"])
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    for answer in (first, second):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"


# ---------------------------------------------------------------- starting


@pytest.mark.parametrize(
    "changes",
    [
        {"database_url": SecretStr("postgresql+psycopg://ratchet:ratchet@db/ratchet")},
        {"database_url": SecretStr("postgresql+psycopg://ratchet:@db/ratchet")},
        {"redis_url": SecretStr("redis://:ChangeMe@redis:6379/0")},
        {"grader_secrets": {"judge": SecretStr("secret")}},
        {"bootstrap_key": SecretStr("tml-short")},
        {"bootstrap_key": SecretStr("tml-" + "a" * 43)},
        {"bootstrap_key": SecretStr("no prefix " + KEY)},
    ],
)
def test_production_refuses_well_known_secrets(changes):
    production = Settings(environment="production", **changes)
    with pytest.raises(BadSettings):
        check_secrets(production)


def test_production_takes_random_secrets_and_development_any():
    good = {
        "database_url": SecretStr("postgresql+psycopg://ratchet:f00d1a5c@db/ratchet"),
        "redis_url": SecretStr("redis+socket:///run/redis.sock"),
        "grader_secrets": {"judge": SecretStr("0123456789abcdef")},
        "bootstrap_key": SecretStr(KEY),
    }
    check_secrets(Settings(environment="production", **good))
    check_secrets(Settings(environment="production"))
    check_secrets(Settings(environment="development", redis_url=SecretStr("redis://:redis@redis/0")))


def test_the_bootstrap_key_is_made_once_and_stays_revoked(settings):
    settings = settings.model_copy(update={"bootstrap_key": SecretStr(KEY)})
    store = open_store(settings)
    for _ in range(2):
        ensure_bootstrap_key(store, settings)
    with store.begin() as session:
        key = keys.find(session, KEY)
        assert key is not None
        assert key.project == "default" and "admin" in key.scopes
        keys.revoke(session, "default", key.id)
    ensure_bootstrap_key(store, settings)
    with store.begin() as session:
        assert keys.find(session, KEY) is None
    store.close()


def test_a_database_that_was_not_migrated_stops_the_start(tmp_path, redis_url, own_log):
    app = create_app(Settings(environment="development", data_dir=tmp_path, redis_url=SecretStr(redis_url)))

    async def start():
        async with app.router.lifespan_context(app):
            pass

    with pytest.raises(BadSettings, match="python -m migrations upgrade head"):
        asyncio.run(start())


# ---------------------------------------------------------------- stopping


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_it_stops_at_once_though_somebody_follows(settings, store, doorbell, free_port):
    """Streams and long polls end by themselves; otherwise the server would wait for them."""
    with store.begin() as session:
        _, key = keys.create(session, project="default", name="test")
    environment = {
        **os.environ,
        "RATCHET_DATA_DIR": str(settings.data_dir),
        "RATCHET_DATABASE_URL": settings.sql_url,
        "RATCHET_REDIS_URL": settings.redis_url.get_secret_value(),
        "RATCHET_PORT": str(free_port),
    }
    server = subprocess.Popen([sys.executable, "-m", "service"], env=environment, stderr=subprocess.PIPE)
    url = f"http://127.0.0.1:{free_port}"
    try:
        client = httpx.Client(base_url=url, headers={"X-API-Key": key}, timeout=30)
        until_ready(client, server)
        job = client.post("/v1/jobs", json=JOB_SPEC).json()
        with (
            ThreadPoolExecutor(1) as pool,
            client.stream("GET", job["links"]["events"], headers={"Accept": "text/event-stream"}) as stream,
        ):
            lines = stream.iter_lines()
            next(lines)
            waiting = pool.submit(client.get, f"/v1/jobs/{job['id']}", params={"wait_s": 60})
            sleep(0.5)
            server.send_signal(signal.SIGTERM)
            started = monotonic()
            list(lines)  # ends; it is not cut
            assert waiting.result(timeout=10).status_code == 200
            _, log = server.communicate(timeout=10)
            assert monotonic() - started < 2.5
            assert b"Traceback" not in log
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def until_ready(client, server):
    deadline = monotonic() + 30
    while True:
        try:
            assert client.get("/readyz").status_code == 200
            return
        except httpx.TransportError:
            assert server.poll() is None, server.stderr.read()
            assert monotonic() < deadline
            sleep(0.05)
