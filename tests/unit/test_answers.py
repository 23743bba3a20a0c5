"""Who waits for answers of a session hears of all of them, whenever he comes."""

import asyncio
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from service.edge import answers
from service.edge.answers import Answers

WAITS_S = 30.0  # far beyond what any of this takes


class Bell:
    def __init__(self) -> None:
        self.rung = asyncio.Event()

    async def wait(self, timeout_s: float) -> bool:
        await asyncio.wait_for(self.rung.wait(), timeout_s)
        self.rung.clear()
        return True


class Session:
    """The signals and the store of one session."""

    def __init__(self) -> None:
        self.bell, self.done, self.reads = Bell(), dict[str, Any](), list[set[str]]()

    @contextmanager
    def watch(self, job_id: str) -> Iterator[Bell]:
        yield self.bell

    def read(self, ids: Collection[str]) -> tuple[dict[str, Any], set[str]]:
        self.reads.append(set(ids))
        return {id_: self.done[id_] for id_ in ids if id_ in self.done}, set()

    async def looks_again(self) -> None:
        """Ring, and return when everything was read."""
        before = len(self.reads)
        self.bell.rung.set()
        while len(self.reads) == before or self.bell.rung.is_set():
            await asyncio.sleep(0.001)


def test_an_answer_from_between_two_waits_is_found_at_once(monkeypatch) -> None:
    monkeypatch.setattr(answers, "POLL_S", 10 * WAITS_S)  # nothing but a signal, or its own look, can tell

    async def run() -> None:
        session = Session()
        waiting = Answers(session, session)  # pyright: ignore[reportArgumentType]
        monkeypatch.setattr(waiting, "_read", session.read)
        first = asyncio.create_task(waiting.wait("job", ["one"], WAITS_S))  # keeps the session being looked at
        while not session.reads:
            await asyncio.sleep(0.001)
        assert await waiting.wait("job", ["two"], 0.01) == {}
        session.done["two"] = "the second"
        await session.looks_again()
        found = await asyncio.wait_for(waiting.wait("job", ["two"], 2 * WAITS_S), WAITS_S)
        assert found == {"two": "the second"}
        session.done["one"] = "the first"
        session.bell.rung.set()
        assert await first == {"one": "the first"}

    asyncio.run(run())


def test_what_was_seen_to_wait_is_not_looked_at_before_a_signal(monkeypatch) -> None:
    """Nor is it missed, if the signal comes between the two."""
    monkeypatch.setattr(answers, "POLL_S", 10 * WAITS_S)

    async def run() -> None:
        session, early = Session(), Bell()
        waiting = Answers(session, session)  # pyright: ignore[reportArgumentType]
        monkeypatch.setattr(waiting, "_read", session.read)
        calm: Any = Bell()
        first = asyncio.create_task(waiting.wait("job", ["one"], WAITS_S, since=calm))
        second = asyncio.create_task(waiting.wait("job", ["two"], WAITS_S, since=calm))
        await asyncio.sleep(0.02)
        assert session.reads == []
        session.done |= {"one": "the first", "two": "the second", "three": "the third"}
        early.rung.set()
        assert await waiting.wait("job", ["three"], WAITS_S, since=early) == {"three": "the third"}  # pyright: ignore[reportArgumentType]
        session.bell.rung.set()
        assert (await first, await second) == ({"one": "the first"}, {"two": "the second"})
        early.rung.set()
        assert await waiting.wait("job", ["three"], WAITS_S, since=early) == {"three": "the third"}  # pyright: ignore[reportArgumentType]

    asyncio.run(run())
