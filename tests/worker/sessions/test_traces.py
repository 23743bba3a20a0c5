"""Spans of operations, as OpenTelemetry's own SDK collects them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext
from session_operations import forward_backward, optim_step, row

from service import tracing

SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
pytestmark = SQLITE
ASKED = {"kind": "sample", "prompts": [[5, 6, 7]], "num_samples": 1, "seed": 3, "sampling": {"max_tokens": 5}}
EVAL = {
    "kind": "eval",
    "rows": [{"prompt": "1", "answer": "1"}],
    "graders": [{"kind": "exact", "reference": "{answer}"}],
    "sampling": {"max_tokens": 2},
}


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("test"))
    yield exporter
    provider.shutdown()


def requested(send: Callable[[], Any]) -> SpanContext:
    """Send in the span of a request."""
    span = tracing.begin("request", server=True)
    with tracing.inside(span):
        send()
    tracing.end(span)
    return span.get_span_context()


def of(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.name == name]


def place(span: ReadableSpan) -> tuple[int, int]:
    """Its trace, and itself."""
    found = span.get_span_context()
    assert found is not None
    return found.trace_id, found.span_id


def parent(span: ReadableSpan) -> tuple[int, int] | None:
    return None if span.parent is None else (span.parent.trace_id, span.parent.span_id)


def phases(exporter: InMemorySpanExporter, span: ReadableSpan) -> list[str]:
    return [each.name for each in exporter.get_finished_spans() if parent(each) == place(span)]


def test_a_session_s_operations_are_children_of_their_requests(rig: Any, exporter: InMemorySpanExporter) -> None:
    job = rig.session()
    first = requested(lambda: rig.send(job, forward_backward(row(5, 6, 7)), optim_step()))
    wrong = forward_backward(row(5, 2**30, 6))
    second = requested(lambda: rig.send(job, wrong, EVAL, {"kind": "save_checkpoint", "name": "v"}, ASKED))
    rig.work()
    done = sorted(of(exporter, "operation"), key=lambda span: str((span.attributes or {})["ratchet.seq"]))
    assert [parent(span) for span in done] == [(one.trace_id, one.span_id) for one in [first] * 2 + [second] * 4]
    train = ["updating"]
    assert [phases(exporter, span) for span in done] == [train, train, train, ["sampling", "grading"], ["saving"], ["sampling"]]
    errors = [(span.attributes or {}).get("error.type") for span in done]
    assert errors == [None, None, "token_unknown", None, None, None]
    attempts = {place(span) for span in of(exporter, "attempt")}
    assert {(link.context.trace_id, link.context.span_id) for span in done for link in span.links} == attempts


def test_a_sampling_batch_links_the_operations_in_it(rig: Any, exporter: InMemorySpanExporter) -> None:
    sampler = rig.sampler()
    requests = [requested(lambda lane=lane: rig.send_loose(sampler, ASKED, lane=lane)) for lane in "abc"]
    rig.work()
    done = of(exporter, "operation")
    assert {parent(span) for span in done} == {(one.trace_id, one.span_id) for one in requests} and len(done) == 3
    assert all(phases(exporter, span) == ["sampling"] for span in done)
    (batch,) = of(exporter, "sampling batch")
    assert {(link.context.trace_id, link.context.span_id) for link in batch.links} == {place(span) for span in done}
    assert batch.attributes == {"ratchet.operations": 3} and batch.parent is None


def test_nothing_is_kept_where_nothing_is_traced(rig: Any) -> None:
    assert not tracing.is_on()
    sampler = rig.sampler()
    rig.send_loose(sampler, ASKED, lane="a")
    rig.work()
    assert rig.operation(sampler, 1, "a").traceparent is None
    assert rig.answer(sampler, 1, "a")["finish_reasons"] == ["length"]
