"""The audit log: what was changed, by which key, and nothing else."""

from datetime import timedelta

import pytest
from sqlalchemy import update
from sqlalchemy.exc import IntegrityError

from service.api.examples import LOSS_REQUEST, SESSION_SPEC, TRAIN_STEP
from service.edge import audit as edge
from service.store import audit
from service.store.tables import AuditEntry


def entries(client, **params):
    page = client.get("/v1/audit", params={"limit": 100, **params}).json()
    return [(one["action"], one["object_id"], one["key_id"], one["status"]) for one in page["data"]]


def test_a_dry_run_is_not_told(each_api):
    with each_api.client() as client:
        for dry_run in (True, False):
            client.post("/v1/checkpoints:delete", json={"older_than_s": 0, "dry_run": dry_run})
        assert [action for action, *_ in entries(client)] == ["POST /v1/checkpoints:delete"]


def test_changes_are_told_with_who_what_and_when(each_api, spec):
    with each_api.client() as client:
        own = client.get("/v1/keys").json()["data"][0]["id"]
        made = client.post("/v1/jobs", json=spec())
        job = made.json()["id"]
        cancelled = client.post(f"/v1/jobs/{job}/cancel")
        client.delete(f"/v1/jobs/{job}")
        hook = client.post("/v1/webhooks", json={"url": "https://example.com"}).json()["id"]
        key = client.post("/v1/keys", json={"name": "x"}).json()["id"]
        client.delete(f"/v1/keys/{key}")
        assert entries(client) == [
            ("DELETE /v1/keys/{key_id}", key, own, 204),
            ("POST /v1/keys", key, own, 201),
            ("POST /v1/webhooks", hook, own, 201),
            ("DELETE /v1/jobs/{job_id}", job, own, 204),
            ("POST /v1/jobs/{job_id}/cancel", job, own, 200),
            ("POST /v1/jobs", job, own, 201),
        ]
        of_job = client.get("/v1/audit", params={"object_id": job}).json()["data"]
        assert [one["request_id"] for one in of_job[1:]] == [one.headers["X-Request-Id"] for one in (cancelled, made)]
        assert entries(client, key_id="key_x") == []
        page = client.get("/v1/audit", params={"limit": 2}).json()
        assert page["has_more"] and len(entries(client, after=page["last_id"])) == 4


def test_what_changed_nothing_and_work_are_not_told(client, submit, spec):
    client.post("/v1/jobs", json={"kind": "rl"})
    client.get("/v1/jobs")
    client.post("/v1/jobs:validate", json=spec())
    client.post("/v1/losses", json=LOSS_REQUEST)
    client.post("/v1/jobs/job_x/cancel")
    assert entries(client) == []
    session = client.post("/v1/sessions", json=SESSION_SPEC).json()["id"]
    client.post(f"/v1/sessions/{session}/operations", json=TRAIN_STEP)
    assert [entry[:2] for entry in entries(client)] == [("POST /v1/sessions", session)]


def test_a_replayed_answer_is_told_once(client, spec):
    for _ in range(2):
        client.post("/v1/jobs", json=spec(), headers={"Idempotency-Key": "one"})
    assert len(entries(client)) == 1


def test_projects_see_their_own(api, client, other, submit):
    job = submit()
    assert entries(other) == []
    project = client.get("/v1/keys").json()["data"][0]["project"]
    assert other.get("/v1/audit", params={"project": project}).status_code == 403
    with api.client("default") as admin:
        assert entries(admin, project=project)[0][:2] == ("POST /v1/jobs", job["id"])


def test_every_route_that_changes_something_is_told_or_named_as_work(api):
    """A negative control of WORK: each of its routes is there."""
    paths = api.app.openapi()["paths"]
    assert set(paths) >= edge.WORK and all("post" in paths[path] for path in edge.WORK)


def test_an_answer_comes_though_the_log_cannot_be_written(client, submit, monkeypatch, caplog):
    def broken(*_):
        raise OSError("the disk")

    job = submit()["id"]
    monkeypatch.setattr(edge, "_write", broken)
    assert client.post(f"/v1/jobs/{job}/cancel").status_code == 200
    assert "the audit log lacks this" in caplog.text


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/sessions"])
def test_a_job_is_told_in_the_transaction_that_makes_it(client, spec, monkeypatch, path):
    """One commit instead of two; nobody sees the job without the entry, and where there is no entry there is no job."""
    wrote = []
    monkeypatch.setattr(edge, "_write", lambda *_: wrote.append(1))
    sent = spec() if path == "/v1/jobs" else SESSION_SPEC
    made = client.post(path, json=sent)
    assert entries(client) == [(f"POST {path}", made.json()["id"], client.get("/v1/keys").json()["data"][0]["id"], 201)]
    assert wrote == []

    def broken(*_, **__):
        raise IntegrityError("", {}, Exception())

    monkeypatch.setattr(audit, "note", broken)
    assert client.post(path, json=sent).status_code == 409
    assert len(client.get(path).json()["data"]) == 1


@pytest.mark.parametrize("age_days", [399, 401])
def test_old_entries_are_forgotten(each_api, spec, age_days):
    with each_api.client() as client:
        client.post("/v1/jobs", json=spec())
        now = each_api.store.now()
        with each_api.store.begin() as session:
            session.execute(update(AuditEntry).values(created_at=now - timedelta(days=age_days)))
            audit.expire(session, now)
        assert len(entries(client)) == (1 if age_days < 400 else 0)
