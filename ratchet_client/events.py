"""Server-sent events: bytes in, one (id, type, data) an event out."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSentEvent:
    id: str
    type: str
    data: str


def parse(chunks: Iterable[bytes]) -> Iterator[ServerSentEvent]:
    """Events of a stream; comments (keep-alives) and a torn event at the end are left out."""
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
    """Whole lines, cut at line feeds only: JSON may hold U+2028 and its like as they are, where `splitlines` would cut."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r").decode()
