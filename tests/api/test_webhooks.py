"""Webhooks over HTTP: what their owner asks for, and a delivery by the running server."""

from ipaddress import ip_network

import pytest
from standardwebhooks.webhooks import Webhook

from service.store.tables import IdempotencyKey
from service.store.webhooks import EVENTS, MOST
from webhook_receiver import receiving

URL = {"url": "https://example.com/hook"}


@pytest.fixture
def receiver():
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def settings(settings):
    return settings.model_copy(update={"webhook_networks": (ip_network("127.0.0.0/8"),)})


def test_the_running_server_delivers_and_shows_it(serve, settings, spec, receiver):
    with serve(settings) as api, api.client() as client:
        made = client.post("/v1/webhooks", json={"url": receiver.url, "events": ["job.queued"]})
        assert made.status_code == 201, made.text
        hook = made.json()
        job = client.post("/v1/jobs", json=spec()).json()
        tested = client.post(f"/v1/webhooks/{hook['id']}/test")
        assert (tested.status_code, tested.json()["status"]) == (202, "waiting")
        receiver.wait_for(2)
        told = {one["type"]: one for one in receiver.verified(hook["secret"])}
        assert told["job.queued"]["data"]["job_id"] == job["id"]
        assert told["webhook.test"]["data"] == {"webhook_id": hook["id"]}
        shown = settled(client, hook)
        assert {one["id"] for one in shown} == set(receiver.ids())
        assert {(one["status"], one["response_status"], one["attempts"], one["next_try_at"]) for one in shown} == {
            ("delivered", 204, 1, None)
        }
        again = client.post(f"/v1/webhooks/{hook['id']}/deliveries/{shown[0]['id']}/redeliver")
        assert again.status_code == 202
        assert Webhook(hook["secret"]).verify(again.json()["body"], receiver.got[0][0] | signature(receiver, shown[0]["id"]))
        receiver.wait_for(3)
        assert receiver.ids()[2] == shown[0]["id"]
        assert "ratchet_webhook_deliveries_waiting" in client.get("/metrics").text


def signature(receiver, delivery_id):
    return next(headers for headers, _ in receiver.got if headers["webhook-id"] == delivery_id)


def settled(client, hook):
    """Its deliveries when none waits any more: the receiver knows of one a moment before the database does."""
    while True:
        page = client.get(f"/v1/webhooks/{hook['id']}/deliveries").json()["data"]
        if all(one["status"] != "waiting" for one in page):
            return page


def test_a_webhook_is_made_listed_changed_and_deleted(client):
    hook = client.post("/v1/webhooks", json=URL).json()
    assert hook["secret"].startswith("whsec_") and hook["events"] == list(EVENTS) and hook["enabled"]
    path = f"/v1/webhooks/{hook['id']}"
    assert "secret" not in client.get(path).json() and "secret" not in client.get("/v1/webhooks").json()["data"][0]
    changed = client.patch(path, json={"events": ["job.failed"], "description": "mine", "enabled": False}).json()
    assert (changed["events"], changed["description"], changed["enabled"]) == (["job.failed"], "mine", False)
    assert changed["url"] == URL["url"] and changed["disabled_reason"] == "its owner disabled it"
    assert client.post(f"{path}/test").json()["code"] == "webhook_disabled"
    assert client.patch(path, json={"enabled": True}).json()["disabled_reason"] is None
    rotated = client.post(f"{path}/rotate", json={"grace_s": 60}).json()
    assert rotated["secret"] != hook["secret"] and rotated["previous_secret_until"] is not None
    assert client.delete(path).status_code == 204
    assert client.get(path).status_code == client.delete(path).status_code == 404


@pytest.mark.parametrize(
    ("body", "pointer", "code"),
    [
        ({}, "/url", "missing"),
        (URL | {"events": []}, "/events", None),
        (URL | {"events": ["job.suceeded"]}, "/events/0", None),
        (URL | {"secret": "whsec_mine"}, "/secret", None),
        ({"url": "ftp://example.com"}, "/url", None),
        ({"url": "https://user:pw@example.com"}, "/url", None),
        ({"url": "http://exa mple"}, "/url", None),
        ({"url": "http://127.0.0.1/"}, "/url", "address_refused"),
        ({"url": "http://[::1]/"}, "/url", "address_refused"),
        ({"url": "http://0x7f000001/"}, "/url", "address_refused"),
        ({"url": "http://169.254.169.254/latest"}, "/url", "address_refused"),
    ],
)
def test_wrong_requests_are_refused(client, body, pointer, code):
    refused = client.post("/v1/webhooks", json=body)
    assert refused.status_code == 422, refused.text
    (error,) = refused.json()["errors"]
    assert error["pointer"] == pointer and code in (None, error["code"])
    hook = client.post("/v1/webhooks", json=URL).json()
    if body:
        assert client.patch(f"/v1/webhooks/{hook['id']}", json=body).status_code == 422


def test_a_repeated_request_makes_no_second_one_and_its_secret_is_not_kept(api, client):
    headers = {"Idempotency-Key": "one"}
    made = client.post("/v1/webhooks", json=URL, headers=headers).json()
    again = client.post("/v1/webhooks", json=URL, headers=headers)
    assert (again.status_code, again.json()["code"]) == (409, "secret_shown_once")
    assert len(client.get("/v1/webhooks").json()["data"]) == 1
    with api.store.begin(readonly=True) as session:
        answers = [row.answer for row in session.query(IdempotencyKey)]
    assert made["secret"] not in repr(answers)


def test_there_are_not_too_many(client):
    made = [client.post("/v1/webhooks", json=URL).status_code for _ in range(MOST + 1)]
    assert made == [201] * MOST + [409]


def test_deliveries_come_in_pages_and_by_status(client):
    hook = client.post("/v1/webhooks", json={"url": "https://invalid.invalid/"}).json()
    path = f"/v1/webhooks/{hook['id']}"
    ids = [client.post(f"{path}/test").json()["id"] for _ in range(3)]
    page = client.get(f"{path}/deliveries", params={"limit": 2}).json()
    assert [one["id"] for one in page["data"]] == ids[:0:-1] and page["has_more"]
    rest = client.get(f"{path}/deliveries", params={"after": page["last_id"]}).json()
    assert [one["id"] for one in rest["data"]] == ids[:1]
    assert client.get(f"{path}/deliveries", params={"status": "delivered"}).json()["data"] == []
    assert client.get(f"{path}/deliveries", params={"status": "lost"}).status_code == 422
    assert client.get(f"{path}/deliveries/{ids[0]}").json()["body"].startswith('{"type":"webhook.test"')
