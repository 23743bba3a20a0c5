"""When too much waits, the next request is asked to come again."""

import time
from typing import Any

import redis

from chaos.standin import worker
from losses_over_http import BYTES, WAITING, post, refused
from service.relay.orders import Order, answered
from service.relay.tensors import Tensor
from service.settings import Settings


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
