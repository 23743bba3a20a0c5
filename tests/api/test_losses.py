"""Loss requests over HTTP, as far as the API decides: a stand-in on the real Redis takes the orders and answers them."""

import asyncio
import json
import os
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import orjson
import pytest
import redis
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from pydantic import SecretStr
from redis.client import Pipeline

from chaos.standin import WORKER, echo, worker
from service.api.examples import LOSS_REQUEST
from service.edge.arrays import parse_arrays
from service.relay import queue as queue_of_losses
from service.relay.line import losses
from service.relay.orders import Order, Parcel, answered, unavailable
from service.relay.queue import ALIVE_FOR_S, RequestQueue, WorkerQueue
from service.relay.tensors import Tensor, decode, encode
from service.settings import Settings

JSON, TENSORS, PROBLEM = "application/json", "application/vnd.safetensors", "application/problem+json"
PREFIX = "ratchet:losses:"
WAITING, BYTES, ANSWER_BYTES, LISTENING, RUNG, WORKERS = (
    PREFIX + name for name in ("waiting", "bytes", "answer_bytes", "listening", "rung", "workers")
)
EXAMPLES = os.environ.get("RATCHET_TEST_FUZZ_EXAMPLES")  # for long runs, each with other examples
ITEM = LOSS_REQUEST["items"][0]


@pytest.fixture
def database_url(sqlite_template: Path, tmp_path: Path) -> str:
    """Nothing in here is stored: one kind of database is enough."""
    shutil.copyfile(sqlite_template, tmp_path / "ratchet.db")
    return f"sqlite:///{tmp_path / 'ratchet.db'}"


@pytest.fixture
def standin(api) -> Iterator[list[Order]]:
    with worker(api.settings) as seen:
        yield seen


@pytest.fixture
def store(api) -> Iterator[Any]:
    """The queue's Redis, empty before and after."""
    client = redis.Redis.from_url(api.settings.redis_url.get_secret_value(), socket_timeout=3)

    def empty() -> None:
        for key in client.scan_iter(f"{PREFIX}*"):
            client.delete(key)

    empty()
    yield client
    empty()
    client.close()


def post(client: httpx.Client, body: Any = LOSS_REQUEST, *, wait: Any = 10, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    prefer = {} if wait is None else {"Prefer": f"wait={wait}"}
    return client.post("/v1/losses", content=content, headers={"Content-Type": JSON} | prefer | headers)


def floats(*values: float) -> Tensor:
    return Tensor("F32", (len(values),), memoryview(struct.pack(f"<{len(values)}f", *values)))


def in_tensors(request: Any = None, **tensors: Tensor) -> bytes:
    """Two sequences of one and two tokens."""
    sound = {
        "log_probs": floats(-1.0, -2.0, -3.0),
        "old_log_probs": floats(-1.0, -2.0, -3.0),
        "advantages": floats(1.0, -1.0),
        "cu_seqlens": Tensor("I64", (3,), memoryview(struct.pack("<3q", 0, 1, 3))),
    }
    request = {"items": [{"objective": "gspo", "return": ["gradients"]}]} if request is None else request
    return encode({f"0/{name}": one for name, one in {**sound, **tensors}.items()}, {"request": json.dumps(request)})


def refused(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == PROBLEM
    return answer.json()


# ---------------------------------------------------------------- answers


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


# ---------------------------------------------------------------- not waiting, polling


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


# ---------------------------------------------------------------- what bad input gets


def test_one_bad_item_beside_a_good_one(client, standin):
    bad = {**ITEM, "batch": {**ITEM["batch"], "advantages": [1.0, "x"]}}
    answer = post(client, {"items": [ITEM, bad, ITEM]})
    assert answer.status_code == 200
    first, second, third = answer.json()["data"]
    assert (first["status"], third["status"]) == ("ok", "ok")
    assert second == {
        "index": 1,
        "status": "error",
        "error": {
            "code": "invalid",
            "pointer": "/items/1/batch/advantages/1",
            "detail": "must be a number, got 'x'",
            "got": "x",
            "allowed": "a number",
        },
    }


def test_all_or_nothing_refuses_the_good_one_too_and_asks_nobody(client, store):
    bad = {**ITEM, "objective": "gpso"}
    problem = refused(post(client, {"items": [ITEM, bad], "all_or_nothing": True}), 422)
    assert problem["code"] == "invalid"
    assert [one["pointer"] for one in problem["errors"]] == ["/items/1/objective/preset"]
    assert problem["error"]["param"] == "/items/1/objective/preset"
    assert [one["error"]["code"] for one in problem["data"]] == ["all_or_nothing", "invalid"]
    assert "did you mean 'gspo'?" in problem["detail"]
    assert not store.keys(f"{PREFIX}*")


def test_a_request_without_a_good_item_is_a_problem(client, store):
    batch = {"log_probs": [[-1.0]], "advantages": [1.0]}
    problem = refused(post(client, {"items": [{"objective": "gspo", "batch": batch}] * 2}), 422)
    assert problem["code"] == "missing_tensor"
    assert [one["pointer"] for one in problem["errors"]] == [f"/items/{i}/batch/old_log_probs" for i in range(2)]
    assert [one["index"] for one in problem["data"]] == [0, 1]


@pytest.mark.parametrize("all_or_nothing", [False, True])
def test_what_the_worker_finds_wrong_is_a_problem_like_any_other(api, client, all_or_nothing):
    wrong = {"code": "mask_not_binary", "pointer": "/items/1/batch/response_mask/0/1", "detail": "must be 0 or 1", "got": 2}

    def reply(order: Order) -> bytes:
        assert order.all_or_nothing is all_or_nothing
        first = {"index": 0, "status": "ok", "loss": 1.0, "metrics": {}} if all_or_nothing else {**second, "index": 0}
        return answered("invalid", [first, second], {})

    second = {"index": 1, "status": "error", "error": wrong, "errors": [wrong, {**wrong, "code": "nonfinite"}]}
    with worker(api.settings, reply):
        problem = refused(post(client, {"items": [ITEM, ITEM], "all_or_nothing": all_or_nothing}), 422)
        url = post(client, {"items": [ITEM, ITEM], "all_or_nothing": all_or_nothing}, wait=None).headers["location"]
        polled = refused(client.get(url, headers={"Prefer": "wait=10"}), 422)
    assert problem["code"] == "mask_not_binary"
    assert {one["code"] for one in problem["errors"]} == {"mask_not_binary", "nonfinite"}
    assert [one["status"] for one in problem["data"]] == ["error", "error"]  # no result is given beside an error
    assert problem["data"][0]["error"]["code"] == ("all_or_nothing" if all_or_nothing else "mask_not_binary")
    assert problem["data"][1]["error"] == wrong
    assert polled["data"] == problem["data"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "empty_body"),
        (b'{"items": [', 400, "malformed_body"),
        (b"[" * 100_000, 400, "too_deep"),
        (b'{"items": [], "items": []}', 400, "duplicate_key"),
        (b'{"\\ud800": 1}', 400, "not_storable"),
        (b"\xff\xfe", 400, "malformed_body"),
        (b"7", 422, "invalid_request"),
        (b'{"items": []}', 422, "invalid_request"),
        (b'{"items": [7]}', 422, "invalid"),
        (b'{"items": [{"objective": "gspo", "batch": {"log_probs": [["\xc3\xa4"]]}}]}', 422, "invalid"),
    ],
)
def test_bodies_of_json_that_are_none(client, store, body, status, code):
    assert refused(post(client, body), status)["code"] == code


def test_a_header_that_lies_is_a_problem_with_a_pointer(client, store):
    lying = in_tensors().replace(b'"shape":[2]', b'"shape":[9]')
    problem = refused(post(client, lying, **{"Content-Type": TENSORS}), 400)
    assert problem["code"] == "malformed_safetensors"
    assert [one["pointer"] for one in problem["errors"]] == ["/items/0/batch/advantages"]
    assert "has 8 bytes of data, but F32 of shape [9] takes 36" in problem["detail"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "malformed_safetensors"),
        (in_tensors()[:-1], 400, "malformed_safetensors"),
        (in_tensors() + b"x", 400, "malformed_safetensors"),
        (b"\xff" * 8 + b"{}", 400, "malformed_safetensors"),
        (encode({}, {}), 422, "invalid_request"),
        (encode({}, {"request": ""}), 400, "empty_body"),
        (encode({}, {"request": "{"}), 400, "malformed_body"),
        (encode({}, {"request": '{"items": [], "items": []}'}), 400, "duplicate_key"),
        (encode({}, {"request": '{"items": [{"objective": "gspo"}]}'}), 422, "missing"),
        (in_tensors(logprobs=floats(1.0)), 422, "unknown_key"),
        (in_tensors(log_probs=Tensor("F16", (3,), memoryview(bytes(6)))), 422, "dtype_not_taken"),
        (in_tensors({"items": [{"objective": "gspo"}], "dtype": "float8"}), 422, "invalid_request"),
        (encode({"1/log_probs": floats(1.0)}, {"request": '{"items": [{"objective": "gspo"}]}'}), 422, "invalid_request"),
    ],
)
def test_bodies_of_tensors_that_cannot_be_taken(client, store, body, status, code):
    assert refused(post(client, body, **{"Content-Type": TENSORS}), status)["code"] == code


def test_other_formats_are_refused(client):
    problem = refused(post(client, b"items: []", **{"Content-Type": "application/yaml"}), 415)
    assert f"taken are {JSON} and {TENSORS}" in problem["detail"]


@pytest.mark.parametrize("kind", [JSON, TENSORS])
@pytest.mark.parametrize("encoding", ["gzip", "zstd", "br", "gzip, identity"])
def test_compressed_bodies_are_refused(client, kind, encoding):
    answer = post(client, b"\x1f\x8b", **{"Content-Type": kind, "Content-Encoding": encoding})
    assert refused(answer, 415)["code"] == "unsupported_encoding"


def test_bodies_have_a_limit_of_their_own(serve, settings):
    mine = settings.model_copy(update={"max_loss_body_bytes": 10_000, "max_body_bytes": 1024})
    with serve(mine) as api, api.client() as client, worker(mine):
        fits = orjson.dumps(LOSS_REQUEST) + b" " * (10_000 - len(orjson.dumps(LOSS_REQUEST)))
        assert post(client, fits).status_code == 200
        assert refused(post(client, fits + b" "), 413)["limit_bytes"] == 10_000

        def endless() -> Iterator[bytes]:
            for _ in range(1000):
                yield b" " * 1000

        answer = client.post("/v1/losses", content=endless(), headers={"Content-Type": JSON})
        assert refused(answer, 413)["code"] == "body_too_large"


# ---------------------------------------------------------------- too much waits


def small_queue(settings: Settings, **more: Any) -> Settings:
    return settings.model_copy(update={"max_waiting_loss_bytes": 6000, **more})


def test_when_too_many_bytes_wait_the_next_request_is_asked_to_come_again(serve, settings):
    mine = small_queue(settings)
    with serve(mine) as api, api.client() as client:
        assert post(client, wait=None).status_code == 202  # an order of about 1.9 kB
        taken = 1
        while (answer := post(client, wait=None)).status_code == 202:
            taken += 1
            assert taken < 10
        problem = refused(answer, 429)
        assert (problem["code"], problem["retryable"], problem["error"]["type"]) == ("losses_busy", True, "rate_limit_error")
        assert answer.headers["retry-after"] == "1"
        with worker(mine) as seen:  # once it was taken there is room again
            while len(seen) < taken:
                time.sleep(0.01)
            assert post(client).status_code == 200


def test_answers_that_nobody_fetches_count_until_they_expire(serve, settings):
    mine = small_queue(settings, loss_result_ttl_s=1.5)
    big = Tensor("U8", (6000,), memoryview(bytes(6000)))

    def reply(order: Order) -> bytes:
        return answered("ok", [{"index": 0, "status": "ok", "loss": 0.0, "metrics": {}}], {"1/unused": big})

    with serve(mine) as api, api.client() as client, worker(mine, reply) as seen:
        url = post(client, wait=None).headers["location"]
        while not seen:
            time.sleep(0.01)
        assert client.get(url, headers={"Prefer": "wait=5"}).status_code == 200
        refused(post(client), 429)
        time.sleep(1.6)
        assert post(client).status_code == 200
        assert post(client).status_code == 200  # the one before was waited for: it does not count


def test_one_request_is_always_taken_however_large(serve, settings):
    mine = settings.model_copy(update={"max_waiting_loss_bytes": 1024})
    with serve(mine) as api, api.client() as client, worker(mine):
        assert post(client).status_code == 200
        assert post(client).status_code == 200


def test_requests_whose_time_is_over_make_room(serve, settings, redis_url):
    mine = small_queue(settings, loss_time_limit_s=0.5)
    store: Any = redis.Redis.from_url(redis_url)
    with serve(mine) as api, api.client() as client, store:
        while post(client, wait=None).status_code == 202:
            pass
        assert int(store.get(BYTES)) == sum(int(entry.split()[2]) for entry in store.lrange(WAITING, 0, -1))
        time.sleep(0.6)
        assert post(client, wait=None).status_code == 202
        assert store.llen(WAITING) == 1
        assert int(store.get(BYTES)) == int(store.lindex(WAITING, 0).split()[2])


# ---------------------------------------------------------------- what gets lost


@pytest.fixture
def short(settings, own_redis) -> Settings:
    """A Redis of its own, and little patience."""
    return settings.model_copy(update={"redis_url": SecretStr(own_redis.url), "loss_time_limit_s": 30.0})


@contextmanager
def waiting(client: httpx.Client, seconds: int = 25) -> Iterator[Callable[[], httpx.Response]]:
    """A request that waits while the block runs; call what is given for its answer."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(post, client, wait=seconds)
        time.sleep(0.5)
        assert not future.done()
        yield lambda: future.result(timeout=20)


def unavailable_now(answer: httpx.Response) -> str:
    problem = refused(answer, 503)
    assert problem["retryable"] is True
    assert answer.headers["retry-after"] == "5"
    return problem["code"]


def test_redis_dies_while_a_request_waits(serve, short, own_redis):
    with serve(short) as api, api.client() as client:
        with waiting(client) as answer:
            own_redis.kill()
            assert unavailable_now(answer()) == "loss_queue_unavailable"
        assert unavailable_now(post(client)) == "loss_queue_unavailable"
        assert unavailable_now(client.get("/v1/losses/loss_01m82ccm4k6eaxszxhfa2gb4df")) == "loss_queue_unavailable"
        own_redis.start()
        with worker(short):
            assert post(client).status_code == 200


def test_redis_freezes_while_a_request_waits(serve, short, own_redis):
    with serve(short) as api, api.client() as client:
        with waiting(client) as answer:
            own_redis.freeze()
            try:
                assert unavailable_now(answer()) == "loss_queue_unavailable"
            finally:
                own_redis.thaw()
        with worker(short):
            assert post(client).status_code == 200


def test_redis_is_emptied_while_a_request_waits(serve, short, own_redis):
    with serve(short) as api, api.client() as client:
        with waiting(client) as answer:
            own_redis.flush()
            assert unavailable_now(answer()) == "loss_lost"
        url = post(client, wait=None).headers["location"]
        own_redis.flush()
        refused(client.get(url), 404)


def test_an_answer_is_found_though_its_signal_was_lost(serve, short, own_redis, monkeypatch):
    monkeypatch.setattr(Pipeline, "publish", lambda *args, **kwargs: None)
    with serve(short) as api, api.client() as client, worker(short):
        started = time.monotonic()
        assert post(client).status_code == 200
        assert time.monotonic() - started < 10


def test_a_ring_that_was_lost_is_repeated(serve, short, own_redis, monkeypatch):
    rings = []
    with serve(short) as api, api.client() as client:
        monkeypatch.setattr(api.app.state.context.doorbell, "ring_losses", lambda: rings.append(time.monotonic()))
        assert post(client, wait=5).status_code == 202
        assert 2 <= len(rings) <= 4
        rings.clear()
        with worker(short):
            post(client)
            rings.clear()
            for _ in range(5):
                assert post(client).status_code == 200
        assert not rings  # the worker is in its loop


def test_a_worker_that_leaves_is_rung_for(api, store):
    queue = WorkerQueue(api.settings, losses(api.settings))
    assert queue.take(WORKER, 0.05, 64) == []
    assert store.exists(LISTENING)
    queue.leave()
    assert not store.exists(LISTENING, RUNG)
    queue.close()


def test_a_worker_that_died_is_told_of(api, client, store):
    queue = WorkerQueue(api.settings, losses(api.settings))
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(post, client)
        taken = queue.take(WORKER, 5, 64)
        assert len(taken) == 1
        assert queue.give_up(WORKER) == 1
        assert unavailable_now(future.result(timeout=10)) == "loss_worker_died"
    assert queue.give_up(WORKER) == 0
    queue.close()


def test_what_a_dead_worker_had_in_hand_is_put_back_in_line(api, client, store):
    """It died with its parent, which would have said so."""
    queue, dead, living = WorkerQueue(api.settings, losses(api.settings)), "wrk_dead", WORKER
    urls = [post(client, wait=None).headers["location"] for _ in range(3)]
    assert queue.alive(dead) == 0
    first = queue.take(dead, 5, 2)
    assert len(first) == 2 and store.llen(WAITING) == 1
    assert queue.alive(living) == 0, "it may be at work on them"
    said = store.zscore(WORKERS, dead)
    store.zadd(WORKERS, {dead: said - ALIVE_FOR_S - 1})
    held = int(store.get(BYTES))
    assert queue.alive(living) == 2 and int(store.get(BYTES)) == held + sum(one.parcel.size for one in first)
    assert queue.alive(living) == 0 and store.zrange(WORKERS, 0, -1) == [living.encode()]
    again = queue.take(living, 5, 64)
    assert [one.id for one in again] == [url.rpartition("/")[2] for url in urls], "in the order in which they came"
    queue.answer(living, [(one, echo(Order.decode(one.parcel))) for one in again])
    assert all(client.get(url).status_code == 200 for url in urls)
    assert not store.exists(BYTES, WAITING)
    queue.close()


def test_what_an_ending_worker_left_in_hand_goes_to_the_next_at_once(api, client, store):
    queue = WorkerQueue(api.settings, losses(api.settings))
    post(client, wait=None)
    assert queue.alive("wrk_ending") == 0 and len(queue.take("wrk_ending", 5, 64)) == 1
    queue.goodbye("wrk_ending")
    assert queue.alive(WORKER) == 1 and len(queue.take(WORKER, 5, 64)) == 1
    queue.close()


def test_what_a_worker_had_in_hand_comes_again(api, client, store):
    """Its connection broke between taking and answering."""
    queue = WorkerQueue(api.settings, losses(api.settings))
    url = post(client, wait=None).headers["location"]
    first = queue.take(WORKER, 5, 64)
    again = queue.take(WORKER, 5, 64)
    assert [one.parcel for one in again] == [one.parcel for one in first]
    queue.answer(WORKER, [(again[0], echo(Order.decode(again[0].parcel)))])
    assert queue.take(WORKER, 0, 64) == []
    assert client.get(url).status_code == 200
    queue.close()


def test_a_worker_may_say_that_it_cannot(api, client, store):
    with worker(api.settings, lambda order: unavailable("loss_internal", "it could not be computed")):
        answer = post(client)
    assert unavailable_now(answer) == "loss_internal"
    assert answer.json()["detail"] == "it could not be computed"


def test_a_request_whose_time_is_over_is_given_up(serve, settings):
    mine = settings.model_copy(update={"loss_time_limit_s": 1.0})
    with serve(mine) as api, api.client() as client:
        answer = post(client)
        assert unavailable_now(answer) == "loss_timed_out"
        assert "no loss worker was seen lately" in answer.json()["detail"]
        url = post(client, wait=None).headers["location"]
        time.sleep(1.1)
        assert unavailable_now(client.get(url)) == "loss_timed_out"
        with worker(mine) as seen:
            time.sleep(0.3)
            assert not seen  # nobody computes what nobody waits for
            assert post(client).status_code == 200
        with worker(mine, lambda order: None):
            answer = post(client)
        assert unavailable_now(answer) == "loss_timed_out"
        assert "no worker had the time" in answer.json()["detail"]


def test_answers_expire(serve, settings):
    mine = settings.model_copy(update={"loss_time_limit_s": 1.0, "loss_result_ttl_s": 1.0})
    with serve(mine) as api, api.client() as client, worker(mine):
        url = post(client, wait=None).headers["location"]
        assert client.get(url, headers={"Prefer": "wait=5"}).status_code == 200
        time.sleep(2.1)
        refused(client.get(url), 404)


def test_a_stopping_server_holds_nobody(serve, settings):
    with serve(settings) as api, api.client() as client, waiting(client) as answer:
        api.app.state.context.stopping.set()
        assert answer().status_code == 202


# ---------------------------------------------------------------- others get their turn


def test_whoever_waits_for_redis_is_not_overtaken(api, monkeypatch):
    """With more requests than connections a pool serves who comes at the right moment, and some wait for ever."""
    monkeypatch.setattr(queue_of_losses, "CONNECTIONS", 1)
    served = []

    async def ask(name: str, times: int) -> None:
        for _ in range(times):
            await queue.standing("default", "loss_none")
            served.append(name)

    async def all_at_once() -> None:
        await asyncio.gather(ask("greedy", 20), *(ask(f"patient {n}", 1) for n in range(10)))
        await queue.close()

    queue = RequestQueue(api.settings, losses(api.settings))
    asyncio.run(all_at_once())
    assert served[:11] == ["greedy", *(f"patient {n}" for n in range(10))]


def test_bodies_are_read_beside_the_event_loop(api, client, standin, monkeypatch):
    """A body of a few kilobytes can hold a thousand mistakes, each of which takes a while to explain."""
    threads = []

    def spied(self: Order, body: bytes | None = None) -> Parcel:
        threads.append(threading.current_thread().name)
        return encode_order(self, body)

    encode_order = Order.encode
    monkeypatch.setattr(Order, "encode", spied)
    row = [-0.123456789] * 100
    batch = {"log_probs": [row], "old_log_probs": [row], "advantages": [1.0]}
    assert post(client, {"items": [{"objective": "gspo", "batch": batch}]}).status_code == 200
    assert post(client, {"items": [{"objective": "gspo", "return": ["ratio"] * 50, "batch": batch}] * 8}).status_code == 200
    many = {"items": [{"objective": "gspo", "return": ["ratio"] * 50, "seed": n} for n in range(3)]}
    sound, _ = decode(in_tensors())
    each = {f"{n}/{name.removeprefix('0/')}": one for n in range(3) for name, one in sound.items()}
    assert post(client, encode(each, {"request": json.dumps(many)}), **{"Content-Type": TENSORS}).status_code == 200
    assert len(threads) == 3 and all(name.startswith("AnyIO worker thread") for name in threads), threads


def test_a_short_request_wakes_no_thread(api, client, standin, monkeypatch):
    threads = []
    encode_order = Order.encode

    def spied(self: Order, body: bytes | None = None) -> Parcel:
        threads.append(threading.current_thread().name)
        return encode_order(self, body)

    monkeypatch.setattr(Order, "encode", spied)
    assert post(client).status_code == post(client, in_tensors(), **{"Content-Type": TENSORS}).status_code == 200
    assert len(threads) == 2 and not any(name.startswith("AnyIO worker thread") for name in threads), threads


def test_a_long_body_of_json_lets_the_others_in_between(monkeypatch):
    """What is read in C, where nobody else can run, is never more than a row."""
    lengths = []

    class Spy:
        JSONDecodeError = orjson.JSONDecodeError

        @staticmethod
        def loads(text: str) -> Any:
            lengths.append(len(text))
            return orjson.loads(text)

    rows = [[-0.5] * 1000] * 50
    raw = orjson.dumps({"items": [{"objective": "gspo", "batch": {"log_probs": rows, "old_log_probs": rows}}]})
    monkeypatch.setattr("service.edge.arrays.orjson", Spy)
    assert parse_arrays(raw)["items"][0]["batch"]["log_probs"] == rows
    assert len(lengths) == 100
    assert max(lengths) == 5001


# ---------------------------------------------------------------- anything at all

SOUND = in_tensors()


@st.composite
def damaged(draw: st.DrawFn, sound: bytes) -> bytes:
    raw = bytearray(sound)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(raw)))
        raw[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(raw)


SCRAPS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["gspo", "gradients"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*ITEM, *ITEM["batch"], "items", "x"]), inner),
    max_leaves=6,
)


@st.composite
def altered(draw: st.DrawFn) -> bytes:
    """The example with a scrap put in somewhere."""
    request = json.loads(json.dumps(LOSS_REQUEST))
    place: Any = request
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys)) if keys else None
        below = None if key is None else place[key]
        if isinstance(below, dict | list) and draw(st.booleans()):
            place = below
            continue
        if isinstance(place, dict) and (key is None or draw(st.booleans())):
            place[draw(st.text(max_size=6) | st.sampled_from(["rewards", "group_ids", "kind", "clip_high"]))] = draw(SCRAPS)
        elif key is not None:
            place[key] = draw(SCRAPS)
        return json.dumps(request).encode("utf-8", "surrogatepass")


BODIES = st.one_of(
    st.tuples(st.sampled_from([JSON, TENSORS]), st.binary(max_size=100)),
    st.tuples(st.just(TENSORS), damaged(SOUND)),
    st.tuples(st.just(JSON), damaged(orjson.dumps(LOSS_REQUEST))),
    st.tuples(st.just(JSON), altered()),
    st.tuples(st.just(TENSORS), SCRAPS.map(lambda request: in_tensors(request))),
)


def test_no_body_whatever_is_an_error_of_ours(api):
    """Half-way sound ones reach the queue: the stand-in reads every order that comes there."""
    statuses = dict[int, int]()

    @hypothesis.settings(
        max_examples=int(EXAMPLES or 200),
        derandomize=EXAMPLES is None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(BODIES)
    def fuzz(body: tuple[str, bytes]) -> None:
        answer = post(client, body[1], **{"Content-Type": body[0]})
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        assert answer.status_code in (200, 400, 422), (answer.text, body)

    with api.client() as client, worker(api.settings) as seen:
        fuzz()
    assert statuses[200] == len(seen) > 0
    assert statuses[400] > 0
    assert statuses[422] > 0
