"""Redis dies, workers die, time is over: whoever waits is told."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from pydantic import SecretStr
from redis.client import Pipeline

from chaos.standin import WORKER, echo, worker
from losses_over_http import BYTES, LISTENING, RUNG, WAITING, WORKERS, post, refused, unavailable_now, waiting
from service.relay.line import losses
from service.relay.orders import Order, unavailable
from service.relay.queue import ALIVE_FOR_S, WorkerQueue
from service.settings import Settings


@pytest.fixture
def short(settings, own_redis) -> Settings:
    """A Redis of its own, and little patience."""
    return settings.model_copy(update={"redis_url": SecretStr(own_redis.url), "loss_time_limit_s": 30.0})


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
