"""Rate limits: a token bucket for each key, in Redis, shared by all API processes.

While Redis is away or slow, each process uses buckets of its own. No request fails because of Redis or waits for it longer
than two seconds; at worst a key gets its rate once from each process.

Redis returns the token together with the edition of the keys, which changes with each revocation: see `service.edge.keyring`.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from secrets import token_hex
from time import monotonic
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.retry import Retry

from service.doorbell import KEYS_EDITION, redis_py_url
from service.settings import Settings

log = logging.getLogger(__name__)

TIMEOUT_S = 1.0  # for a reply, waiting in line included; if shorter, a busy event loop would look like a dead Redis
CONNECTIONS = 32  # of one API process
ASK_AGAIN_S = 5.0  # pause before the next try after Redis failed
MAX_LOCAL = 10_000  # buckets in the memory of one process

# Takes as many of the tokens that are asked for as there are; returns how many, and how many there were before. It uses the
# clock of Redis, so the clocks of the API's machines need not agree. A bucket expires when it is full again.
TAKE = """
local edition = redis.call('GET', KEYS[2])
if ARGV[1] == '' then return {edition, 0, '0'} end
local rate, burst, asked = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local kept = redis.call('HMGET', KEYS[1], 'tokens', 'at')
local passed = math.max(0, now - (tonumber(kept[2]) or now))
local tokens = math.min(burst, (tonumber(kept[1]) or burst) + passed * rate)
local taken = math.min(asked, math.floor(tokens))
redis.call('HSET', KEYS[1], 'tokens', string.format('%.9f', tokens - taken), 'at', string.format('%.6f', now))
redis.call('PEXPIRE', KEYS[1], math.ceil(burst / rate * 1000) + 1000)
return {edition, taken, string.format('%.9f', tokens)}
"""


@dataclass(frozen=True)
class Rate:
    """`burst` requests at once, and `requests_per_s` in the long run."""

    requests_per_s: float
    burst: int


@dataclass(frozen=True)
class Turn:
    """The result for one request: whether it is allowed, and how many tokens are left."""

    allowed: bool
    tokens: float
    rate: Rate

    @property
    def retry_after_s(self) -> int:
        """Whole seconds until there is a token."""
        return max(1, ceil((1 - self.tokens) / self.rate.requests_per_s))

    @property
    def headers(self) -> dict[str, str]:
        """Headers of draft-ietf-httpapi-ratelimit-headers: q and r are in requests, w and t in seconds."""
        full_s = ceil(self.rate.burst / self.rate.requests_per_s)
        t = self.retry_after_s if not self.allowed else ceil((self.rate.burst - self.tokens) / self.rate.requests_per_s)
        return {"RateLimit-Policy": f'"key";q={self.rate.burst};w={full_s}', "RateLimit": f'"key";r={int(self.tokens)};t={t}'}


class RateReply(NamedTuple):
    """`turn` is None if the key has no limit. `edition`, that of the keys, is None if Redis did not return one."""

    turn: Turn | None
    edition: bytes | None


class _Together:
    """Requests of one key that are counted by one question, in their order."""

    def __init__(self) -> None:
        self.count = 0
        self.reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()


class Limiter:
    """For the event loop's thread only."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = monotonic) -> None:
        self._default = Rate(settings.key_requests_per_s, settings.key_burst) if settings.key_requests_per_s else None
        url = redis_py_url(settings.redis_url.get_secret_value())
        # Without a timeout of the client's, because `_asked` has one, and this one would make a task for each command.
        options: dict[str, Any] = {"retry": Retry(NoBackoff(), 0), "max_connections": CONNECTIONS, "socket_timeout": None}
        self._redis = redis.asyncio.Redis.from_url(url, **options)
        self._take = self._redis.register_script(TAKE)
        self._turns = asyncio.Semaphore(CONNECTIONS)  # first come, first served
        self._gathering: dict[tuple[str, Rate | None], _Together] = {}
        self._asking: WeakValueDictionary[tuple[str, Rate | None], asyncio.Lock] = WeakValueDictionary()
        self._clock = clock
        self._ask_again_at = 0.0
        self._local: OrderedDict[str, tuple[float, float]] = OrderedDict()  # key id -> tokens, time of the count

    def rate(self, requests_per_s: float | None, burst: int | None) -> Rate | None:
        """The key's own rate, or else the operator's default; None means no limit."""
        return self._default if requests_per_s is None or burst is None else Rate(requests_per_s, burst)

    async def take(self, key_id: str, rate: Rate | None) -> RateReply:
        """Take one token, if there is one. Never raises.

        While Redis is asked for a key, further requests of the key gather, and the next question is for all of them.
        """
        together, place = self._gathering.get((key_id, rate)), 0
        if together is None:
            together = _Together()
            together.count = 1
            reply = await self._ask_for(together, key_id, rate)
        else:
            place, together.count = together.count, together.count + 1
            reply = await asyncio.shield(together.reply)
        if rate is None:
            return RateReply(None, reply and reply[0])
        if reply is None:
            return RateReply(self._take_here(key_id, rate), None)
        edition, taken, tokens = reply
        return RateReply(Turn(place < taken, float(tokens) - min(place + 1, taken), rate), edition)

    async def _ask_for(self, together: _Together, key_id: str, rate: Rate | None) -> Any:
        """Take tokens for all who gather until it is their turn to be asked for."""
        whose = key_id, rate
        asking = self._asking.setdefault(whose, asyncio.Lock())
        self._gathering[whose] = together

        async def ask() -> Any:
            del self._gathering[whose]
            bucket = ["", "", ""] if rate is None else [rate.requests_per_s, rate.burst, together.count]
            return await self._take(keys=[f"ratchet:rate:{key_id}", KEYS_EDITION], args=bucket)

        reply = None
        try:
            async with asking:
                reply = await self._asked(ask)
        finally:
            if self._gathering.get(whose) is together:
                del self._gathering[whose]
            together.reply.set_result(reply)
        return reply

    async def edition(self) -> bytes | None:
        """The edition of the keys; created if there is none. Never raises; None while Redis is away."""

        async def ask() -> bytes | None:
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.set(KEYS_EDITION, token_hex(8), nx=True)
                pipe.get(KEYS_EDITION)
                return (await pipe.execute())[1]

        return await self._asked(ask)

    async def _asked(self, question: Callable[[], Any]) -> Any:
        """The reply of Redis; None if there is none."""
        if not self._may_ask():
            return None
        try:
            async with asyncio.timeout(TIMEOUT_S), self._turns:
                answer = await question()
        except (redis.RedisError, OSError) as error:  # asyncio's TimeoutError is an OSError
            log.warning("Redis does not count requests (%s); this process counts its own", type(error).__name__)
            self._ask_again_at = self._clock() + ASK_AGAIN_S
            return None
        self._ask_again_at = 0.0
        return answer

    def _may_ask(self) -> bool:
        """After a failure one request every ASK_AGAIN_S tries Redis again; the others do not wait for it."""
        now = self._clock()
        if now < self._ask_again_at:
            return False
        if self._ask_again_at:
            self._ask_again_at = now + ASK_AGAIN_S
        return True

    def _take_here(self, key_id: str, rate: Rate) -> Turn:
        now = self._clock()
        tokens, at = self._local.pop(key_id, (float(rate.burst), now))
        tokens = min(rate.burst, tokens + (now - at) * rate.requests_per_s)
        allowed = tokens >= 1
        tokens -= allowed
        self._local[key_id] = tokens, now
        if len(self._local) > MAX_LOCAL:
            self._local.popitem(last=False)
        return Turn(allowed, tokens, rate)

    async def close(self) -> None:
        await self._redis.aclose()


def default_burst(requests_per_s: float) -> int:
    """The requests of two seconds, at least 1."""
    return max(1, ceil(2 * requests_per_s))
