"""API keys."""

from datetime import datetime, timedelta
from hashlib import sha256
from time import monotonic

import pytest
from pydantic import SecretStr
from sqlalchemy import select

from service.edge import auth
from service.edge.keyring import KEPT_FOR_S, Keyring
from service.ids import utcnow
from service.store.tables import ApiKey, IdempotencyKey


def test_a_key_is_made_used_listed_and_revoked(each_api):
    api = each_api
    with api.client() as client:
        made = client.post("/v1/keys", json={"name": "laptop"})
        assert made.status_code == 201, made.text
        key = made.json()
        assert key["key"].startswith("tml-")
        assert len(key["key"]) == 47
        assert key["key"].endswith(key["ends_with"])
        with api.anonymous(**{"X-API-Key": key["key"]}) as laptop:
            assert laptop.get("/v1/jobs").status_code == 200
            listed = {one["id"]: one for one in laptop.get("/v1/keys").json()["data"]}
            assert listed[key["id"]]["name"] == "laptop"
            assert listed[key["id"]]["last_used_at"] is not None
            assert "key" not in listed[key["id"]]
            assert client.delete(f"/v1/keys/{key['id']}").status_code == 204
            assert laptop.get("/v1/jobs").status_code == 401
        assert client.delete(f"/v1/keys/{key['id']}").status_code == 404


def test_only_its_hash_is_stored(api, client):
    key = client.post("/v1/keys", json={"name": "x"}, headers={"Idempotency-Key": "one"}).json()
    with api.store.begin(readonly=True) as session:
        row = session.get(ApiKey, key["id"])
        assert row is not None
        assert row.sha256 == sha256(key["key"].encode()).hexdigest()
        answers = session.scalars(select(IdempotencyKey.answer)).all()
    assert key["key"] not in repr(vars(row)) + repr(answers)


def test_a_repeated_request_makes_no_second_key_and_shows_none(client):
    headers = {"Idempotency-Key": "one"}
    client.post("/v1/keys", json={"name": "x"}, headers=headers)
    again = client.post("/v1/keys", json={"name": "x"}, headers=headers)
    assert (again.status_code, again.json()["code"]) == (409, "key_shown_once")
    assert [one["name"] for one in client.get("/v1/keys").json()["data"]] == ["x", "test"]


def test_keys_of_default_manage_other_projects_and_no_others_do(api, client):
    mine = client.get("/v1/keys").json()["data"][0]
    with api.client("default") as admin:
        made = admin.post("/v1/keys", json={"name": "for them", "project": mine["project"]}).json()
        assert made["project"] == mine["project"]
        with api.anonymous(Authorization=f"Bearer {made['key']}") as theirs:
            assert {one["id"] for one in theirs.get("/v1/keys").json()["data"]} == {made["id"], mine["id"]}
        listed = admin.get("/v1/keys", params={"project": mine["project"]}).json()["data"]
        assert {one["id"] for one in listed} == {made["id"], mine["id"]}
        assert admin.delete(f"/v1/keys/{made['id']}").status_code == 404  # in project default there is none of this id
        assert admin.delete(f"/v1/keys/{made['id']}", params={"project": mine["project"]}).status_code == 204
    for method, body in (("GET", None), ("POST", {"name": "x", "project": "default"})):
        refused = client.request(method, "/v1/keys", json=body, params={} if body else {"project": "default"})
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")


def test_no_key_revokes_itself(client):
    own = client.get("/v1/keys").json()["data"][0]["id"]
    refused = client.delete(f"/v1/keys/{own}")
    assert (refused.status_code, refused.json()["code"]) == (409, "own_key")


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/name"),
        ({"name": ""}, "/name"),
        ({"name": "x", "projet": "y"}, "/projet"),
        ({"name": "x", "project": "a/b"}, "/project"),
        ({"name": "x", "scopes": []}, "/scopes"),
        ({"name": "x", "scopes": ["root"]}, "/scopes/0"),
        ({"name": "x", "expires_in_s": 0}, "/expires_in_s"),
        ({"name": "x", "expires_in_s": 1e300}, "/expires_in_s"),
        ({"name": "x", "rate": {"requests_per_s": 0}}, "/rate/requests_per_s"),
        ({"name": "x", "rate": {"requests_per_s": 1e-7}}, "/rate/requests_per_s"),
        ({"name": "x", "rate": {"burst": 5}}, "/rate/requests_per_s"),
    ],
)
def test_wrong_requests_for_keys_are_refused(client, body, pointer):
    refused = client.post("/v1/keys", json=body)
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["pointer"] == pointer


# ---------------------------------------------------------------- scopes


def with_key(api, client, **request):
    """A client with a new key of the same project."""
    made = client.post("/v1/keys", json={"name": "x", **request})
    assert made.status_code == 201, made.text
    return api.anonymous(Authorization=f"Bearer {made.json()['key']}")


def missing(answer):
    assert (answer.status_code, answer.json()["code"]) == (403, "scope_missing"), answer.text
    assert repr(answer.json()["missing_scope"]) in answer.json()["detail"]
    return answer.json()["missing_scope"]


def test_a_reading_key_reads_and_changes_nothing(api, client, submit, spec):
    job = submit()
    with with_key(api, client, scopes=["read"]) as reader:
        assert reader.get(f"/v1/jobs/{job['id']}").status_code == 200
        assert reader.get("/v1/datasets").status_code == 200
        assert missing(reader.post("/v1/jobs", json=spec())) == "write"
        assert missing(reader.post("/v1/jobs:validate", json=spec())) == "write"  # it makes requests of the caller's choice
        assert missing(reader.post(f"/v1/jobs/{job['id']}/cancel")) == "write"
        assert missing(reader.delete(f"/v1/jobs/{job['id']}")) == "write"
        rows = {"content": b'{"q": 1}\n', "headers": {"Content-Type": "application/jsonl"}}
        assert missing(reader.post("/v1/datasets", **rows)) == "write"
        assert missing(reader.get("/v1/keys")) == "admin"
    assert client.get(f"/v1/jobs/{job['id']}").json()["status"] == "queued"
    assert client.get("/v1/datasets").json()["data"] == []


def test_a_writing_key_does_everything_but_keys(api, client, submit, spec):
    with with_key(api, client, scopes=["write"]) as writer:
        job = writer.post("/v1/jobs", json=spec()).json()
        assert writer.get(f"/v1/jobs/{job['id']}").status_code == 200  # to write holds to read
        assert writer.post(f"/v1/jobs/{job['id']}/cancel").status_code == 200
        own = next(one for one in client.get("/v1/keys").json()["data"] if one["scopes"] == ["read", "write"])
        assert missing(writer.get("/v1/keys")) == "admin"
        assert missing(writer.post("/v1/keys", json={"name": "x"})) == "admin"
        assert missing(writer.post("/v1/keys", json={"name": "x", "scopes": ["read"]})) == "admin"
        assert missing(writer.delete(f"/v1/keys/{own['id']}")) == "admin"


def test_who_may_not_is_told_before_the_body_is_looked_at(api, client):
    with with_key(api, client, scopes=["read"]) as reader:
        assert missing(reader.post("/v1/jobs", content=b"{")) == "write"
        assert missing(reader.post("/v1/keys", content=b"{")) == "admin"


def test_a_key_is_made_with_all_scopes_unless_it_is_said(client):
    assert client.post("/v1/keys", json={"name": "x"}).json()["scopes"] == ["read", "write", "admin"]


# ---------------------------------------------------------------- keys that are remembered


@pytest.fixture
def looks(monkeypatch):
    """How often a key was looked up in a store."""
    count = []
    look = auth._look
    monkeypatch.setattr(auth, "_look", lambda *asked: count.append(1) or look(*asked))
    return count


@pytest.fixture
def now(monkeypatch):
    """The clock by which keys are remembered; it stands still."""
    now = [100.0]
    monkeypatch.setattr(Keyring, "now", staticmethod(lambda: now[0]))
    return now


def test_a_key_in_use_is_looked_up_once_in_a_while(api, client, looks, now):
    with with_key(api, client) as laptop:
        looks.clear()
        for _ in range(5):
            assert laptop.get("/v1/keys").status_code == 200
        assert len(looks) == 1
        now[0] += KEPT_FOR_S + 0.1
        assert laptop.get("/v1/keys").status_code == 200
        assert len(looks) == 2


def test_a_revoked_key_stops_at_once_where_another_process_remembers_it(serve, settings, now):
    with serve(settings) as one, serve(settings) as two, one.client() as client:
        key = client.post("/v1/keys", json={"name": "x"}).json()
        with two.anonymous(**{"X-API-Key": key["key"]}) as laptop:
            assert laptop.get("/v1/jobs").status_code == 200
            assert client.delete(f"/v1/keys/{key['id']}").status_code == 204
            assert laptop.get("/v1/jobs").status_code == 401


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_revocation_that_redis_does_not_take_waits_until_nobody_remembers_the_key(serve, settings, own_redis):
    """A Redis that is out of memory can be read, but not be told."""
    settings = settings.model_copy(update={"redis_url": SecretStr(own_redis.url), "key_requests_per_s": None})
    with serve(settings) as one, serve(settings) as two, one.client() as client:
        key = client.post("/v1/keys", json={"name": "x"}).json()
        with two.anonymous(**{"X-API-Key": key["key"]}) as laptop:
            assert laptop.get("/v1/jobs").status_code == 200
            own_redis.client().config_set("maxmemory", 1)
            assert client.delete(f"/v1/keys/{key['id']}").status_code == 204
            assert laptop.get("/v1/jobs").status_code == 401


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_what_redis_does_not_confirm_is_looked_up(serve, settings, own_redis, looks, now):
    with serve(settings.model_copy(update={"redis_url": SecretStr(own_redis.url)})) as api, api.client() as client:
        assert [client.get("/v1/jobs").status_code for _ in range(3)] == [200] * 3
        assert len(looks) == 1
        own_redis.client().flushall()
        assert [client.get("/v1/jobs").status_code for _ in range(3)] == [200] * 3
        assert len(looks) == 2
        own_redis.kill()
        assert [client.get("/v1/jobs").status_code for _ in range(3)] == [200] * 3
        assert len(looks) == 5


# ---------------------------------------------------------------- expiry


def test_a_key_that_expired_is_none(each_api, monkeypatch):
    with each_api.client() as client:
        made = client.post("/v1/keys", json={"name": "x", "expires_in_s": 60}).json()
        left = datetime.fromisoformat(made["expires_at"]) - utcnow()
        assert timedelta(seconds=50) < left <= timedelta(seconds=60)
        with each_api.anonymous(**{"X-API-Key": made["key"]}) as short:
            assert short.get("/v1/jobs").status_code == 200
            monkeypatch.setattr(auth, "utcnow", lambda: utcnow() + timedelta(seconds=60))
            for _ in ("remembered", "looked up"):
                refused = short.get("/v1/jobs")
                assert (refused.status_code, refused.json()["code"]) == (401, "expired_api_key")
                assert refused.headers["WWW-Authenticate"].startswith("Bearer")
                each_api.doorbell.keys_changed()


def test_a_stream_ends_with_its_key(api, client, submit):
    made = client.post("/v1/keys", json={"name": "x", "expires_in_s": 1}).json()
    job = submit()
    with api.anonymous(**{"X-API-Key": made["key"], "Accept": "text/event-stream"}) as short:
        began = monotonic()
        with short.stream("GET", f"/v1/jobs/{job['id']}/events") as stream:
            assert b"queued" in stream.read()  # a job that waits has no end: without expiry this read would not return
        assert monotonic() - began < 10


def test_a_key_that_ends_makes_none_that_lasts_longer(api, client):
    with with_key(api, client, expires_in_s=100) as short:
        for lasting in ({}, {"expires_in_s": 1000}):
            refused = short.post("/v1/keys", json={"name": "y", **lasting})
            assert refused.status_code == 422
            assert refused.json()["errors"][0]["pointer"] == "/expires_in_s"
        assert short.post("/v1/keys", json={"name": "y", "expires_in_s": 50}).status_code == 201


def test_a_key_keeps_what_was_asked_for_it(client):
    asked = {"name": "x", "scopes": ["write"], "rate": {"requests_per_s": 2.5}}
    made = client.post("/v1/keys", json=asked).json()
    assert made["scopes"] == ["read", "write"]
    assert made["rate"] == {"requests_per_s": 2.5, "burst": 5}
    assert made["expires_at"] is None
    assert client.get("/v1/keys").json()["data"][0] == {name: value for name, value in made.items() if name != "key"}


# ---------------------------------------------------------------- rotation


def test_a_rotated_key_works_on_for_its_grace_and_its_successor_is_like_it(each_api, monkeypatch):
    with each_api.client() as client:
        old = client.post("/v1/keys", json={"name": "x", "scopes": ["write"], "rate": {"requests_per_s": 50}}).json()
        answer = client.post(f"/v1/keys/{old['id']}/rotate", json={"grace_s": 60})
        assert answer.status_code == 201, answer.text
        new = answer.json()
        alike = ("name", "project", "scopes", "rate")
        assert [new[name] for name in alike] == [old[name] for name in alike]
        assert new["key"] != old["key"] and new["expires_at"] is None
        left = datetime.fromisoformat(
            {one["id"]: one for one in client.get("/v1/keys").json()["data"]}[old["id"]]["expires_at"]
        )
        assert timedelta(seconds=50) < left - utcnow() <= timedelta(seconds=60)
        for text in (old["key"], new["key"]):
            with each_api.anonymous(Authorization=f"Bearer {text}") as both:
                assert both.get("/v1/jobs").status_code == 200
        monkeypatch.setattr(auth, "utcnow", lambda: utcnow() + timedelta(seconds=61))
        with each_api.anonymous(Authorization=f"Bearer {old['key']}") as late:
            assert late.get("/v1/jobs").json()["code"] == "expired_api_key"
        with each_api.anonymous(Authorization=f"Bearer {new['key']}") as late:
            assert late.get("/v1/jobs").status_code == 200


def test_without_grace_a_rotated_key_ends_at_once_where_it_is_remembered(api, client):
    old = client.post("/v1/keys", json={"name": "x"}).json()
    with api.anonymous(**{"X-API-Key": old["key"]}) as laptop:
        assert laptop.get("/v1/jobs").status_code == 200
        assert client.post(f"/v1/keys/{old['id']}/rotate", json={"grace_s": 0}).status_code == 201
        assert laptop.get("/v1/jobs").status_code == 401


def test_a_key_that_ends_does_not_live_on_by_rotating(api, client):
    short = client.post("/v1/keys", json={"name": "x", "expires_in_s": 100}).json()
    with api.anonymous(**{"X-API-Key": short["key"]}) as holder:
        itself = holder.post(f"/v1/keys/{short['id']}/rotate").json()
        assert itself["expires_at"] <= short["expires_at"]
    renewed = client.post(f"/v1/keys/{short['id']}/rotate").json()  # by one that does not end
    assert renewed["expires_at"] > short["expires_at"]
    assert client.post("/v1/keys/key_x/rotate").status_code == 404
    assert client.post(f"/v1/keys/{short['id']}/rotate", json={"grace_s": -1}).status_code == 422
