"""Who does not wait gets a ticket, and polls."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from chaos.standin import worker
from losses_over_http import ANSWER_BYTES, PREFIX, TENSORS, post, refused
from service.relay.tensors import decode


def test_who_does_not_wait_gets_a_ticket(client, store):
    answer = post(client, wait=None)
    assert answer.status_code == 202
    ticket = answer.json()
    assert (ticket["object"], ticket["status"], ticket["url"]) == ("loss_request", "queued", f"/v1/losses/{ticket['id']}")
    assert answer.headers["location"] == ticket["url"]
    assert answer.headers["retry-after"] == "1"
    again = client.get(ticket["url"])
    assert (again.status_code, again.json()) == (202, ticket)


def test_an_answer_can_be_fetched_as_often_and_in_whatever_format(client, api, store):
    url = post(client, wait=None).headers["location"]
    with worker(api.settings):
        first = client.get(url, headers={"Prefer": "wait=10"})
    assert first.status_code == 200
    assert first.headers["preference-applied"] == "wait"
    assert client.get(url).json() == first.json()
    tensors = client.get(url, headers={"Accept": TENSORS})
    assert "0/gradients/log_probs" in decode(tensors.content)[0]


def test_however_many_wait_for_a_worker_their_key_is_served(serve, settings):
    """A loss request that waits takes no share of its key."""
    mine = settings.model_copy(update={"key_requests_at_once": 1})
    with serve(mine) as api, api.client() as client, ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(post, client, wait=20) for _ in range(3)]
        while len(api.app.state.context.signals._watches) < 3:
            time.sleep(0.01)
        assert client.get("/v1/jobs").status_code == 200
        with worker(mine):
            assert [one.result().status_code for one in waiting] == [200] * 3


def test_waiting_ends_when_its_time_is_over(client, store):
    started = time.monotonic()
    answer = post(client, wait=1)
    assert answer.status_code == 202
    assert 0.9 < time.monotonic() - started < 5
    assert "preference-applied" not in answer.headers


@pytest.mark.parametrize("prefer", ["wait=soon", "wait=-1", "wait", "respond-async", "wait=0", ""])
def test_a_preference_that_cannot_be_read_is_none(client, store, prefer):
    assert post(client, wait=None, Prefer=prefer).status_code == 202


@pytest.mark.parametrize("prefer", ["wait=10", "respond-async, wait=10", 'wait="10"', "Wait = 10; foo=1", "wait=999999999"])
def test_preferences_are_written_in_many_ways(client, standin, prefer):
    assert post(client, wait=None, Prefer=prefer).status_code == 200


@pytest.mark.parametrize("name", ["loss_01m82ccm4k6eaxszxhfa2gb4df", "nonsense", "loss_" + "x" * 5000, "%F0%9F%98%80", "a:b"])
def test_what_was_never_asked_is_not_found(client, name):
    assert refused(client.get(f"/v1/losses/{name}"), 404)["code"] == "not_found"


def test_another_project_s_request_is_not_found(client, other, api, store):
    url = post(client, wait=None).headers["location"]
    refused(other.get(url), 404)
    with worker(api.settings):
        assert client.get(url, headers={"Prefer": "wait=10"}).status_code == 200
    refused(other.get(url), 404)


def test_nobody_without_a_key_asks_or_fetches(api, client, store):
    url = post(client, wait=None).headers["location"]
    with api.anonymous() as stranger:
        refused(stranger.get(url), 401)
        refused(post(stranger), 401)


def test_an_answer_that_was_waited_for_leaves_nothing_behind(client, standin, store):
    assert post(client).status_code == 200
    left = {key.decode().removeprefix(PREFIX) for key in store.keys(f"{PREFIX}*")}
    assert left <= {"listening", "seen", "rung", "answer_bytes"}, left
    assert int(store.get(ANSWER_BYTES) or 0) == 0
