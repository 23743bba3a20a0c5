"""What a project spent and may spend, over HTTP."""

from datetime import UTC, datetime

import pytest

from service.jobs import lease as leases
from service.store.usage import Spent


def spend(api, job_id, sampled=100, trained=10, step=1):
    lease, _ = api.claim(job_id)
    spent = Spent(sampled, trained, {"sampling": 2.0, "updating": 1.0})
    return lease, leases.commit_step(api.store, lease, step, {}, spent=spent)


def test_a_job_s_usage_stands_in_it_and_in_its_project_s(api, client, other, submit):
    job = submit()
    assert job["usage"]["tokens"] == 0 and job["usage"]["attempts"] == 0
    lease, _ = spend(api, job["id"])
    leases.cancelled(api.store, lease)
    spent = client.get(f"/v1/jobs/{job['id']}").json()["usage"]
    assert (spent["attempts"], spent["tokens"], spent["sampled_tokens"], spent["trained_tokens"]) == (1, 110, 100, 10)
    assert spent["worker_s"] >= 3.0 and spent["phase_s"]["sampling"] == 2.0
    assert spent["wasted"]["sampled_tokens"] == 100
    for group_by, group in (("day", f"{datetime.now(UTC):%Y-%m-%d}"), ("job", job["id"]), ("key", job["key_id"])):
        found = client.get("/v1/usage", params={"group_by": group_by}).json()
        assert found["total"] == spent
        assert found["data"] == [{**spent, "group": group}]
    assert job["key_id"].startswith("key_")
    assert client.get("/v1/usage", params={"from": "2999-01-01"}).json()["total"]["tokens"] == 0
    assert client.get("/v1/usage", params={"to": "1999-01-01"}).json()["data"] == []
    assert client.get("/v1/usage", params={"job_id": job["id"]}).json()["total"]["tokens"] == 110
    assert client.get("/v1/usage", params={"key_id": "key_other"}).json()["total"]["tokens"] == 0
    assert other.get("/v1/usage", params={"job_id": job["id"]}).json()["total"]["tokens"] == 0
    client.delete(f"/v1/jobs/{job['id']}")
    assert client.get("/v1/usage").json()["total"]["tokens"] == 110


def test_another_project_s_usage_is_for_administrators(api, client, other):
    project = client.get("/v1/usage").json()["project"]
    assert other.get("/v1/usage", params={"project": project}).status_code == 403
    assert other.get("/v1/budget", params={"project": project}).status_code == 403
    with api.client("default") as admin:
        assert admin.get("/v1/usage", params={"project": project}).json()["project"] == project
        by_project = admin.get("/v1/usage", params={"group_by": "project"}).json()
        assert by_project["project"] is None and by_project["total"]["tokens"] == sum(
            one["tokens"] for one in by_project["data"]
        )
    assert client.get("/v1/usage", params={"group_by": "project"}).status_code == 403
    assert client.get("/v1/usage", params={"from": "yesterday"}).status_code == 422
    assert client.get("/v1/usage", params={"group_by": "month"}).status_code == 422


@pytest.mark.parametrize(
    "day", ["0", "20000", "1e3", "2026-11-01T00:00:00Z", "2026-02-30", "2026-1-1", "20261101", "0000-01-01", ""]
)
def test_a_day_is_written_in_one_way(api, client, day):
    for name in ("from", "to"):
        refused = client.get("/v1/usage", params={name: day})
        assert refused.status_code == 422 and f"/query/{name}: must be a day" in refused.json()["detail"]
    with api.client("default") as admin:
        for since in (day, 20000, None):
            refused = admin.put("/v1/budget", json={"project": "p", "since": since})
            assert refused.status_code == 422 and refused.json()["errors"][0]["pointer"] == "/since"


def test_a_job_rests_when_its_budget_is_spent_and_goes_on_with_a_larger_one(api, client, submit):
    job = submit(limits={"budget": {"tokens": 100}})
    assert (job["budget_tokens"], job["budget_worker_s"]) == (100, None)
    lease, is_spent = spend(api, job["id"])
    assert is_spent
    leases.pause(api.store, lease, "budget_spent")
    refused = client.post(f"/v1/jobs/{job['id']}/resume")
    assert (refused.status_code, refused.json()["code"]) == (409, "budget_spent")
    assert "resume" in refused.json()["allowed_moves"]
    assert client.post(f"/v1/jobs/{job['id']}/resume", json={"budget": {"tokens": 110}}).status_code == 409
    assert client.post(f"/v1/jobs/{job['id']}/resume", json={"budget": {"tokens": 0}}).status_code == 422
    resumed = client.post(f"/v1/jobs/{job['id']}/resume", json={"budget": {"tokens": 111, "worker_s": 900}}).json()
    assert (resumed["status"], resumed["budget_tokens"], resumed["budget_worker_s"]) == ("queued", 111, 900)
    client.post(f"/v1/jobs/{job['id']}/pause")
    unbound = client.post(f"/v1/jobs/{job['id']}/resume", json={"budget": {"tokens": None}}).json()
    assert (unbound["budget_tokens"], unbound["budget_worker_s"]) == (None, 900)


def test_a_project_s_budget_is_set_by_administrators_only(api, client, submit):
    project = client.get("/v1/budget").json()["project"]
    bounds = {"project": project, "tokens": 50}
    assert client.put("/v1/budget", json=bounds).status_code == 403
    with api.client("default") as admin:
        assert admin.put("/v1/budget", json={**bounds, "tokens": -1}).status_code == 422
        assert admin.put("/v1/budget", json=bounds).json()["tokens"] == 50
    job = submit()
    lease, is_spent = spend(api, job["id"])
    assert is_spent
    leases.pause(api.store, lease, "budget_spent")
    found = client.get("/v1/budget").json()
    assert (found["tokens"], found["spent"]["tokens"]) == (50, 110)
    assert client.post(f"/v1/jobs/{job['id']}/resume", json={"budget": {"tokens": 10**9}}).json()["code"] == "budget_spent"
    with api.client("default") as admin:
        admin.put("/v1/budget", json={**bounds, "since": "2999-01-01"})
    assert client.post(f"/v1/jobs/{job['id']}/resume").json()["status"] == "queued"
