"""One key's requests never take all that the process has: some are worked on, some wait, and the rest come again."""

import asyncio
import socket
import threading
from contextlib import ExitStack
from time import monotonic

import httpx
import pytest

from job_specs import RL
from service.store import jobs

AT_ONCE, IN_LINE = 4, 8
SPEC = RL | {"name": "followed"}


@pytest.fixture
def small(serve, api):
    """A server with few shares for each key."""
    with serve(api.settings.model_copy(update={"key_requests_at_once": AT_ONCE, "key_open_streams": 6})) as small:
        small.app.state.context.shares._in_line = IN_LINE
        yield small


@pytest.fixture
def slow_lists(monkeypatch):
    """Lists that ask for a tag `slow` do not end before this event; the number of those that began stands beside it."""
    go_on, begun, page = threading.Event(), [], jobs.page

    def slow(session, project, **query):
        if query["tag"] == "slow":
            begun.append(project)
            assert go_on.wait(30)
        return page(session, project, **query)

    monkeypatch.setattr("service.store.jobs.page", slow)
    yield go_on, begun
    go_on.set()


def at_once(client: httpx.Client, paths: list[str], meanwhile=None, **headers: str) -> list[httpx.Response]:
    """The answers of requests that were all sent together; `meanwhile` runs in a thread beside."""

    async def ask() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=client.base_url, headers={**client.headers, **headers}, limits=limits, timeout=60
        ) as many:
            asked = [asyncio.create_task(many.get(path)) for path in paths]
            if meanwhile is not None:
                await asyncio.to_thread(meanwhile)
            return await asyncio.gather(*asked)

    return asyncio.run(ask())


def until(holds, what):
    deadline = monotonic() + 10
    while not holds():
        assert monotonic() < deadline, what
        threading.Event().wait(0.01)


def test_the_slow_requests_of_one_key_leave_another_its_threads(small, slow_lists):
    """Sixty slow requests, more than the process has threads: another key's p99 stays below half a second."""
    go_on, begun = slow_lists
    seconds: list[float] = []

    def meanwhile():
        until(lambda: len(begun) == AT_ONCE, "the slow requests did not begin")
        for _ in range(100):
            began = monotonic()
            assert other.get("/v1/jobs").status_code == 200
            seconds.append(monotonic() - began)
        assert len(begun) == AT_ONCE
        go_on.set()

    with small.client() as client, small.client() as other:
        answers = at_once(client, ["/v1/jobs?tag=slow"] * 60, meanwhile)
    assert sorted(seconds)[98] < 0.5
    statuses = [answer.status_code for answer in answers]
    assert (statuses.count(200), statuses.count(429)) == (AT_ONCE + IN_LINE, 60 - AT_ONCE - IN_LINE)
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert (refused.json()["code"], refused.headers["Retry-After"]) == ("too_many_at_once", "1")
    assert small.app.state.context.shares._lines == {}


def test_what_only_waits_takes_no_share(small, slow_lists):
    """More long polls, streams and stalled uploads than the key has shares, and it is served all the same."""
    with small.client() as client, ExitStack() as open_ones:
        job = client.post("/v1/jobs", json=SPEC).json()
        polls = [f"/v1/jobs/{job['id']}?wait_s=3"] * (AT_ONCE + 1)
        for _ in range(AT_ONCE + 1):
            host, port = small.url.removeprefix("http://").split(":")
            stalled = open_ones.enter_context(socket.create_connection((host, int(port)), timeout=20))
            stalled.sendall(
                f"POST /v1/datasets HTTP/1.1\r\nHost: x\r\nAuthorization: {client.headers['Authorization']}\r\n"
                'Content-Type: application/jsonl\r\nContent-Length: 100\r\n\r\n{"a": '.encode()
            )

        def meanwhile():
            context = small.app.state.context
            until(lambda: sum(context.open_answers._open.values()) == len(polls), "the long polls did not begin")
            began = monotonic()
            assert client.get("/v1/jobs").status_code == 200
            assert monotonic() - began < 1

        assert {answer.status_code for answer in at_once(client, polls, meanwhile)} == {200}
    until(lambda: small.app.state.context.shares._lines == {}, "a share is still held")


def test_streams_that_are_opened_at_once_are_counted_before_they_open(small):
    """The limit holds however many come together: 6 are open, the others are refused."""
    with small.client() as client, ExitStack() as streams:
        job = client.post("/v1/jobs", json=SPEC).json()
        path = f"/v1/jobs/{job['id']}/events"
        statuses: list[int] = []
        started = threading.Barrier(10)

        def follow():
            mine = streams.enter_context(httpx.Client(base_url=client.base_url, headers=client.headers, timeout=30))
            started.wait()
            statuses.append(
                streams.enter_context(mine.stream("GET", path, headers={"Accept": "text/event-stream"})).status_code
            )

        threads = [threading.Thread(target=follow) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sorted(statuses) == [200] * 6 + [429] * 4
    until(lambda: not small.app.state.context.open_answers._open, "a stream that was closed is still counted")


def test_a_stream_of_a_job_that_is_not_there_is_not_counted(small):
    with small.client() as client:
        for _ in range(8):
            answer = client.get("/v1/jobs/job_none/events", headers={"Accept": "text/event-stream"})
            assert answer.status_code == 404
