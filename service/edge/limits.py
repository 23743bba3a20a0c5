"""Limits on the URL and headers of a request, and on open answers per key. They are checked before any costly work."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import Scope

from service.errors import HeadersTooLarge, Malformed, RatchetError, RateLimited, UriTooLong

MAX_HEADER_BYTES = 32 * 2**10
MAX_HEADERS = 100
MAX_PATH_BYTES = 8 * 2**10
MAX_QUERY_BYTES = 16 * 2**10
MAX_PARAMETERS = 200


def refusal(scope: Scope) -> RatchetError | None:
    """The error for a request that exceeds a limit or has a NUL in its URL; None if it may proceed."""
    query, headers = scope["query_string"], scope["headers"]
    if "\0" in scope["path"] or b"%00" in query:
        return Malformed("the URL contains a NUL character", code="malformed_url")
    if len(scope.get("raw_path") or b"") > MAX_PATH_BYTES:
        return UriTooLong(f"a path may have {MAX_PATH_BYTES} bytes")
    if len(query) > MAX_QUERY_BYTES or query.count(b"&") >= MAX_PARAMETERS:
        return UriTooLong(f"a query may have {MAX_PARAMETERS} parameters of {MAX_QUERY_BYTES} bytes in all")
    if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
        return HeadersTooLarge(f"a request may have {MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes in all")
    return None


class OpenAnswers:
    """Counts the event streams and long polls that each key holds open in this process. For the event loop's thread only."""

    def __init__(self, per_key: int) -> None:
        self._per_key = per_key
        self._open: Counter[str] = Counter()

    @contextmanager
    def hold(self, key_id: str) -> Iterator[None]:
        """Count one open answer until the block ends. Raises RateLimited if the key already has the maximum open."""
        if self._open[key_id] >= self._per_key:
            raise RateLimited(
                f"this API key has {self._per_key} event streams and long polls open, which is as many as it may have",
                code="too_many_streams",
                hint="close some, or follow several jobs by GET /v1/jobs",
                retry_after_s=5,
            )
        self._open[key_id] += 1
        try:
            yield
        finally:
            self._open[key_id] -= 1
            if not self._open[key_id]:
                del self._open[key_id]
