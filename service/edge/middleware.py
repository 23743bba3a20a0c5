"""Middleware around every request: a request id, metrics, common headers, and the limits of `service.edge.limits`."""

from time import perf_counter

from prometheus_client import Counter, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import tracing
from service.edge import audit
from service.edge.auth import ANSWER_HEADERS, SHARE
from service.edge.faces import face_of
from service.edge.limits import refusal
from service.edge.problems import problem
from service.ids import new_id

METHODS = frozenset({"GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS"})
REQUESTS = Counter("ratchet_http_requests_total", "HTTP requests answered", ["method", "route", "status"])
SECONDS = Histogram(
    "ratchet_http_first_byte_seconds",
    "Seconds until an answer began; a stream goes on long after that",
    ["method", "route"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)


class Frame:
    """Plain ASGI middleware. It changes only the first message of an answer; the rest of a stream passes unchanged."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["request_id"] = new_id("req")
        if tracing.is_on():
            await self._traced(scope, receive, send)
        else:
            await self._framed(scope, receive, send)

    async def _traced(self, scope: Scope, receive: Receive, send: Send) -> None:
        """In a span that ends with the answer's last byte. It has the route, and nothing that the caller wrote."""
        span = tracing.begin(
            "request", parent=Headers(scope=scope).get("traceparent"), server=True, request_id=scope["request_id"]
        )
        status = 500

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            with tracing.inside(span):
                await self._framed(scope, receive, send_noted)
        finally:
            method, route = _named(scope)
            facts = {"http.request.method": method, "http.route": route, "http.response.status_code": status}
            tracing.end(span, str(status) if status >= 500 else None, facts, name=f"{method} {route}")

    async def _framed(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = scope["request_id"]
        started = perf_counter()
        status, told = 0, False

        async def send_framed(message: Message) -> None:
            nonlocal status, told
            if message["type"] == "http.response.start":
                status = message["status"]
                _end_share(scope)  # sending the answer needs none
                headers = MutableHeaders(scope=message)
                told = "Idempotency-Replayed" in headers  # it was told when it was done
                headers["X-Request-Id"] = request_id
                headers.update(scope.get(ANSWER_HEADERS, {}))
                for name, value in face_of(scope).headers.items():
                    headers.setdefault(name, value)
            elif message["type"] == "http.response.body" and not told and audit.is_told(scope, status):
                told = True
                await audit.tell(scope, status, message.get("body", b""))
            await send(message)
            if message["type"] == "http.response.start":
                _count(scope, status, perf_counter() - started)

        try:
            if (reason := refusal(scope)) is not None:
                await problem(Request(scope), reason)(scope, receive, send_framed)
            else:
                await self.app(scope, receive, send_framed)
        except Exception:
            if not status:  # an outer handler, that of unexpected errors, sends the answer
                _count(scope, 500, perf_counter() - started)
            raise
        finally:
            _end_share(scope)


def _end_share(scope: Scope) -> None:
    if SHARE in scope:
        scope[SHARE].leave()


def _count(scope: Scope, status: int, seconds: float) -> None:
    """Labels take values from small fixed sets, so that clients cannot create new time series."""
    method, route = _named(scope)
    REQUESTS.labels(method, route, str(status)).inc()
    SECONDS.labels(method, route).observe(seconds)


def _named(scope: Scope) -> tuple[str, str]:
    method = scope["method"] if scope["method"] in METHODS else "other"
    return method, getattr(scope.get("route"), "path_format", "none")
