"""How the client asks for a loss, waits and asks again, against a scripted server."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from ratchet_client import Ratchet, RatchetApiError, RatchetLossPending

LOSSES = {"object": "list", "data": [{"index": 0, "status": "ok", "loss": 0.5, "metrics": {}}]}
QUEUED = {"object": "loss_request", "id": "loss_1", "status": "queued", "url": "/v1/losses/loss_1"}
ITEM = {"objective": {"preset": "gspo"}, "batch": {"log_probs": [[-2.0, -1.8], [-1.9]], "advantages": [1.0, -1.0]}}


@pytest.fixture
def scripted(script: Any) -> Iterator[Ratchet]:
    with Ratchet(script.url, "tml-test") as ratchet:
        yield ratchet


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> list[float]:
    """What the client would have slept; it does not."""
    monkeypatch.setattr("ratchet_client.losses.sleep", pauses.append)
    return pauses


def test_the_request_stands_on_the_wire_as_it_was_given(script: Any, scripted: Ratchet) -> None:
    script.reply(LOSSES)
    item = {"objective": "gspo", "batch": {"log_probs": [[-1.0, float("nan")]], "response_mask": [[1, 0]]}}
    assert scripted.losses([item], dtype="float32", all_or_nothing=True, on_nonfinite="mask") == LOSSES
    scripted.losses([item])
    first, second = script.requests
    assert (first.method, first.path, first.headers["accept"]) == ("POST", "/v1/losses", "application/json")
    sent = json.loads(first.body)
    assert sent.pop("items")[0]["batch"]["log_probs"][0][1] != 0 and b"NaN" in first.body
    assert sent == {"dtype": "float32", "all_or_nothing": True, "on_nonfinite": "mask"}
    assert json.loads(second.body).keys() == {"items", "all_or_nothing"}


def test_it_lets_the_service_hold_the_answer_and_goes_on_asking(script: Any, scripted: Ratchet, naps: list[float]) -> None:
    script.reply(QUEUED, status=202).reply(QUEUED, status=202).reply(LOSSES)
    assert scripted.losses([ITEM], wait_s=100) == LOSSES
    asked = [(request.method, request.path, request.headers["prefer"]) for request in script.requests]
    held = ("GET", "/v1/losses/loss_1", "wait=60")
    assert asked == [("POST", "/v1/losses", "wait=60"), held, held]
    assert len(naps) == 1, "a 202 that came at once was not held: it must not be asked for in a tight loop"


def test_an_answer_that_is_late_can_be_fetched(script: Any, scripted: Ratchet) -> None:
    script.reply(QUEUED, status=202).reply(LOSSES)
    with pytest.raises(RatchetLossPending, match=r"loss_1 is still queued") as caught:
        scripted.losses([ITEM], wait_s=0)
    assert isinstance(caught.value, TimeoutError)
    assert script.sent("prefer") == [None]
    assert scripted.loss_request(caught.value.id, wait_s=5) == LOSSES
    assert script.requests[-1].path == "/v1/losses/loss_1"


def test_a_lost_request_is_sent_anew(script: Any, scripted: Ratchet, naps: list[float]) -> None:
    script.refuse(503, "loss_worker_died").reply(QUEUED, status=202).refuse(503, "loss_lost").drop()
    script.refuse(429, "busy", Retry_After="2").reply(LOSSES)
    assert scripted.losses([ITEM], wait_s=60) == LOSSES
    assert [request.method for request in script.requests] == ["POST", "POST", "GET", "POST", "POST", "POST"]
    assert len({request.body for request in script.requests if request.method == "POST"}) == 1
    assert naps[-1] >= 2


def test_it_does_not_try_again_when_there_is_no_time_left(script: Any, scripted: Ratchet, naps: list[float]) -> None:
    script.refuse(503, "loss_queue_unavailable", Retry_After="5")
    with pytest.raises(RatchetApiError, match="loss_queue_unavailable"):
        scripted.losses([ITEM], wait_s=4)
    assert (len(script.requests), naps) == (1, [])


def test_the_message_of_a_refusal_names_each_place(script: Any, scripted: Ratchet) -> None:
    script.refuse(422, "missing_tensor")
    with pytest.raises(RatchetApiError, match=r"(?s)it is missing_tensor.*\n  /a: no"):
        scripted.losses([ITEM])


def test_the_client_needs_no_torch() -> None:
    check = "import sys; sys.modules['torch'] = None; import ratchet_client; assert 'safetensors' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)
    absent = [sys.executable, "-c", "import sys; sys.modules['torch'] = None; import ratchet_client.torch"]
    said = subprocess.run(absent, capture_output=True, text=True, timeout=60)
    assert said.returncode == 1 and "pip install torch safetensors" in said.stderr
