"""What screens are made of: jobs at a glance, their attempts and events backwards, workers, the queue, one's own key."""

from datetime import timedelta

import pytest

from service.ids import utcnow
from service.jobs import lease as leases
from service.store import metrics, workers
from service.store.tables import Worker
from service.store.usage import Spent


@pytest.fixture
def run(each_api, spec):
    """A job that runs, at step 40 of 100, a step every two seconds; and one that waits. Their client."""
    with each_api.client() as client:
        job_id = client.post("/v1/jobs", json=spec(name="runs", limits={"max_steps": 100})).json()["id"]
        lease, _ = each_api.claim(job_id)
        spent = Spent(100, 10, {"sampling": 2.0, "updating": 1.0})
        leases.commit_step(each_api.store, lease, 40, {"reward/mean": 0.4, "policy/odd": 1.0}, spent=spent)
        with each_api.store.begin() as session:
            for step in range(1, 40):
                at = utcnow() - timedelta(seconds=2 * (40 - step))
                metrics.write(session, job_id, step, {"reward/mean": step / 100}, attempt=1, now=at)
        waits = client.post("/v1/jobs", json=spec(name="waits", tags=["later"])).json()["id"]
        yield each_api, client, job_id, waits, lease


def test_a_page_of_jobs_at_a_glance(run):
    _, client, job_id, waits, _ = run
    page = client.get("/v1/jobs:overview", params={"limit": 1}).json()
    assert [one["id"] for one in page["data"]] == [waits] and page["has_more"]
    assert page["data"][0]["curve"] is None and page["data"][0]["left_s"] is None
    (job,) = client.get("/v1/jobs:overview", params={"after": page["last_id"]}).json()["data"]
    assert (job["id"], job["step"], job["tokens"], job["worker_s"], job["key_name"]) == (job_id, 40, 110, 3.0, "test")
    assert job["left_s"] == pytest.approx(60 * 2, rel=0.1)  # by the clock of the newest twenty steps
    assert job["allowed_actions"] == ["pause", "cancel", "fork"]


def test_a_curve_at_a_glance_has_few_points_however_long_it_is(run):
    _, client, job_id, waits, _ = run

    def curves(**query):
        return {one["id"]: one["curve"] for one in client.get("/v1/jobs:overview", params=query).json()["data"]}

    curve = curves()[job_id]
    assert curve["name"] == "reward/mean" and len(curve["step"]) == 32
    assert (curve["step"][0], curve["step"][-1]) == (1, 40)
    assert curve["value"] == pytest.approx([step / 100 for step in curve["step"]])
    assert curves(curves="none") == {job_id: None, waits: None}
    assert curves(curves="live", id=[job_id])[job_id] == curve
    assert set(curves(tag="later")) == {waits} and set(curves(status="running")) == {job_id}


def test_attempts_stand_one_by_one(run):
    api, client, job_id, _, lease = run
    leases.cancelled(api.store, lease)
    (attempt,) = client.get(f"/v1/jobs/{job_id}/attempts").json()["data"]
    assert (attempt["attempt"], attempt["steps"], attempt["sampled_tokens"], attempt["trained_tokens"]) == (1, 40, 100, 10)
    assert attempt["phase_s"]["sampling"] == 2.0 and attempt["wasted_s"] >= 3.0 and attempt["failure"] is None


def test_events_come_backwards_without_the_steps(run):
    _, client, job_id, _, _ = run

    def read(**query):
        page = client.get(f"/v1/jobs/{job_id}/events", params={"order": "newest_first", **query}).json()
        return [(event["seq"], event["type"]) for event in page["data"]], page

    every, _ = read()
    assert [seq for seq, _ in every] == sorted((seq for seq, _ in every), reverse=True) and every[0][1] == "step"
    quiet, _ = read(without=["step", "phase_changed"])
    assert quiet == [one for one in every if one[1] not in ("step", "phase_changed")]
    first, page = read(limit=2)
    assert page["has_more"] and first + read(before=page["last_id"])[0] == every
    assert client.get(f"/v1/jobs/{job_id}/events", params={"without": "created"}).status_code == 422


def test_the_names_of_a_job_s_curves_are_told(run):
    _, client, job_id, waits, _ = run
    names = client.get(f"/v1/jobs/{job_id}/metrics/names").json()["data"]
    assert [one["name"] for one in names] == ["policy/odd", "reward/mean"]
    assert names[1]["better"] == "up" and names[1]["drawn"] and names[1]["means"]
    assert client.get(f"/v1/jobs/{waits}/metrics/names").json()["data"] == []


def test_workers_show_only_one_s_own_jobs(run):
    api, client, job_id, _, _ = run
    now = utcnow()
    facts = {"host": "h", "pid": 1, "device": "cpu", "draining": False, "started_at": now, "last_seen_at": now}
    with api.store.begin() as session:
        workers.hello(session, Worker(id="wrk_test", resource_classes=["any"], memory={"process": 5}, **facts))
    (worker,) = client.get("/v1/workers").json()["data"]
    assert (worker["id"], worker["job_ids"], worker["memory"]) == ("wrk_test", [job_id], {"process": 5})
    with api.client() as other:
        (worker,) = other.get("/v1/workers").json()["data"]
        assert worker["job_ids"] == [] and other.get("/v1/queue").json()["jobs"] == {}
    queue = client.get("/v1/queue").json()
    assert queue["jobs"] == {"running": 1, "queued": 1} and queue["waiting"]["any"]["jobs"] == 1
    assert queue["waiting"]["any"]["oldest_wait_s"] >= 0


def test_a_key_is_told_about_itself(api, client):
    narrow = client.post("/v1/keys", json={"name": "looks", "scopes": ["read"]}).json()
    with api.anonymous(**{"X-API-Key": narrow["key"]}) as reader:
        told = reader.get("/v1/keys/self").json()
    assert (told["id"], told["scopes"], told["name"]) == (narrow["id"], ["read"], "looks") and "key" not in told
