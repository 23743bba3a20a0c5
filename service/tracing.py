"""Traces by OpenTelemetry (extra `otel`): from a request, through the queue, to the phases of the worker. Off unless the
variable OTEL_EXPORTER_OTLP_ENDPOINT, or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, says where they go.

Attributes are ids, names, numbers and statuses; never a text of the caller's, and of an error only its type.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from threading import Thread
from typing import Any

log = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
STOP_S = 3.0
NAMESPACE = "ratchet."  # of our own attributes

_tracer: Any = None
_provider: Any = None


def start(part: str) -> None:
    """Begin to trace in this process, as the service `ratchet-PART`, if the environment says so."""
    global _tracer, _provider
    if _tracer is not None or not any(map(os.environ.get, ENDPOINTS)):
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        log.warning("no traces: %s. Install the package: pip install 'ratchet-rl[otel]'", error)
        return
    name = os.environ.get("OTEL_SERVICE_NAME") or f"ratchet-{part}"
    _provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}), shutdown_on_exit=False)
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _tracer = _provider.get_tracer("ratchet")


def stop() -> None:
    """Send what waits, and end."""
    global _tracer, _provider
    if _provider is not None:
        ending = Thread(target=_provider.shutdown, daemon=True)
        ending.start()
        ending.join(STOP_S)  # a collector that is away is tried again for longer
    _tracer = _provider = None


def is_on() -> bool:
    return _tracer is not None


def here() -> str | None:
    """The current span as a W3C traceparent; None while nothing is traced."""
    return None if _tracer is None else _traceparent(None)


def of(span: Any) -> str | None:
    """This span as a W3C traceparent."""
    from opentelemetry.trace import set_span_in_context

    return _traceparent(set_span_in_context(span))


def _traceparent(context: Any) -> str | None:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, context)
    return carrier.get("traceparent")


def _context(traceparent: str | None) -> Any:
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent} if traceparent else {}, Context())


def begin(name: str, *, parent: str | None = None, links: Iterable[str | None] = (), server: bool = False, **facts: Any) -> Any:
    """A span that is ended by `end`; None while nothing is traced. `parent`, `links`: traceparents.

    Without a parent it is a root. `facts` become attributes of our namespace.
    """
    if _tracer is None:
        return None
    from opentelemetry.trace import Link, SpanKind, get_current_span

    linked = [Link(get_current_span(_context(each)).get_span_context()) for each in links if each is not None]
    kind = SpanKind.SERVER if server else SpanKind.INTERNAL
    attributes = {NAMESPACE + key: value for key, value in facts.items() if value is not None}
    return _tracer.start_span(name, context=_context(parent), kind=kind, links=linked, attributes=attributes)


def end(span: Any, error: str | None = None, attributes: Mapping[str, Any] | None = None, name: str | None = None) -> None:
    """End a span (None: nothing happens). `error`: a type or code, which marks it as failed."""
    if span is None:
        return
    from opentelemetry.trace import StatusCode

    if name is not None:
        span.update_name(name)
    span.set_attributes(attributes or {})
    if error is not None:
        span.set_attribute("error.type", error)
        span.set_status(StatusCode.ERROR)
    span.end()


@contextmanager
def inside(span: Any) -> Iterator[None]:
    """Make it the current span, whose traceparent `here` gives."""
    if span is None:
        yield
        return
    from opentelemetry.trace import use_span

    with use_span(span, record_exception=False, set_status_on_exception=False):
        yield


class Stages:
    """A span whose inside is a sequence of others, one after another: an attempt or an operation and its phases."""

    def __init__(self, name: str, *, parent: str | None, links: Iterable[str | None] = (), **facts: Any) -> None:
        self._facts = facts
        self._whole = begin(name, parent=parent, links=links, **facts)
        self.traceparent = None if self._whole is None else of(self._whole)
        self._stage: Any = None

    def enter(self, name: str) -> None:
        """End the stage before, and begin this one."""
        if self._whole is not None:
            end(self._stage)
            self._stage = begin(name, parent=self.traceparent, **self._facts)

    def end(self, error: str | None = None) -> None:
        end(self._stage, error)
        end(self._whole, error)
        self._whole = self._stage = None
