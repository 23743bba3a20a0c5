"""What every answer carries, and what is too large, too much or too slow."""

import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from time import monotonic, sleep

import pytest

from service.edge import bodies, limits
from service.edge import protocol as http_protocol
from service.edge.faces import NATIVE


def connect(api):
    return socket.create_connection(("127.0.0.1", int(api.url.rpartition(":")[2])), timeout=20)


def rest(connection):
    """All that comes until the connection ends."""
    got = b""
    try:
        while part := connection.recv(65_536):
            got += part
    except ConnectionResetError:
        pass
    return got


def send(connection, content):
    """In pieces, so that the other side's end is noticed."""
    for at in range(0, len(content), 65_536):
        connection.sendall(content[at : at + 65_536])


# ---------------------------------------------------------------- headers of answers


def test_every_answer_carries_them(api, client, submit, monkeypatch):
    job = submit()
    answers = [
        client.get("/v1/jobs"),
        client.get("/livez"),
        client.get("/openapi.json"),
        client.get("/v1/nothing"),
        client.put("/v1/jobs"),
        client.get("/v1/jobs/%00"),
        client.post("/v1/jobs", content=b"{"),
        client.get("/v1/jobs?limit=x"),
        client.post(f"/v1/jobs/{job['id']}/cancel"),
        client.delete(f"/v1/jobs/{job['id']}"),
        client.get(f"/v1/jobs/{job['id']}/events", headers={"Accept": "text/event-stream"}),
    ]
    with api.anonymous() as stranger:
        answers.append(stranger.get("/v1/jobs"))
    monkeypatch.setattr("service.store.jobs.page", lambda *args, **kwargs: 1 / 0)
    answers.append(client.get("/v1/jobs"))
    assert {answer.status_code for answer in answers} >= {200, 204, 400, 401, 404, 405, 422, 500}
    for answer in answers:
        for name, value in NATIVE.headers.items():
            assert answer.headers.get_list(name) == [value], (
                f"{answer.request.method} {answer.url}: {answer.status_code} {name}"
            )
        assert answer.headers["X-Request-Id"].startswith("req_")
        assert "server" not in answer.headers or answer.headers["server"] == "uvicorn"


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("path", "headers", "status", "code"),
    [
        ("/v1/jobs?name=" + "x" * limits.MAX_QUERY_BYTES, {}, 414, "uri_too_long"),
        ("/v1/jobs?" + "&".join("status=queued" for _ in range(limits.MAX_PARAMETERS + 1)), {}, 414, "uri_too_long"),
        ("/v1/jobs/" + "x" * limits.MAX_PATH_BYTES, {}, 414, "uri_too_long"),
        ("/v1/jobs", {"X-Long": "x" * limits.MAX_HEADER_BYTES}, 431, "headers_too_large"),
        ("/v1/jobs", {f"X-{n}": "x" for n in range(limits.MAX_HEADERS)}, 431, "headers_too_large"),
    ],
    ids=["query", "parameters", "path", "header", "headers"],
)
def test_what_is_too_large_is_refused(client, path, headers, status, code):
    answer = client.get(path, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_what_is_large_and_fits_is_taken(client):
    """The negative control."""
    assert client.get("/v1/jobs?" + "&".join("status=queued" for _ in range(150))).status_code == 200
    assert client.get("/v1/jobs", headers={f"X-{n}": "x" * 200 for n in range(80)}).status_code == 200


def test_a_header_without_an_end_is_not_kept(api):
    with connect(api) as sender:
        sender.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Long: ")
        with pytest.raises(OSError):
            send(sender, b"x" * 64_000_000)
    with connect(api) as sender:
        sender.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * (http_protocol.MAX_HEAD_BYTES + 1))
        assert rest(sender).startswith(b"HTTP/1.1 431")


def test_a_form_has_few_fields(client):
    fields = {f"field-{n}": (None, "x") for n in range(50)}
    answer = client.post("/v1/datasets", files={**fields, "file": ("rows", b'{"q": 1}\n')})
    assert answer.status_code == 400
    assert client.post("/v1/datasets", files={"note": (None, "x"), "file": ("rows", b'{"q": 1}\n')}).status_code == 201


def test_a_yaml_body_is_small_and_the_refusal_says_what_is_not(client):
    filled = f"name: {'x' * 100}\n".encode() + b"# " + b"y" * (bodies.MAX_YAML_BYTES - 109)
    for body, status in ((filled, 422), (filled + b"y", 413)):
        answer = client.post("/v1/jobs", content=body, headers={"Content-Type": "application/yaml"})
        assert answer.status_code == status, answer.text
    assert answer.json()["detail"] == "a YAML body (send JSON, which may be longer) may have at most 65536 bytes"
    assert client.post("/v1/jobs", json={"name": "y" * bodies.MAX_YAML_BYTES}).status_code == 422


def test_a_page_of_rows_has_so_many_bytes(client, monkeypatch):
    monkeypatch.setattr("service.api.datasets.MAX_PAGE_BYTES", 25)
    rows = b"".join(b'{"n": %d}\n' % n for n in range(5)) + b'{"n": "' + b"x" * 40 + b'"}\n'
    headers = {"Content-Type": "application/jsonl"}
    dataset = client.post("/v1/datasets", content=rows, headers=headers).json()

    def page(offset):
        found = client.get(f"/v1/datasets/{dataset['id']}/rows", params={"offset": offset}).json()
        return len(found["data"]), found["has_more"], found["last_id"]

    assert [page(0), page(2), page(4), page(5), page(6)] == [
        (2, True, 1),
        (2, True, 3),
        (1, True, 4),
        (1, False, 5),  # one is always given
        (0, False, None),
    ]


@pytest.mark.parametrize("last_event_id", ["9" * 5000, "9" * 11, "0" * 12])
def test_a_number_in_a_header_is_no_longer_than_a_number(client, submit, last_event_id):
    answer = client.get(f"/v1/jobs/{submit()['id']}/events", headers={"Last-Event-ID": last_event_id})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_last_event_id")


# ---------------------------------------------------------------- time


@pytest.mark.parametrize(("path", "kind"), [("/v1/jobs", "application/json"), ("/v1/datasets", "application/jsonl")])
def test_a_body_that_trickles_in_is_given_up(api, client, monkeypatch, path, kind):
    monkeypatch.setattr(bodies, "GRACE_S", 0.5)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {client.headers['Authorization']}\r\nContent-Type: {kind}\r\n"
    with connect(api) as sender, ThreadPoolExecutor(1) as pool:
        sender.sendall(head.encode() + b"Content-Length: 100000\r\n\r\n")
        began = monotonic()
        answer = pool.submit(rest, sender)
        try:
            while not answer.done() and monotonic() - began < 15:
                sender.sendall(b" ")
                sleep(0.1)
        except OSError:
            pass
        got = answer.result(timeout=20)
    assert got.startswith(b"HTTP/1.1 408") and b"body_too_slow" in got
    assert b"connection: close" in got.lower()  # and the connection did end, or `rest` would not have


def test_a_body_that_comes_at_a_fair_rate_is_not(api, client, monkeypatch):
    """The negative control: four times the grace, but enough bytes."""
    monkeypatch.setattr(bodies, "GRACE_S", 0.5)

    def fair():
        for _ in range(10):
            yield b'{"q": "' + b"x" * 2000 + b'"}\n'
            sleep(0.2)

    sent = client.post("/v1/datasets", content=fair(), headers={"Content-Type": "application/jsonl"})
    assert sent.status_code == 201, sent.text


def test_headers_that_trickle_in_are_given_up(api, monkeypatch):
    monkeypatch.setattr(http_protocol, "HEAD_WITHIN_S", 0.5)
    with connect(api) as silent, connect(api) as sender:
        began = monotonic()
        sender.sendall(b"GET /livez HTTP/1.1\r\n")
        try:
            for _ in range(100):
                sender.sendall(b"x")
                sleep(0.1)
            pytest.fail("it was listened to for ten seconds")
        except OSError:
            pass
        assert rest(silent) == b""
        assert monotonic() - began < 9


def test_a_connection_that_is_used_again_has_time_again(api, monkeypatch):
    monkeypatch.setattr(http_protocol, "HEAD_WITHIN_S", 2.0)
    with connect(api) as sender:
        for _ in range(4):
            sender.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            got = b""
            while b"alive" not in got:  # the body may come by itself
                part = sender.recv(10_000)
                assert part, got
                got += part
            assert got.startswith(b"HTTP/1.1 200")
            sleep(0.7)


# ---------------------------------------------------------------- streams


def test_a_key_holds_so_many_streams_and_no_more(client, serve, api, submit):
    job = submit()
    key = client.headers["Authorization"]
    with serve(api.settings.model_copy(update={"key_open_streams": 3})) as small, ExitStack() as streams:
        mine = streams.enter_context(small.anonymous(Authorization=key, Accept="text/event-stream"))
        path = f"/v1/jobs/{job['id']}/events"
        stream, chunks = None, []
        stream = None
        for _ in range(3):
            stream = streams.enter_context(mine.stream("GET", path))
            chunks.append(stream.iter_raw())  # kept: an iterator that is thrown away closes its stream
            assert next(chunks[-1])
        for request in (path, f"/v1/jobs/{job['id']}?wait_s=5"):
            refused = mine.get(request)
            assert (refused.status_code, refused.json()["code"]) == (429, "too_many_streams")
            assert refused.headers["Retry-After"] == "5"
        with small.anonymous(Authorization=key) as plain:
            assert plain.get(path).status_code == 200  # a list is no stream
            assert plain.get(f"/v1/jobs/{job['id']}").status_code == 200
        assert stream is not None
        stream.close()
        deadline = monotonic() + 10
        while (again := streams.enter_context(mine.stream("GET", path))).status_code == 429:
            assert monotonic() < deadline, "a stream that was closed is still counted"
            sleep(0.2)
        assert again.status_code == 200
