"""Traces from a request to the worker that did the work, received over OTLP from both processes."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from ratchet_client import Ratchet
from service import tracing

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "my secret prompt"
JOB = {
    "kind": "rl",
    "name": SECRET,
    "model": {"source": "tiny"},
    "data": {"train": {"source": "inline", "rows": [{"q": SECRET}]}, "prompt": "{q}"},
    "objective": {"preset": "gspo"},
    "rollout": {"max_completion_tokens": 2},
    "reward": {"graders": [{"kind": "exact", "reference": "a"}]},
    "limits": {"max_steps": 1},
}
BATCH = {"log_probs": [[-1.0]], "old_log_probs": [[-1.1]], "advantages": [1.0]}


class Collector:
    def __init__(self) -> None:
        self.raw: list[bytes] = []
        raw = self.raw

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                raw.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def spans(self) -> list[tuple[str, Any]]:
        """What came so far, each span with the name of its service."""
        found = []
        for raw in self.raw:
            for resource in ExportTraceServiceRequest.FromString(raw).resource_spans:
                (service,) = [each.value.string_value for each in resource.resource.attributes if each.key == "service.name"]
                found += [(service, span) for scope in resource.scope_spans for span in scope.spans]
        return found

    def wait_for(self, *names: str) -> dict[str, tuple[str, Any]]:
        deadline = time.monotonic() + 30
        while not set(names) <= (there := {span.name: (service, span) for service, span in self.spans()}).keys():
            assert time.monotonic() < deadline, sorted(there)
            time.sleep(0.05)
        return there


@pytest.fixture(scope="module")
def traced(whole: Any) -> Iterator[tuple[Any, Collector]]:
    collector = Collector()
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "50"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        with whole(**variables) as running:
            yield running, collector
    collector.server.shutdown()
    assert not tracing.is_on()


def attributes(span: Any) -> dict[str, Any]:
    return {each.key: each.value.string_value or each.value.int_value for each in span.attributes}


def test_one_trace_from_the_request_to_the_phases_of_the_worker(traced: tuple[Any, Collector]) -> None:
    running, collector = traced
    with Ratchet(running.url, running.key) as ratchet:
        headers = {"Authorization": f"Bearer {running.key}", "traceparent": f"00-{TRACE}-{SPAN}-01"}
        job_id = httpx.post(f"{running.url}/v1/jobs", json=JOB, headers=headers).raise_for_status().json()["id"]
        list(ratchet.follow(job_id))
    there = collector.wait_for("POST /v1/jobs", "attempt", "loading", "sampling", "grading", "updating", "saving")
    request, attempt = there["POST /v1/jobs"], there["attempt"]
    assert (request[0], attempt[0]) == ("ratchet-api", "ratchet-worker")
    assert request[1].parent_span_id.hex() == SPAN and attempt[1].parent_span_id == request[1].span_id
    assert {there[name][1].trace_id.hex() for name in ("POST /v1/jobs", "attempt", "sampling", "saving")} == {TRACE}
    assert all(there[name][1].parent_span_id == attempt[1].span_id for name in ("loading", "sampling", "updating", "saving"))
    assert attributes(attempt[1]) == {"ratchet.job_id": job_id, "ratchet.kind": "rl", "ratchet.attempt": 1}
    assert attributes(request[1])["http.response.status_code"] == 201
    sent = b"".join(collector.raw)
    assert SECRET.encode() not in sent and running.key.encode() not in sent


def test_a_batch_links_the_loss_requests_that_it_computed(traced: tuple[Any, Collector]) -> None:
    running, collector = traced
    with Ratchet(running.url, running.key) as ratchet:
        ratchet.losses([{"objective": {"preset": "gspo"}, "batch": BATCH}])
    there = collector.wait_for("POST /v1/losses", "loss request", "loss batch")
    asked, batch = there["loss request"][1], there["loss batch"][1]
    assert asked.parent_span_id == there["POST /v1/losses"][1].span_id
    assert [link.span_id for link in batch.links] == [asked.span_id] and batch.trace_id != asked.trace_id


def test_operations_of_every_wire_belong_to_their_requests(traced: tuple[Any, Collector]) -> None:
    """The last one: the worker stays with its sessions for a while."""
    running, collector = traced
    headers = {"Authorization": f"Bearer {running.key}"}
    row = {"tokens": [5, 6], "target_tokens": [6, 7]}
    tiny = {"source": "tiny", "adapter": {"kind": "lora", "rank": 2}}
    with httpx.Client(base_url=running.url, headers=headers, timeout=60) as client:

        def post(path: str, **body: Any) -> Any:
            return client.post(path, json=body).raise_for_status().json()

        session_id = post("/v1/sessions", model=tiny)["id"]
        post(f"/v1/sessions/{session_id}/operations", seq=1, kind="forward", loss="cross_entropy", rows=[row])
        post("/v1/completions", model="tiny", prompt=SECRET[:2], max_tokens=2)
        own = post("/api/v1/create_session", tags=[], sdk_version="0")["session_id"]
        base = {"session_id": own, "sampling_session_seq_id": 0, "base_model": "tiny"}
        sampler = post("/api/v1/create_sampling_session", **base)["sampling_session_id"]
        prompt = {"chunks": [{"type": "encoded_text", "tokens": [5, 6]}]}
        post("/api/v1/asample", sampling_session_id=sampler, seq_id=0, prompt=prompt, sampling_params={"max_tokens": 2})
    routes = ("POST /v1/sessions/{session_id}/operations", "POST /v1/completions", "POST /api/v1/asample")
    there = collector.wait_for(*routes)
    deadline = time.monotonic() + 60
    while len(operations := [span for _, span in collector.spans() if span.name == "operation"]) < len(routes):
        assert time.monotonic() < deadline, len(operations)
        time.sleep(0.05)
    parents = {(span.trace_id, span.parent_span_id) for span in operations}
    assert parents == {(there[route][1].trace_id, there[route][1].span_id) for route in routes}
    assert SECRET.encode() not in b"".join(collector.raw)


def test_nothing_is_made_where_no_endpoint_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_tracer", None)
    for name in tracing.ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    tracing.start("api")
    assert tracing.begin("x") is None and tracing.here() is None and not tracing.is_on()
