"""Requests that wait, and get their answers in the format that they ask for."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import orjson
import pytest

from losses_over_http import ITEM, JSON, PREFIX, TENSORS, in_tensors, post, refused
from service.api.examples import LOSS_REQUEST
from service.relay.tensors import decode


def test_a_request_that_waits_gets_its_answer(client, standin):
    answer = post(client)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == JSON
    assert answer.headers["preference-applied"] == "wait"
    (item,) = answer.json()["data"]
    assert item == {
        "index": 0,
        "status": "ok",
        "loss": 0.5,
        "metrics": {"policy/loss": 0.5},
        "gradients": {"log_probs": ITEM["batch"]["log_probs"]},
    }


def test_a_worker_gets_the_request_as_it_was_meant(client, standin):
    before = time.time()
    post(client)
    (order,) = standin
    (entry,) = order.items
    assert (entry["dtype"], entry["layout"], entry["return"]) == ("float64", "ragged", ITEM["return"])
    assert entry["objective"]["surrogate"]["clip_high"] == 4e-4
    assert before + 50 < order.deadline < time.time() + 60
    assert order.tensors["0/advantages"].data.cast("d").tolist() == [1.0, -1.0]


def test_tensors_are_answered_with_tensors_as_they_came(client, standin):
    answer = post(client, in_tensors(), **{"Content-Type": TENSORS})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == TENSORS
    tensors, metadata = decode(answer.content)
    assert json.loads(metadata["response"])["data"][0]["status"] == "ok"
    assert tensors["0/gradients/log_probs"].data.cast("f").tolist() == [-1.0, -2.0, -3.0]
    assert tensors["0/cu_seqlens"].data.cast("q").tolist() == [0, 1, 3]


@pytest.mark.parametrize("sent", [JSON, TENSORS])
@pytest.mark.parametrize(
    ("accept", "comes"),
    [
        (JSON, JSON),
        (TENSORS, TENSORS),
        ("*/*", None),
        ("application/*", None),
        (f"{JSON};q=0.1, {TENSORS}", TENSORS),
        (f"text/html, {JSON};q=0.9, */*;q=0.1", JSON),
        (f"{JSON};q=0, */*", TENSORS),
        (TENSORS.upper(), TENSORS),
    ],
)
def test_accept_says_in_which_format_the_answer_comes(client, standin, sent, accept, comes):
    body = orjson.dumps(LOSS_REQUEST) if sent == JSON else in_tensors()
    answer = post(client, body, **{"Content-Type": sent, "Accept": accept})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == (comes or sent)


@pytest.mark.parametrize("accept", ["text/html", "application/octet-stream", f"{JSON};q=0", "nonsense", f"{JSON};q=x"])
def test_a_format_that_cannot_be_made_is_refused_before_anything_is_sent(client, store, accept):
    assert refused(post(client, Accept=accept), 406)["code"] == "not_acceptable"
    assert not store.keys(f"{PREFIX}*")


def test_small_and_large_batches_come_back_whole(client, standin):
    rows = [[-0.1 * (row + place) for place in range(300)] for row in range(15)]  # enough for a thread's work
    batch = {"log_probs": rows, "old_log_probs": rows, "advantages": [1.0] * 15}
    answer = post(client, {"items": [{"objective": "gspo", "batch": batch}]})
    assert answer.json()["data"][0]["gradients"]["log_probs"] == rows


def test_a_hundred_requests_at_once_each_get_their_own_answer(client, standin):
    def one(number: int) -> bool:
        rows = [[-float(number + 1), -0.5]]
        batch = {"log_probs": rows, "old_log_probs": rows, "advantages": [1.0]}
        answer = post(client, {"items": [{"objective": "gspo", "batch": batch}]}, wait=30)
        return answer.json()["data"][0]["gradients"]["log_probs"] == rows

    assert one(0)
    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(one, range(1, 100)))
