"""Whether a model of the hub can be had, asked of a hub of the test's own."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from service.jobs.hub import why_not

STATUS = {
    "/org/there/resolve/main/config.json": 200,
    "/org/there/resolve/a%2Fb/config.json": 200,
    "/org/moved/resolve/main/config.json": 307,
    "/org/hidden/resolve/main/config.json": 401,
}


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(STATUS.get(self.path, 404))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("HF_ENDPOINT", url)
    yield url
    server.shutdown()
    server.server_close()


def test_what_the_hub_has_can_be_had(hub: str) -> None:
    assert why_not("org/there", within_s=5) is None
    assert why_not("org/moved", within_s=5) is None
    assert why_not("org/there", "a/b", within_s=5) is None
    assert why_not("org/there", "c", within_s=5) == f"{hub} has none with a config.json at c"
    assert why_not("org/absent", within_s=5) == f"{hub} has none with a config.json at main"


def test_what_needs_a_token_passes_where_one_is_set(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "HF_TOKEN" in (why_not("org/hidden", within_s=5) or "")
    (tmp_path / "token").write_text("not read")
    assert why_not("org/hidden", within_s=5) is None
    (tmp_path / "token").unlink()
    monkeypatch.setenv("HF_TOKEN", "not sent")
    assert why_not("org/hidden", within_s=5) is None


def test_the_cache_is_looked_into_first(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not("org/absent", within_s=5) is not None
    snapshot = tmp_path / "hub" / "models--org--absent" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert why_not("org/absent", within_s=5) is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert why_not("org/absent", within_s=5) is None
    assert why_not("org/there", within_s=5) == f"it is not in {tmp_path / 'hub'}, and HF_HUB_OFFLINE is set"


def test_a_hub_that_is_not_there_or_does_not_answer_is_waited_for_no_longer_than_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 did not answer within 5 s" in (why_not("org/there", within_s=5) or "")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert "did not answer within 0.3 s" in (why_not("org/there", within_s=0.3) or "")
        assert time.monotonic() - started < 1
