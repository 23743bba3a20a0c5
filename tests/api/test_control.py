"""What may be said with a pause or a cancel, and in which status; deadlines of jobs that nobody runs."""

from datetime import timedelta

import pytest
from sqlalchemy import update

from service.ids import new_id, utcnow
from service.jobs import lease as leases
from service.jobs.reconciler import reconcile
from service.states import Wish
from service.store.tables import Job


@pytest.mark.parametrize(
    ("action", "body", "wish", "grace_s"),
    [
        ("pause", None, Wish.PAUSE, None),
        ("pause", {"grace_seconds": 5}, Wish.PAUSE, 5),
        ("cancel", None, Wish.CANCEL, 60),
        ("cancel", {"final_checkpoint": "none", "grace_seconds": 0}, Wish.CANCEL, 0),
        ("cancel", {"final_checkpoint": "save"}, Wish.SAVE_AND_CANCEL, 60),
    ],
)
def test_a_running_job_hears_what_is_wished(api, client, submit, action, body, wish, grace_s):
    job = submit()
    lease, _ = api.claim(job["id"], new_id("wrk"))
    asked = utcnow()
    answer = client.post(f"/v1/jobs/{job['id']}/{action}", json=body) if body else client.post(f"/v1/jobs/{job['id']}/{action}")
    assert answer.status_code == 200 and answer.json()["status"] == {"pause": "pausing", "cancel": "cancelling"}[action]
    assert leases.renew_all(api.store, api.settings, [lease]) == {lease: wish}
    late = [] if grace_s is None else [job["id"]]
    moment = asked + timedelta(seconds=grace_s or 0)
    assert leases.in_hands_of(api.store, lease.owner, moment - timedelta(seconds=1)).disobeyed == []
    assert leases.in_hands_of(api.store, lease.owner, moment + timedelta(seconds=30)).disobeyed == late
    assert not leases.in_hands_of(api.store, lease.owner).nothing
    leases.cancelled(api.store, lease) if action == "cancel" else leases.pause(api.store, lease)
    assert leases.in_hands_of(api.store, lease.owner, moment + timedelta(days=2)) == leases.InHands(True, [])


@pytest.mark.parametrize(
    ("action", "body", "pointer"),
    [
        ("pause", {"final_checkpoint": "save"}, "/final_checkpoint"),
        ("pause", {"grace_seconds": -1}, "/grace_seconds"),
        ("cancel", {"final_checkpoint": "maybe"}, "/final_checkpoint"),
        ("cancel", {"grace": 5}, "/grace"),
    ],
)
def test_what_is_not_understood_changes_nothing(client, submit, action, body, pointer):
    job = submit()
    refused = client.post(f"/v1/jobs/{job['id']}/{action}", json=body)
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["pointer"] == pointer
    assert client.get(f"/v1/jobs/{job['id']}").json()["status"] == "queued"


def test_asked_again_the_shorter_grace_counts(api, client, submit):
    job = submit()
    lease, _ = api.claim(job["id"])
    for grace_s in (600, 5, 300):
        client.post(f"/v1/jobs/{job['id']}/cancel", json={"grace_seconds": grace_s})
    assert leases.in_hands_of(api.store, lease.owner, utcnow() + timedelta(seconds=6)).disobeyed == [job["id"]]
    leases.cancelled(api.store, lease)


@pytest.mark.parametrize("status", ["queued", "running", "pausing", "paused", "cancelling", "cancelled"])
def test_each_action_is_taken_where_it_is_legal_and_else_says_what_is(api, client, submit, status):
    """The three actions in each status: 200 where `allowed_actions` has it (or it was asked for already), else 409."""
    for action in ("pause", "resume", "cancel"):
        job_id = submit()["id"]
        lease = api.claim(job_id)[0] if status in ("running", "pausing", "cancelling") else None
        for wished in {"pausing": ["pause"], "paused": ["pause"], "cancelling": ["cancel"], "cancelled": ["cancel"]}.get(
            status, []
        ):
            client.post(f"/v1/jobs/{job_id}/{wished}")
        job = client.get(f"/v1/jobs/{job_id}").json()
        assert job["status"] == status
        answer = client.post(f"/v1/jobs/{job_id}/{action}")
        repeated = (action, status) in {
            ("pause", "pausing"),
            ("pause", "paused"),
            ("cancel", "cancelling"),
            ("cancel", "cancelled"),
        }
        if action in job["allowed_actions"] or repeated:
            assert answer.status_code == 200, (action, status)
        else:
            assert (answer.status_code, answer.json()["code"]) == (409, "illegal_transition"), (action, status)
            assert answer.json()["allowed_moves"] == job["allowed_actions"]
        if lease is not None:
            leases.release(api.store, lease, "drained")
        client.post(f"/v1/jobs/{job_id}/cancel")


def test_a_worker_that_nobody_ends_loses_the_job_all_the_same(api, client, submit):
    """Its parent is stuck, too. What it still writes is refused, for the job is no longer its."""
    job = submit()
    lease, _ = api.claim(job["id"])
    client.post(f"/v1/jobs/{job['id']}/pause", json={"grace_seconds": 1})
    reconcile(api.store, api.settings, api.doorbell, utcnow() + timedelta(seconds=10))
    assert client.get(f"/v1/jobs/{job['id']}").json()["status"] == "pausing"
    reconcile(api.store, api.settings, api.doorbell, utcnow() + timedelta(seconds=20))
    found = client.get(f"/v1/jobs/{job['id']}").json()
    assert (found["status"], found["status_reason"], found["error"]["code"]) == ("paused", "unresponsive", "unresponsive")
    with pytest.raises(leases.LeaseLost):
        leases.commit_step(api.store, lease, 1, {})
    resumed = client.post(f"/v1/jobs/{job['id']}/resume").json()
    assert (resumed["status"], resumed["error"]) == ("queued", None)


def test_a_deadline_ends_a_job_that_waits_and_one_that_rests(api, client, submit):
    waiting, resting, running, timeless = (
        submit(limits={"deadline_s": 60}) if kind != "timeless" else submit() for kind in ("waits", "rests", "runs", "timeless")
    )
    client.post(f"/v1/jobs/{resting['id']}/pause")
    lease, _ = api.claim(running["id"])
    for id_ in (waiting["id"], timeless["id"]):  # the claim above took them on its way
        with api.store.begin() as session:
            session.execute(update(Job).where(Job.id == id_).values(status="queued", lease_owner=None, lease_until=None))
    status = lambda job: client.get(f"/v1/jobs/{job['id']}").json()["status"]  # noqa: E731
    reconcile(api.store, api.settings, api.doorbell, utcnow() + timedelta(seconds=50))
    assert [status(job) for job in (waiting, resting, running, timeless)] == ["queued", "paused", "running", "queued"]
    leases.renew_all(api.store, api.settings.model_copy(update={"lease_ttl_s": 3600.0}), [lease])
    reconcile(api.store, api.settings, api.doorbell, utcnow() + timedelta(seconds=70))
    assert [status(job) for job in (waiting, resting, running, timeless)] == ["failed", "failed", "running", "queued"]
    late = client.get(f"/v1/jobs/{waiting['id']}").json()
    assert (late["status_reason"], late["error"]["category"]) == ("deadline", "user")
    reconcile(api.store, api.settings, api.doorbell, utcnow() + timedelta(seconds=130))  # a worker had a minute to save
    assert [status(job) for job in (running, timeless)] == ["failed", "queued"]
