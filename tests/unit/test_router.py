"""A router is asked only about paths that may be its own."""

import pytest
from fastapi import APIRouter, FastAPI
from starlette.testclient import TestClient

from service.edge.router import Router


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked, ask = list[str](), APIRouter.matches

    def matches(self, scope):
        asked.append(self.prefix)
        return ask(self, scope)

    monkeypatch.setattr(APIRouter, "matches", matches)
    return asked


@pytest.mark.parametrize("root_path", ["", "/behind/a/proxy"])
def test_only_a_router_of_this_prefix_looks_at_its_routes(asked: list[str], root_path: str) -> None:
    app = FastAPI()
    for prefix in ("/v1/keys", "/v1/jobs/{job_id}/events", "/v1/jobs"):
        router = Router(prefix=prefix)
        router.add_api_route("/{rest}", lambda prefix=prefix: prefix, methods=["GET"])
        app.include_router(router)
    client = TestClient(app, root_path=root_path)
    for path, found, told in (
        ("/v1/jobs/a", "/v1/jobs", ["/v1/jobs/{job_id}/events", "/v1/jobs"]),
        ("/v1/jobs/a/events/b", "/v1/jobs/{job_id}/events", ["/v1/jobs/{job_id}/events"]),
        ("/v1/keys/a", "/v1/keys", ["/v1/keys"]),
    ):
        asked.clear()
        assert client.get(f"{root_path}{path}").json() == found
        assert asked == told
    assert client.post("/v1/keys/a").status_code == 405
    assert client.get("/v2/keys").status_code == 404
