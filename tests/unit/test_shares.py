"""How many requests of one key are worked on at once, and how many wait."""

import asyncio

import pytest

from service.edge.shares import Share, Shares, Turns
from service.errors import RateLimited


async def settled() -> None:
    """Everything that can go on without us has."""
    for _ in range(10):
        await asyncio.sleep(0)


class Requests:
    """Each is worked on until it is told to end."""

    def __init__(self, shares: Shares) -> None:
        self.shares, self.at_work = shares, list[str]()
        self.end: dict[str, asyncio.Event] = {}

    def send(self, name: str, key: str = "key_a", *, always: bool = False) -> asyncio.Task[None]:
        self.end[name] = asyncio.Event()
        return asyncio.create_task(self._work(name, key, always))

    async def _work(self, name: str, key: str, always: bool) -> None:
        async with self.shares.share(key, always=always):
            self.at_work.append(name)
            await self.end[name].wait()
            self.at_work.remove(name)


def test_a_key_has_its_shares_and_its_line_and_no_more():
    async def play() -> None:
        requests = Requests(Shares(at_once=2, in_line=1))
        tasks = [requests.send(name) for name in ("first", "second", "third")]
        await settled()
        assert requests.at_work == ["first", "second"]
        with pytest.raises(RateLimited) as refused:
            await requests.send("too many")
        assert (refused.value.code, refused.value.extra["retry_after_s"]) == ("too_many_at_once", 1)
        tasks += [requests.send("of another key", "key_b"), requests.send("taken before", always=True)]
        await settled()
        assert requests.at_work == ["first", "second", "of another key"]
        requests.end["first"].set()
        await settled()
        assert requests.at_work == ["second", "of another key", "third"]
        for end in requests.end.values():
            end.set()
        await asyncio.gather(*tasks)
        assert requests.shares._lines == {}

    asyncio.run(play())


def test_a_request_that_only_waits_leaves_its_share_to_others_and_gets_it_back():
    async def play() -> None:
        shares, bell, seen = Shares(at_once=1, in_line=5), asyncio.Event(), list[str]()

        async def waits(share: Share) -> None:
            async with share.resting():
                await bell.wait()
            seen.append("woken")

        async def follower() -> None:
            async with shares.share("key") as share:
                await waits(share)

        following = asyncio.create_task(follower())
        await settled()
        async with shares.share("key"):
            bell.set()
            await settled()
            assert seen == []  # it has its share again only when this one is done
        await following
        assert seen == ["woken"] and shares._lines == {}

    asyncio.run(play())


@pytest.mark.parametrize("when", ["waiting in line", "resting", "working"])
def test_a_request_that_is_called_off_gives_back_what_it_holds(when: str):
    async def play() -> None:
        shares = Shares(at_once=1, in_line=5)
        blocked = asyncio.Event()

        async def request() -> None:
            async with shares.share("key") as share:
                if when == "resting":
                    async with share.resting():
                        await blocked.wait()
                await blocked.wait()

        async with asyncio.timeout(5):
            if when == "waiting in line":
                async with shares.share("key"):
                    task = asyncio.create_task(request())
                    await settled()
                    task.cancel()
                    await settled()
            else:
                task = asyncio.create_task(request())
                await settled()
                task.cancel()
                await settled()
            assert task.cancelled() and shares._lines == {}
            async with shares.share("key"):
                assert shares._lines["key"].free.locked()

    asyncio.run(play())


def test_one_key_never_has_all_turns():
    async def play() -> None:
        turns, at_work, go_on = Turns(per_key=1, in_all=2), list[str](), asyncio.Event()

        async def work(key: str) -> None:
            async with turns.turn(key):
                at_work.append(key)
                await go_on.wait()

        tasks = [asyncio.create_task(work(key)) for key in ("a", "a", "a", "b", "c")]
        await settled()
        assert at_work == ["a", "b"]
        go_on.set()
        await asyncio.gather(*tasks)
        assert sorted(at_work) == ["a", "a", "a", "b", "c"]

    asyncio.run(play())
