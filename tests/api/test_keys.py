"""API keys."""

from hashlib import sha256

import pytest
from sqlalchemy import select

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
    ],
)
def test_wrong_requests_for_keys_are_refused(client, body, pointer):
    refused = client.post("/v1/keys", json=body)
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["pointer"] == pointer
