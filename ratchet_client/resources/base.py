"""What the resources share."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from ratchet_client.errors import RatchetError
from ratchet_client.transport import Transport

CHUNK_BYTES = 2**18  # of uploads and downloads


class Resource:
    """Methods about one resource, over a transport that all of them share."""

    _transport: Transport

    def _get(self, path: str, params: Mapping[str, Any] | None = None, *, timeout_s: float | None = None) -> Any:
        return self._transport.json("GET", path, params=params, timeout_s=timeout_s)


def part(value: str) -> str:
    """An id as one segment of a path, whatever it holds. Raises RatchetError for what no path can hold as a segment."""
    if value in ("", ".", ".."):  # a URL with these is another URL
        raise RatchetError(f"{value!r} is no id; ids look like job_01k..., and the lists (`ratchet jobs`, ...) give them")
    return quote(value, safe="")


def given(**values: Any) -> dict[str, Any]:
    """A body of those that were given."""
    return {name: value for name, value in values.items() if value is not None}
