"""How often a key may ask: over HTTP with a real Redis, with a dead one and with one that hangs; and the bucket itself."""

import asyncio
from contextlib import asynccontextmanager
from time import monotonic, sleep

import pytest
from pydantic import SecretStr

from service.api.keys import SLOWEST_PER_S
from service.edge.rate import ASK_AGAIN_S, TIMEOUT_S, Limiter, Rate

ONE_STORE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
def time_for_redis(monkeypatch):
    """Whatever else keeps the machine busy, Redis counts."""
    monkeypatch.setattr("service.edge.rate.TIMEOUT_S", 60.0)


COUNTED = pytest.mark.usefixtures("time_for_redis")


def limited_client(api, client, requests_per_s, burst):
    rate = {"requests_per_s": requests_per_s, "burst": burst}
    made = client.post("/v1/keys", json={"name": "x", "rate": rate}).json()
    return api.anonymous(**{"X-API-Key": made["key"]})


@COUNTED
def test_who_asks_too_often_is_told_when_to_come_back(api, client):
    with limited_client(api, client, 0.5, 3) as eager, limited_client(api, client, 0.5, 3) as calm:
        for left in (2, 1, 0):
            answer = eager.get("/v1/jobs")
            assert answer.status_code == 200
            assert answer.headers["RateLimit-Policy"] == '"key";q=3;w=6'
            assert answer.headers["RateLimit"].startswith(f'"key";r={left};t=')
        refused = eager.get("/v1/jobs")
        problem = refused.json()
        assert (refused.status_code, problem["code"], problem["retryable"]) == (429, "rate_limited", True)
        assert refused.headers["Retry-After"] == "2" == str(problem["retry_after_s"])
        assert refused.headers["RateLimit"] == '"key";r=0;t=2'
        assert problem["error"]["type"] == "rate_limit_error"
        assert calm.get("/v1/jobs").status_code == 200  # another key has a bucket of its own


@COUNTED
def test_a_refusal_of_another_kind_says_how_much_is_left_too(api, client):
    with limited_client(api, client, 0.5, 3) as eager:
        answer = eager.get("/v1/jobs/job_absent")
        assert (answer.status_code, answer.headers["RateLimit"][:10]) == (404, '"key";r=2;')


def test_tokens_come_back(api, client):
    with limited_client(api, client, 0.7, 1) as eager:
        assert [eager.get("/v1/jobs").status_code for _ in range(2)] == [200, 429]
        sleep(1.5)
        assert eager.get("/v1/jobs").status_code == 200


@COUNTED
def test_the_slowest_rate_and_the_largest_burst_are_counted_by_redis(api, client, caplog):
    """What Redis refused to count would be counted by nobody else for a while, for any key."""
    with limited_client(api, client, SLOWEST_PER_S, 1_000_000) as slow:
        answers = [slow.get("/v1/jobs") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert [answer.headers["RateLimit"].partition(";t=")[0] for answer in answers] == ['"key";r=999999', '"key";r=999998']
    assert not [record for record in caplog.records if record.name == "service.edge.rate"]


@COUNTED
def test_the_operator_s_rate_holds_where_a_key_has_none(api, client, serve):
    """Two processes share a bucket by Redis: here two servers."""
    settings = api.settings.model_copy(update={"key_requests_per_s": 0.001, "key_burst": 4})
    made = client.post("/v1/keys", json={"name": "x"}).json()["key"]
    own = client.post("/v1/keys", json={"name": "y", "rate": {"requests_per_s": 1000}}).json()["key"]
    with serve(settings) as one, serve(settings) as two:
        with one.anonymous(**{"X-API-Key": made}) as first, two.anonymous(**{"X-API-Key": made}) as second:
            got = [client.get("/v1/jobs").status_code for client in (first, second) * 3]
        assert got == [200] * 4 + [429] * 2
        with one.anonymous(**{"X-API-Key": own}) as free:
            assert {free.get("/v1/jobs").status_code for _ in range(10)} == {200}


@ONE_STORE
@pytest.mark.parametrize("ends", ["kill", "freeze"])
def test_without_redis_each_process_counts_and_nobody_waits(serve, settings, own_redis, ends, caplog):
    with serve(settings.model_copy(update={"redis_url": SecretStr(own_redis.url)})) as api, api.client() as client:
        with limited_client(api, client, 0.01, 30) as eager:
            assert eager.get("/v1/jobs").status_code == 200
            getattr(own_redis, ends)()
            began = monotonic()
            got = [eager.get("/v1/jobs").status_code for _ in range(32)]
            took = monotonic() - began
        own_redis.thaw() if ends == "freeze" else None
    assert got == [200] * 30 + [429] * 2  # a bucket of this process' own, full at first
    tried = [record for record in caplog.records if record.name == "service.edge.rate"]
    assert 1 <= len(tried) <= 1 + took / ASK_AGAIN_S  # one waits, and the others go on


# ---------------------------------------------------------------- the bucket


@asynccontextmanager
async def limiter_on(own_redis, settings, clock=monotonic):
    limiter = Limiter(settings.model_copy(update={"redis_url": SecretStr(own_redis.url)}), clock=clock)
    try:
        yield limiter
    finally:
        await limiter.close()


async def turn(limiter, key_id, rate):
    found = (await limiter.take(key_id, rate)).turn
    assert found is not None
    return found


@ONE_STORE
@COUNTED
def test_many_at_once_get_exactly_the_burst(own_redis, settings):
    async def run():
        async with limiter_on(own_redis, settings) as one, limiter_on(own_redis, settings) as two:
            return await asyncio.gather(*(turn(limiter, "key_a", Rate(0.001, 25)) for limiter in (one, two) * 30))

    assert sum(one.allowed for one in asyncio.run(run())) == 25


@ONE_STORE
@COUNTED
def test_in_redis_a_bucket_is_forgotten_when_it_is_full_again(own_redis, settings):
    async def run():
        async with limiter_on(own_redis, settings) as limiter:
            await limiter.take("key_a", Rate(10, 5))

    asyncio.run(run())
    assert 0 < own_redis.client().pttl("ratchet:rate:key_a") <= 1500


@ONE_STORE
def test_after_a_failure_redis_is_left_alone_for_a_while_and_then_asked_again(own_redis, settings):
    now, rate = [100.0], Rate(1, 2)

    async def run():
        async with limiter_on(own_redis, settings, clock=lambda: now[0]) as limiter:
            assert (await turn(limiter, "key_a", rate)).tokens == 1
            own_redis.kill()
            turns = [await turn(limiter, "key_a", rate) for _ in range(3)]
            assert [one.allowed for one in turns] == [True, True, False]  # its own, full bucket
            own_redis.start()
            now[0] += ASK_AGAIN_S - 1
            await limiter.take("key_b", rate)
            assert own_redis.client().keys("*") == []
            now[0] += 1
            await limiter.take("key_b", rate)
            assert own_redis.client().keys("*") == [b"ratchet:rate:key_b"]

    asyncio.run(run())


@ONE_STORE
def test_many_who_wait_when_redis_freezes_wait_once(own_redis, settings):
    async def run():
        async with limiter_on(own_redis, settings) as limiter:
            own_redis.freeze()
            began = monotonic()
            taken = await asyncio.gather(*(turn(limiter, "key_a", Rate(0.001, 40)) for _ in range(50)))
            own_redis.thaw()
            return sum(one.allowed for one in taken), monotonic() - began

    allowed, took = asyncio.run(run())
    assert allowed == 40
    assert took < 10 * TIMEOUT_S


@ONE_STORE
def test_a_slow_redis_is_not_waited_for(own_redis, settings, monkeypatch):
    """200 at once, and a Redis whose answers take most of the time that there is for one."""

    async def run():
        async with limiter_on(own_redis, settings) as limiter:
            take = limiter._take

            async def slow(**arguments):
                await asyncio.sleep(0.8 * TIMEOUT_S)
                return await take(**arguments)

            monkeypatch.setattr(limiter, "_take", slow)
            began = monotonic()
            await asyncio.gather(*(turn(limiter, "key_a", Rate(1000, 1000)) for _ in range(200)))
            return monotonic() - began

    assert asyncio.run(run()) < 4 * TIMEOUT_S


@ONE_STORE
def test_a_process_s_own_bucket_fills_at_its_rate(own_redis, settings):
    now, rate = [0.0], Rate(2, 4)

    async def run():
        async with limiter_on(own_redis, settings, clock=lambda: now[0]) as limiter:
            own_redis.kill()

            async def turns(count):
                return [await turn(limiter, "k", rate) for _ in range(count)]

            assert [one.allowed for one in await turns(5)] == [True] * 4 + [False]
            now[0] = 0.5
            assert [one.allowed for one in await turns(2)] == [True, False]
            now[0] = 1000
            assert (await turns(1))[0].tokens == 3  # never more than the burst

    asyncio.run(run())
