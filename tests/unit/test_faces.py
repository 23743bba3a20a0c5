"""What differs between the faces of HTTP: the shape of an error, and the headers of every answer."""

from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from fastapi.testclient import TestClient

from service.edge import faces, problems
from service.edge.faces import NATIVE, Face
from service.edge.middleware import Frame
from service.errors import Conflict

PAGES = Face("/pages", {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'self'"})
OTHER = Face("/other/v1", {"Cache-Control": "no-store"}, lambda problem: {"detail": problem["detail"]}, "application/json")


@pytest.fixture
def client() -> Iterator[TestClient]:
    app = FastAPI()
    faces.install(app, PAGES, OTHER)
    problems.install(app)
    app.add_middleware(Frame)

    @app.get("/{path:path}")
    def answer(path: str) -> PlainTextResponse:
        if path.endswith("refused"):
            raise Conflict("not now", code="illegal_transition")
        if path.endswith("broken"):
            raise ZeroDivisionError("1 / 0, a secret")
        return PlainTextResponse("ok", headers={"Cache-Control": "max-age=60"} if path.endswith("kept") else {})

    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize(
    ("path", "face"),
    [("/v1/jobs", NATIVE), ("/pages", PAGES), ("/pages/jobs", PAGES), ("/pagesque", NATIVE), ("/other/v1/x", OTHER)],
)
def test_every_answer_has_the_headers_of_its_face_and_of_no_other(client: TestClient, path: str, face: Face) -> None:
    every_name = {name for one in (NATIVE, PAGES, OTHER) for name in one.headers}
    for tail in ("", "/refused", "/broken"):
        answer = client.get(path + tail)
        assert {name: answer.headers[name] for name in every_name if name in answer.headers} == face.headers
        assert answer.headers["x-request-id"]


def test_an_error_has_the_shape_that_the_clients_of_its_face_know(client: TestClient) -> None:
    native, other = client.get("/v1/refused"), client.get("/other/v1/refused")
    assert (native.status_code, other.status_code) == (409, 409)
    assert native.headers["content-type"] == "application/problem+json" and native.json()["code"] == "illegal_transition"
    assert other.headers["content-type"] == "application/json" and other.json() == {"detail": "not now"}
    assert "secret" not in client.get("/other/v1/broken").text


def test_an_answer_keeps_the_header_that_it_set_itself(client: TestClient) -> None:
    assert client.get("/v1/kept").headers["cache-control"] == "max-age=60"
