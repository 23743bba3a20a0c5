"""HTTP exchanges with retries: back-off with jitter, Retry-After, and always the same Idempotency-Key."""

import asyncio
import random
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import cache
from ipaddress import ip_address
from math import inf
from time import monotonic, sleep
from typing import Any
from uuid import uuid4

import httpx

from ratchet_client.errors import RatchetApiError, RatchetConnectionError, RatchetError

FIRST_PAUSE_S = 0.5  # doubles with each attempt
LONGEST_PAUSE_S = 10.0
LONGEST_RETRY_AFTER_S = 60.0  # if the service asks for a longer wait, the caller decides
CONNECT_TIMEOUT_S = 5.0
RETRIED = frozenset({429, 502, 503, 504})  # 502 and 504 come from proxies in between

Content = bytes | Iterable[bytes]


class Transport:
    """An httpx client with retries. It knows nothing of jobs."""

    def __init__(self, base_url: str, api_key: str | None, *, timeout_s: float, max_retries: int) -> None:
        self.base_url = base_url.rstrip("/")
        self.timeout_s = timeout_s
        self.max_retries = max_retries
        self._options = _options(self.base_url, api_key, timeout_s)
        self.http = httpx.Client(**self._options)

    def asynchronous(self) -> "AsyncTransport":
        """Another one to the same service, for an event loop."""
        return AsyncTransport(self.base_url, self._options, timeout_s=self.timeout_s)

    def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        json: Any = None,
        content: Callable[[], Content] | None = None,
        headers: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
        timeout_s: float | None = None,
        stream: bool = False,
    ) -> httpx.Response:
        """A successful response, read completely, or open if `stream`. `content` is called again for each attempt.

        Raises RatchetApiError for a refusal and RatchetConnectionError if nobody answers.
        """
        sent = dict(headers or {})
        if method in ("POST", "PUT"):
            sent["Idempotency-Key"] = idempotency_key or uuid4().hex
        return self.until_answered(
            lambda: self.attempt(
                method,
                path,
                params={name: value for name, value in (params or {}).items() if value is not None},
                json=json,
                content=content() if content is not None else None,
                headers=sent,
                timeout_s=timeout_s,
                stream=stream,
            )
        )

    def attempt(
        self, method: str, path: str, *, timeout_s: float | None = None, stream: bool = False, **content: Any
    ) -> httpx.Response:
        """One exchange without retries. A refusal is returned, read completely. Raises httpx.TransportError."""
        timeout = _timeout(timeout_s or self.timeout_s)
        response = self.http.send(self.http.build_request(method, path, timeout=timeout, **content), stream=stream)
        if not response.is_success:
            response.read()
        return response

    def json(self, method: str, path: str, **request: Any) -> Any:
        """`request`, with the response parsed as JSON."""
        return self.parsed(self.request(method, path, **request))

    def parsed(self, response: httpx.Response) -> Any:
        """The response's JSON. Raises RatchetError if the response is not from a Ratchet."""
        return parsed(self.base_url, response)

    def until_answered(self, attempt: Callable[[], httpx.Response], *, until: float = inf) -> httpx.Response:
        """The first successful response. Passing errors are retried until the time `until` (of `monotonic`)."""
        tries = Tries(self.base_url, self.max_retries, until)
        while True:
            outcome: httpx.Response | httpx.TransportError
            try:
                outcome = attempt()
            except httpx.TransportError as broken:
                outcome = broken
            if isinstance(outcome, httpx.Response) and outcome.is_success:
                return outcome
            sleep(tries.pause_after(outcome))

    def unreachable(self, error: httpx.HTTPError) -> RatchetConnectionError:
        return unreachable(self.base_url, error)


class AsyncTransport:
    """The same for an event loop. It belongs to the one in which it is first used."""

    def __init__(self, base_url: str, options: Mapping[str, Any], *, timeout_s: float) -> None:
        self.base_url, self.timeout_s = base_url, timeout_s
        self.http = httpx.AsyncClient(**options)

    async def attempt(self, method: str, path: str, *, timeout_s: float | None = None, **content: Any) -> httpx.Response:
        """One exchange without retries. A refusal is returned. Raises httpx.TransportError."""
        request = self.http.build_request(method, path, timeout=_timeout(timeout_s or self.timeout_s), **content)
        return await self.http.send(request)

    async def until_answered(self, attempt: Callable[[], Awaitable[httpx.Response]], *, until: float) -> httpx.Response:
        """As `Transport.until_answered`, with as many tries as there is time for."""
        tries = Tries(self.base_url, inf, until)
        while True:
            outcome: httpx.Response | httpx.TransportError
            try:
                outcome = await attempt()
            except httpx.TransportError as broken:
                outcome = broken
            if isinstance(outcome, httpx.Response) and outcome.is_success:
                return outcome
            await asyncio.sleep(tries.pause_after(outcome))


class Tries:
    """How often one request has failed, and whether it is worth another try."""

    def __init__(self, base_url: str, most: float, until: float) -> None:
        self._base_url, self._most, self._until = base_url, most, until
        self._failures = 0

    def pause_after(self, outcome: httpx.Response | httpx.TransportError) -> float:
        """Seconds to wait before the next try. Raises the failure if there shall be none."""
        if isinstance(outcome, httpx.Response):
            error = RatchetApiError.of(outcome)
            wait_s, may_pass = pause_s(self._failures, error.retry_after_s), is_passing(error)
        else:
            error = unreachable(self._base_url, outcome)
            wait_s, may_pass = pause_s(self._failures, None), True
            error.__cause__ = outcome
        if not may_pass or self._failures >= self._most or monotonic() + wait_s > self._until:
            raise error
        self._failures += 1
        return wait_s


def unreachable(base_url: str, error: httpx.HTTPError) -> RatchetConnectionError:
    return RatchetConnectionError(f"no answer from {base_url}: {error or type(error).__name__}")


def parsed(base_url: str, response: httpx.Response) -> Any:
    """The response's JSON. Raises RatchetError if the response is not from a Ratchet."""
    try:
        return response.json()
    except ValueError:
        kind = response.headers.get("content-type", "no content type")
        raise RatchetError(f"{base_url} answers, but not with JSON ({kind}): is it a Ratchet?") from None


def is_passing(error: RatchetApiError) -> bool:
    """Whether the same request may succeed in a moment."""
    if error.retry_after_s is not None and error.retry_after_s > LONGEST_RETRY_AFTER_S:
        return False
    return error.status in RETRIED or (error.status == 409 and error.code == "idempotency_in_flight")


def pause_s(failures: int, retry_after_s: float | None) -> float:
    """Seconds to wait: at least what the service asked for, with jitter so that clients do not come back all at once."""
    spread = random.uniform(0.5, 1.0)
    if retry_after_s is not None:
        return retry_after_s + 0.2 * spread
    return min(FIRST_PAUSE_S * 2**failures, LONGEST_PAUSE_S) * spread


def _options(base_url: str, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    """What httpx needs for a client of this service. Raises RatchetError for an address that is none."""
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise RatchetError(f"{base_url!r} is not a URL: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise RatchetError(f"the address must look like http://127.0.0.1:8000, got {base_url!r}")
    here = _is_this_machine(url.host)
    return {
        "base_url": url,
        "headers": {"User-Agent": "ratchet-client"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {}),
        "timeout": _timeout(timeout_s),
        "trust_env": not here,  # a proxy from the environment cannot reach 127.0.0.1
        "verify": False if here and url.scheme == "http" else _certificates(),  # without TLS there is nothing to verify
    }


@cache
def _certificates() -> ssl.SSLContext:
    """Read once: it takes 40 ms, a tenth of a command's start."""
    return httpx.create_ssl_context()


def _timeout(timeout_s: float) -> httpx.Timeout:
    return httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)


def _is_this_machine(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
