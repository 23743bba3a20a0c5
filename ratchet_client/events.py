"""Parses server-sent events: from bytes to one (id, type, data) per event."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSentEvent:
    id: str
    type: str
    data: str


def parse(chunks: Iterable[bytes]) -> Iterator[ServerSentEvent]:
    """The events of a stream, without comments (keep-alives) and without an incomplete event at the end."""
    event_id, kind, data = "", "message", list[str]()
    for line in lines(chunks):
        if not line:
            if data:
                yield ServerSentEvent(event_id, kind, "\n".join(data))
            kind, data = "message", []
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            data.append(value)
        elif name == "event":
            kind = value
        elif name == "id":
            event_id = value


def lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Complete lines, split only at line feeds: `splitlines` also splits at U+2028 and the like, which JSON may contain."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r").decode()
