"""Events, as a list and as a stream."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from time import monotonic, sleep

import pytest

from service.api.events import _look as look
from service.jobs import lease as leases


def parse(lines):
    """Events of a stream, as (id, type, data); comments and retry lines are dropped."""
    fields = {}
    for line in lines:
        name, _, value = line.partition(": ")
        if line == "":
            if "data" in fields:
                yield int(fields["id"]), fields["event"], json.loads(fields["data"])
            fields = {}
        elif name:
            fields[name] = value


def stream(client, job_id, params=None, **headers):
    headers = {"Accept": "text/event-stream", **headers}
    return client.stream("GET", f"/v1/jobs/{job_id}/events", params=params, headers=headers)


def finish(api, job_id, steps=3):
    lease, _ = api.claim(job_id)
    for step in range(1, steps + 1):
        leases.commit_step(api.store, lease, step, {"reward/mean": step / 10}, [])
    leases.succeed(api.store, lease, {"reason": "max_steps"}, "max_steps")
    api.doorbell.signal(job_id, "events")


def test_events_are_listed_in_pages(api, client, submit):
    job = submit()
    finish(api, job["id"])
    first = client.get(f"/v1/jobs/{job['id']}/events", params={"limit": 3}).json()
    assert [event["seq"] for event in first["data"]] == [1, 2, 3]
    assert (first["has_more"], first["first_id"], first["last_id"]) == (True, 1, 3)
    rest = client.get(f"/v1/jobs/{job['id']}/events", params={"after": 3}).json()
    assert [event["type"] for event in rest["data"]] == ["step", "step", "step", "status_changed"]
    assert rest["has_more"] is False
    assert rest["data"][0]["data"]["metrics"] == {"reward/mean": 0.1}
    assert rest["data"][-1]["data"]["to"] == "succeeded"


def test_stream_tells_everything_and_ends_with_the_job(each_api, spec):
    api = each_api
    with api.client() as client:
        job = client.post("/v1/jobs", json=spec()).json()
        worker = threading.Timer(0.5, finish, (api, job["id"]))
        worker.start()
        with stream(client, job["id"]) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            assert response.headers["x-accel-buffering"] == "no"
            told = list(parse(response.iter_lines()))
        worker.join()
        listed = client.get(f"/v1/jobs/{job['id']}/events").json()["data"]
        assert [(event["seq"], event["type"], event) for event in listed] == told
        assert [id_ for id_, _, _ in told] == list(range(1, len(told) + 1))


def test_stream_goes_on_where_it_was_cut(api, client, submit):
    job = submit()
    with stream(client, job["id"]) as response:
        told = parse(response.iter_lines())
        first = [next(told), next(told)]
    finish(api, job["id"])
    with stream(client, job["id"], **{"Last-Event-ID": str(first[-1][0])}) as response:
        rest = list(parse(response.iter_lines()))
    seqs = [id_ for id_, _, _ in first + rest]
    assert seqs == list(range(1, client.get(f"/v1/jobs/{job['id']}").json()["last_event"] + 1))


def test_a_stream_of_a_job_that_has_ended_ends(api, client, submit):
    job = submit()
    client.post(f"/v1/jobs/{job['id']}/cancel")
    last = client.get(f"/v1/jobs/{job['id']}").json()["last_event"]
    with stream(client, job["id"], **{"Last-Event-ID": str(last)}) as response:
        assert list(parse(response.iter_lines())) == []


def test_a_stream_sees_what_is_signalled_at_once(api, client, submit, monkeypatch):
    monkeypatch.setattr("service.edge.tails.POLL_S", 60.0)
    job = submit()
    lease, _ = api.claim(job["id"])
    with stream(client, job["id"]) as response:
        told = parse(response.iter_lines())
        for _ in range(3):
            next(told)
        took = []
        for step in (1, 2, 3):
            sleep(0.2)
            leases.commit_step(api.store, lease, step, {}, [])
            api.doorbell.signal(job["id"], "events")
            committed = monotonic()
            assert next(told)[2]["data"]["step"] == step
            took.append(monotonic() - committed)
    assert min(took) < 1.0


def test_a_stream_may_be_told_now_and_then_and_misses_nothing(api, client, submit, monkeypatch):
    looks = []
    monkeypatch.setattr("service.api.events._look", lambda *given: looks.append(1) or look(*given))
    job, steps = submit(), 40
    lease, _ = api.claim(job["id"])
    with stream(client, job["id"], {"every_s": 1}) as response:
        told = parse(response.iter_lines())
        seqs = [next(told)[0] for _ in range(3)]
        for step in range(1, steps + 1):
            leases.commit_step(api.store, lease, step, {}, [])
            api.doorbell.signal(job["id"], "events")
            sleep(0.02)
        leases.succeed(api.store, lease, {"reason": "max_steps"}, "max_steps")
        api.doorbell.signal(job["id"], "events")
        seqs += [seq for seq, _, _ in told]
    assert seqs == list(range(1, 3 + steps + 2))
    assert len(looks) < steps / 2  # and one for each signal without it


@pytest.mark.parametrize("every_s", ["-1", "60.5", "nan", "often"])
def test_how_often_a_stream_is_told_is_checked(client, submit, every_s):
    with stream(client, submit()["id"], {"every_s": every_s}) as response:
        assert response.status_code == 422
        assert json.loads(response.read())["errors"][0]["pointer"] == "/query/every_s"


def test_a_quiet_stream_is_kept_alive(api, client, submit, monkeypatch):
    monkeypatch.setattr("service.edge.tails.POLL_S", 0.05)
    monkeypatch.setattr("service.api.events.KEEP_ALIVE_S", 0.2)
    job = submit()
    with stream(client, job["id"]) as response:
        comments = (line for line in response.iter_lines() if line.startswith(": still"))
        assert next(comments)
        assert next(comments)


def test_a_stream_ends_when_its_job_is_deleted(api, client, submit, monkeypatch):
    monkeypatch.setattr("service.edge.tails.POLL_S", 0.1)
    job = submit()
    client.post(f"/v1/jobs/{job['id']}/pause")
    with stream(client, job["id"]) as response:
        told = parse(response.iter_lines())
        next(told)
        with api.store.begin() as session:  # a paused job cannot be deleted over HTTP: this is an operator's hand
            session.connection().exec_driver_sql(f"DELETE FROM jobs WHERE id = '{job['id']}'")
        list(told)


@pytest.mark.parametrize("every_s", [0, 10])
def test_a_stream_ends_when_its_key_is_revoked(api, client, submit, monkeypatch, every_s):
    monkeypatch.setattr("service.edge.tails.POLL_S", 0.1)
    job = submit()
    second = client.post("/v1/keys", json={"name": "second"}).json()
    following = api.anonymous(Authorization=f"Bearer {second['key']}")
    with following as follower, stream(follower, job["id"], {"every_s": every_s}) as response:
        told = parse(response.iter_lines())
        next(told)
        revoked_at = time.monotonic()
        client.delete(f"/v1/keys/{second['id']}")
        list(told)
    assert time.monotonic() - revoked_at < 8


def test_followers_share_one_look_at_the_log(api, client, submit, monkeypatch):
    monkeypatch.setattr("service.edge.tails.POLL_S", 60.0)
    looks = []
    monkeypatch.setattr("service.api.events._look", lambda *arguments: looks.append(arguments) or look(*arguments))
    job = submit()
    with ThreadPoolExecutor(20) as pool, ExitStack() as streams:
        responses = [streams.enter_context(stream(client, job["id"])) for _ in range(20)]
        told = [parse(response.iter_lines()) for response in responses]
        assert [next(one)[0] for one in told] == [1] * 20  # all of them follow
        finish(api, job["id"], steps=10)
        rest = list(pool.map(list, told))
    last = client.get(f"/v1/jobs/{job['id']}").json()["last_event"]
    assert all([seq for seq, _, _ in one] == list(range(2, last + 1)) for one in rest)
    assert 2 <= len(looks) <= 15


def test_a_follower_far_behind_gets_what_is_not_kept_for_all(api, client, submit, monkeypatch):
    monkeypatch.setattr("service.edge.tails.KEPT", 3)
    job = submit()
    with stream(client, job["id"]) as ahead:
        first = parse(ahead.iter_lines())
        assert [next(first)[0], next(first)[0]] == [1, 2]
        lease, _ = api.claim(job["id"])
        for step in range(1, 11):
            leases.commit_step(api.store, lease, step, {}, [])
        api.doorbell.signal(job["id"], "events")
        assert next(first)[0] == 3
        with stream(client, job["id"]) as behind:
            second = parse(behind.iter_lines())
            leases.succeed(api.store, lease, {}, "max_steps")
            api.doorbell.signal(job["id"], "events")
            assert [seq for seq, _, _ in second] == list(range(1, 15))
        assert [seq for seq, _, _ in first] == list(range(4, 15))


@pytest.mark.parametrize("last_event_id", ["x", "-1", "99999999999999999999", "1.5"])
def test_a_strange_last_event_id_is_refused(client, submit, last_event_id):
    job = submit()
    refused = client.get(
        f"/v1/jobs/{job['id']}/events", headers={"Accept": "text/event-stream", "Last-Event-ID": last_event_id}
    )
    assert refused.status_code == 400
    assert refused.json()["code"] == "invalid_last_event_id"


def test_an_absent_job_is_a_404_and_no_stream(client):
    with stream(client, "job_absent") as response:
        assert response.status_code == 404
        response.read()
        assert response.json()["code"] == "not_found"


def test_a_follower_that_goes_away_is_forgotten(api, client, submit):
    job = submit()
    with stream(client, job["id"]) as response:
        lines = response.iter_lines()  # kept: without its reader httpx closes the connection
        next(lines)
        watched = api.app.state.context.signals
        assert job["id"] in watched._watches
    deadline = monotonic() + 10
    while job["id"] in watched._watches:
        assert monotonic() < deadline, "the server still follows for nobody"
        sleep(0.05)


def test_open_streams_hold_no_thread(api, client, submit):
    """More streams than the pool has threads (40) or the engine connections (15), and others are served."""
    job = submit()
    port = int(api.url.rpartition(":")[2])
    key = client.headers["Authorization"]
    followers = []
    try:
        for _ in range(50):
            follower = socket.create_connection(("127.0.0.1", port), timeout=10)
            follower.sendall(
                f"GET /v1/jobs/{job['id']}/events HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\n"
                "Accept: text/event-stream\r\n\r\n".encode()
            )
            followers.append(follower)
        for follower in followers:
            assert b"200 OK" in follower.recv(100)
        assert client.get("/v1/jobs").status_code == 200
    finally:
        for follower in followers:
            follower.close()
