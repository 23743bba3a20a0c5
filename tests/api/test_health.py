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
from datetime import timedelta
from pathlib import Path
from time import monotonic, sleep

import httpx
import pytest
from pydantic import SecretStr

from service.api.examples import JOB_SPEC
from service.app import create_app
from service.edge.startup import BadSettings, check_secrets, ensure_bootstrap_key
from service.errors import Failure
from service.ids import new_id, utcnow
from service.jobs import lease
from service.jobs.lease import hello, seen
from service.jobs.reconciler import reconcile
from service.settings import Settings
from service.store import keys
from service.store.session import open_store
from service.store.tables import Job, Worker
from service.store.usage import Spent

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


def taken(store, settings):
    claimed = lease.claim(store, settings, "wrk_1", ["any"])
    assert claimed is not None
    return claimed[0]


def numbers(client):
    return dict(re.findall(r"^(\w+(?:\{.*\})?) (\S+)$", client.get("/metrics").text, re.MULTILINE))


def test_prometheus_counts_what_workers_did_and_how_they_failed(each_api, spec):
    store, settings = each_api.store, each_api.settings
    with each_api.client() as client:
        before = numbers(client)
        job = client.post("/v1/jobs", json=spec()).json()
        with store.begin() as session:
            session.get(Job, job["id"]).queued_at -= timedelta(seconds=100)
        waiting = numbers(client)
        assert 100 <= float(waiting['ratchet_queue_oldest_wait_seconds{resource_class="any"}']) < 130
        held = taken(store, settings)
        lease.commit_step(store, held, 0, {}, spent=Spent(7, 0))
        lease.commit_step(store, held, 1, {}, spent=Spent(100, 40, {"sampling": 2.5}))
        lease.commit_step(store, held, 2, {}, spent=Spent(100, 40, {"sampling": 1.5}))
        lease.release(store, held, "failed", failure=Failure("io_error", "the disk"))
        held = taken(store, settings)
        lease.fail(store, held, Failure("io_error", "the disk"))
        late = client.post("/v1/jobs", json=spec(limits={"max_steps": 1, "deadline_s": 60})).json()
        with store.begin() as session:
            session.get(Job, late["id"]).deadline_at = utcnow() - timedelta(seconds=1)
        reconcile(store, settings, each_api.doorbell, utcnow())
        for job_id in (job["id"], late["id"]):
            assert client.delete(f"/v1/jobs/{job_id}").status_code == 204  # counters stay
        after = waiting
        until = monotonic() + 20
        while after["ratchet_steps_total"] == waiting["ratchet_steps_total"] and monotonic() < until:
            after = numbers(client)  # the ledger is not read again at once

    def more(name):
        return float(after[name]) - float(before.get(name, 0))

    assert more("ratchet_steps_total") == 2
    assert more('ratchet_tokens_total{kind="sampled"}') == 207 and more('ratchet_tokens_total{kind="trained"}') == 80
    assert more('ratchet_wasted_tokens_total{kind="sampled"}') == 207
    assert more('ratchet_worker_seconds_total{phase="sampling"}') == 4
    assert more('ratchet_failures_total{code="io_error"}') == 2 and more('ratchet_failures_total{code="deadline"}') == 1
    assert more("ratchet_queue_wait_seconds_count") == 2 and 100 <= more("ratchet_queue_wait_seconds_sum") < 130
    assert after['ratchet_queue_oldest_wait_seconds{resource_class="any"}'] == "0.0"
    assert after['ratchet_failures_total{code="worker_lost"}'] == "0.0"  # there before it first happens: a rate needs that


def test_prometheus_knows_the_memory_of_workers_that_live(each_api):
    worker = a_worker()
    worker.memory = {"process": 3_000_000, "gpu_used": 5, "gpu_total": 10}
    seen(each_api.store, worker)
    gone = a_worker()
    gone.id, gone.memory = "wrk_gone", {"process": 1}
    seen(each_api.store, gone)
    with each_api.store.begin() as session:
        session.get(Worker, "wrk_gone").last_seen_at -= timedelta(seconds=90)
    with each_api.client() as client:
        values = numbers(client)
    assert values[f'ratchet_worker_memory_bytes{{worker="{worker.id}"}}'] == "3e+06"
    assert values[f'ratchet_worker_gpu_memory_used_bytes{{worker="{worker.id}"}}'] == "5.0"
    assert values[f'ratchet_worker_gpu_memory_total_bytes{{worker="{worker.id}"}}'] == "10.0"
    assert not any("wrk_gone" in name for name in values)


def test_every_metric_of_ours_is_documented(each_api):
    with each_api.client() as client:
        told = set(re.findall(r"^# HELP (ratchet_\w+)", client.get("/metrics").text, re.MULTILINE))
    page = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text()
    assert len(told) > 12
    assert [name for name in told if name.removesuffix("_created") not in page and "_http_" not in name] == []


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
