"""A client that costs little beside what it measures: HTTP/1.1 over plain sockets, kept alive."""

import asyncio
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import quantiles
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    took_s: float


def get(path: str, key: str = "", **headers: str) -> bytes:
    return _head("GET", path, key, headers) + b"\r\n"


def post(path: str, key: str, sent: Any, **headers: str) -> bytes:
    body = json.dumps(sent).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
    return _head("POST", path, key, headers) + b"\r\n" + body


def _head(method: str, path: str, key: str, headers: dict[str, str]) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {key}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "".join(f"{line}\r\n" for line in lines).encode()


async def connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    place = urlsplit(url)
    return await asyncio.open_connection(place.hostname, place.port, limit=2**20)


async def load(url: str, requests: Iterable[bytes], connections: int = 1) -> list[Answer]:
    """Send the requests in order, one at a time over each connection. Answers in the order in which they came."""
    left, answers = iter(requests), []

    async def one() -> None:
        reader, writer = await connect(url)
        for request in left:
            began = time.perf_counter()
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            body = await reader.readexactly(length)
            answers.append(Answer(int(head[9:12]), body, time.perf_counter() - began))
        writer.close()

    await asyncio.gather(*(one() for _ in range(connections)))
    return answers


def ask(url: str, requests: Iterable[bytes], connections: int = 1, *, status: int = 200) -> list[Answer]:
    """The same from outside of a loop. Every answer must have this status."""
    answers = asyncio.run(load(url, requests, connections))
    for answer in answers:
        assert answer.status == status, (answer.status, answer.body[:1000])
    return answers


def percentile(seconds: Iterable[float], part: int) -> float:
    """In milliseconds; `part` of 100."""
    return 1000 * quantiles(seconds, n=100, method="inclusive")[part - 1]
